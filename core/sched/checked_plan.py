"""The plan of a policy, checked: what is too much is cut, and what breaks the contract is named."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, TypeGuard

import numpy as np
from numpy.typing import NDArray

from quire.core.contracts.policy_view import Grants, Refusal, StepView

__all__ = ["CheckedPlan", "PlanLimits", "check_grants"]


@dataclass(slots=True)
class CheckedPlan:
    """Grants that are safe to carry out: positive, within the budget and what remains, no request twice."""

    request_indices: NDArray[np.int64]  # (n,) requests as the view numbers them
    num_scheduled_tokens: NDArray[np.int64]  # (n,)
    victims: list[int]
    """Running requests as the view numbers them, in the order in which they are preempted when blocks run out."""
    refusals: list[Refusal] = field(default_factory=list)
    """Waiting requests that the policy refuses; none of them has a grant."""


class PlanLimits(NamedTuple):
    """What a plan for a view is made from, and checked against. The engine's are arrays of its own, of which the view
    has copies: whatever the policy does to the view, the check is right."""

    running: NDArray[np.int64]  # (num_running,) tokens that each request has left to compute
    waiting: NDArray[np.int64]  # (num_waiting,) the same of those that wait
    num_free_rows: int
    token_budget: int
    chunked_prefill: bool

    @classmethod
    def from_view(cls, view: StepView) -> PlanLimits:
        """Those of a view, in arrays of their own."""
        limits = cls.of_view(view)
        return limits._replace(running=limits.running.copy(), waiting=limits.waiting.copy())

    @classmethod
    def of_view(cls, view: StepView) -> PlanLimits:
        """Those of a view, in the view's own arrays."""
        running, waiting = view.running.num_remaining_tokens, view.waiting.num_remaining_tokens
        return cls(running, waiting, view.num_free_rows, view.token_budget, view.chunked_prefill)

    def is_same_view(self, other: PlanLimits) -> bool:
        """Whether both were taken of views that show the same: the arrays are the same objects."""
        return (
            self.running is other.running
            and self.waiting is other.waiting
            and self.num_free_rows == other.num_free_rows
            and self.token_budget == other.token_budget
            and self.chunked_prefill == other.chunked_prefill
        )


def check_grants(grants: object, limits: PlanLimits) -> CheckedPlan | str:
    """The grants cut to what is possible; or, if they break the contract, a text that says how."""
    if not isinstance(grants, Grants):
        return f"schedule returned {type(grants).__name__}, not Grants"
    num_running, num_waiting = len(limits.running), len(limits.waiting)
    if not _is_column(indices := grants.request_indices):
        return f"Grants.request_indices is {indices!r}, not a one-dimensional array of integers"
    if not _is_column(tokens := grants.num_scheduled_tokens):
        return f"Grants.num_scheduled_tokens is {tokens!r}, not a one-dimensional array of integers"
    indices, tokens = np.asarray(indices, np.int64), np.asarray(tokens, np.int64)
    if len(indices) != len(tokens):
        return f"Grants has {len(indices)} request_indices and {len(tokens)} num_scheduled_tokens"
    refusals = _check_refusals(grants.refusals, num_running, num_waiting) if grants.refusals != [] else []
    if isinstance(refusals, str):
        return refusals
    if not len(indices):
        return CheckedPlan(indices, tokens, [], refusals)
    # Below 0 is above all others as an unsigned number.
    if np.maximum.reduce(indices.view(np.uint64)) >= num_running + num_waiting:
        low, high = indices.min(), indices.max()
        return f"Grants.request_indices must lie in 0..{num_running + num_waiting - 1}, got {low}..{high}"
    is_granted = np.zeros(num_running + num_waiting, bool)
    is_granted[indices] = True
    if np.count_nonzero(is_granted) < len(indices):
        return f"Grants.request_indices names request {np.bincount(indices).argmax()} twice"
    if (lowest := np.minimum.reduce(tokens)) < 0:
        return f"Grants.num_scheduled_tokens must not be negative, got {lowest}"
    victims = [] if grants.victims is None else _check_victims(grants.victims, num_running)
    if isinstance(victims, str):
        return victims
    if refusals:
        is_refused = np.isin(indices, [refusal.request_index for refusal in refusals])
        indices, tokens = indices[~is_refused], tokens[~is_refused]

    # From here on, what is too much is cut: to what each request has left to compute ...
    remaining = np.concatenate((limits.running, limits.waiting)) if num_waiting else limits.running
    wanted = remaining.take(indices)
    tokens = np.minimum(tokens, wanted)
    # ... to the waiting requests that find a row, in the order of the grants ...
    if num_waiting and np.count_nonzero(is_granted[num_running:]) > limits.num_free_rows:
        is_waiting = indices >= num_running
        tokens = np.where(is_waiting & (np.cumsum(is_waiting & (tokens > 0)) > limits.num_free_rows), 0, tokens)
    # ... to the budget, which the first grants use up ...
    if np.add.reduce(tokens) > limits.token_budget:
        tokens = np.minimum(np.maximum(limits.token_budget - (tokens.cumsum() - tokens), 0), tokens)
    # ... and, where prompts cannot be computed in parts, to whole ones.
    if not limits.chunked_prefill:
        tokens = np.where(tokens == wanted, tokens, 0)
    if np.count_nonzero(tokens) < len(tokens):
        indices, tokens = indices[keep := tokens > 0], tokens[keep]
    return CheckedPlan(indices, tokens, victims, refusals)


def _is_column(column: object) -> TypeGuard[NDArray[np.int64]]:
    return isinstance(column, np.ndarray) and column.ndim == 1 and column.dtype.kind in "iu"


def _check_victims(victims: object, num_running: int) -> list[int] | str:
    if not _is_column(victims):
        return f"Grants.victims is {victims!r}, not a one-dimensional array of integers"
    if len(victims) and (victims.min() < 0 or victims.max() >= num_running):
        return f"Grants.victims must lie in 0..{num_running - 1}, got {victims.min()}..{victims.max()}"
    checked: list[int] = victims.tolist()
    return checked


def _check_refusals(refusals: object, num_running: int, num_waiting: int) -> list[Refusal] | str:
    if not isinstance(refusals, list):
        return f"Grants.refusals is {refusals!r:.100}, not a list; call refuse"
    checked: dict[int, Refusal] = {}
    for refusal in refusals:
        if not isinstance(refusal, tuple) or len(refusal) != 2 or not isinstance(refusal[0], int | np.integer):
            return f"Grants.refusals holds {refusal!r:.100}, not a request and a reason; call refuse"
        index = int(refusal[0])
        if not num_running <= index < num_running + num_waiting:
            return f"Grants.refuse takes a waiting request, {num_running}..{num_running + num_waiting - 1}, got {index}"
        checked[index] = Refusal(index, str(refusal[1]))
    return list(checked.values())
