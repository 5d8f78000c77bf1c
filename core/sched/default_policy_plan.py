"""The plan of a policy that chooses nothing but the order of the queue."""

from __future__ import annotations

from operator import index
from typing import NamedTuple, TypeGuard

import numpy as np
from numpy.typing import NDArray

from quire.core.contracts.policy_view import Grants, Refusal, StepView
from quire.core.sched.checked_plan import CheckedPlan, PlanLimits, check_grants

__all__ = ["MIN_PREFILL_TOKENS", "DefaultPlan", "check_order", "check_plan", "fill_step", "make_default_plan"]

MIN_PREFILL_TOKENS = 1536
"""Prompt tokens that a step with decodes may compute, unless half of the prompt tokens that remain are more. Enough to
fill a GPU, and one of the sizes for which prompt steps are CUDA graphs: a larger step would only delay the first tokens
of the prompts and the decodes in it. ``docs/performance.md`` has the time to first token with and without it."""

_INT_OR_NONE = (int, type(None))


def make_default_plan(
    view: StepView,
    *,
    waiting_order: NDArray[np.int64] | None = None,
    token_budget: int | None = None,
    min_prefill_tokens: int = MIN_PREFILL_TOKENS,
    victims: NDArray[np.int64] | None = None,
) -> Grants:
    """Decodes first, then running prompts, then waiting requests in key order, each cut to what the budget leaves.

    A prompt's first token leaves with the step that computes the prompt's last token. So few prompts share a step with
    decodes: no prompt waits for the ones behind it (``min_prefill_tokens``). Of a long queue, half is computed at once,
    which costs the decodes less than many steps would. A prompt is not cut beside another prompt if a step of its own
    would hold it whole: begun now, it would end no sooner, and the prompt before it later.

    ``waiting_order``: indices into ``view.waiting`` in the order in which these are admitted; what is left out waits.
    ``token_budget``: spend at most this of the view's. ``victims``: see ``Grants``. The plan is that of the view as it
    is now, and is made when it is first read. One that ``schedule`` returns unread costs least, because the engine
    makes it from its own numbers and need not check it, if the view is the engine's and shows what it showed.
    """
    plan = DefaultPlan.from_source(
        _PlanSource(PlanLimits.of_view(view), waiting_order, token_budget, min_prefill_tokens)
    )
    plan.victims = victims
    if victims is not None or (waiting_order is not None and not _is_order(waiting_order)):
        plan.make()  # what is wrong shows here, or when the plan is checked
    return plan


def check_order(order: object, limits: PlanLimits) -> NDArray[np.int64] | None:
    """The waiting requests that are admitted in this order, if all can be, in an array of their own. None if one is no
    waiting request, or is named twice, or if it is no array of indices."""
    if not _is_order(order):
        return None
    first: NDArray[np.int64] = order[: limits.num_free_rows].astype(np.int64)
    indices = first.tolist()
    if indices and (min(indices) < 0 or max(indices) >= len(limits.waiting) or len(set(indices)) < len(indices)):
        return None
    return first


def check_plan(returned: object, seen: PlanLimits, limits: PlanLimits) -> CheckedPlan | str:
    """As ``check_grants``, but a default plan that needs no check is made from ``limits``. ``seen``: those of the view
    that the policy was given, in its arrays."""
    if type(returned) is DefaultPlan and (trusted := returned.make_trusted(seen, limits)) is not None:
        return CheckedPlan(*trusted, [])
    return check_grants(returned, limits)


class _PlanSource(NamedTuple):
    """What a default plan is made from."""

    limits: PlanLimits
    waiting_order: NDArray[np.int64] | None
    token_budget: int | None
    min_prefill_tokens: int


class DefaultPlan(Grants):
    """What ``make_default_plan`` returns. The plan is made when it is first read. One that a policy returns unread is
    made by the engine, from numbers that the policy had no access to, and so needs no check. Copies are ``Grants``."""

    __slots__ = ("_plan", "_source")
    _source: _PlanSource | None
    _plan: list[NDArray[np.int64]] | None

    def __init__(
        self,
        request_indices: NDArray[np.int64],
        num_scheduled_tokens: NDArray[np.int64],
        victims: NDArray[np.int64] | None = None,
        refusals: list[Refusal] | None = None,
    ) -> None:
        """One that is made already, by ``dataclasses.replace``."""
        self._source, self._plan = None, [request_indices, num_scheduled_tokens]
        self.victims, self.refusals = victims, [] if refusals is None else refusals

    @classmethod
    def from_source(cls, source: _PlanSource) -> DefaultPlan:
        """One that is made when it is first read."""
        plan = cls.__new__(cls)
        plan._source, plan._plan = source, None
        plan.victims, plan.refusals = None, []
        return plan

    def __reduce__(self) -> tuple[type[Grants], tuple[object, ...]]:
        return Grants, (self.request_indices, self.num_scheduled_tokens, self.victims, self.refusals)

    def make(self) -> list[NDArray[np.int64]]:
        """Requests and their tokens, from the view."""
        if self._plan is None:
            assert self._source is not None
            limits, order, budget, min_prefill_tokens = self._source
            first = None if order is None or not len(limits.waiting) else _to_indices(order[: limits.num_free_rows])
            indices, tokens = fill_step(limits, first, budget, min_prefill_tokens)
            self._plan, self._source = [indices, tokens.copy()], None
        return self._plan

    def make_trusted(self, seen: PlanLimits, limits: PlanLimits) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """The plan from ``limits``, which is what the engine knows of the view. None if it has to be checked: it was
        read, so that it may have been changed; it is for another view, or for one that the policy has changed; or it
        has more in it than an order of the waiting requests."""
        if self._source is None or self._plan is not None or self.refusals or self.victims is not None:
            return None
        planned, order, budget, min_prefill_tokens = self._source
        if type(min_prefill_tokens) is not int or type(budget) not in _INT_OR_NONE or not planned.is_same_view(seen):
            return None
        if order is None:
            return fill_step(limits, None, budget, min_prefill_tokens)
        first = check_order(order, limits)
        return None if first is None else fill_step(limits, first, budget, min_prefill_tokens)

    @property
    def request_indices(self) -> NDArray[np.int64]:
        """See ``Grants``."""
        return self.make()[0]

    @request_indices.setter
    def request_indices(self, indices: NDArray[np.int64]) -> None:
        self.make()[0] = indices

    @property
    def num_scheduled_tokens(self) -> NDArray[np.int64]:
        """See ``Grants``."""
        return self.make()[1]

    @num_scheduled_tokens.setter
    def num_scheduled_tokens(self, tokens: NDArray[np.int64]) -> None:
        self.make()[1] = tokens


def fill_step(
    limits: PlanLimits,
    first: NDArray[np.int64] | None = None,
    token_budget: int | None = None,
    min_prefill_tokens: int = MIN_PREFILL_TOKENS,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Requests and their tokens: see ``make_default_plan``. ``first``: the waiting requests that are admitted, in
    order, no more than there are free rows; None: those that come first. What is returned may be ``limits.running``."""
    running, waiting = limits.running, limits.waiting
    num_wanted = num_decodes = num_runnable = int(np.count_nonzero(running))
    if num_runnable == len(running):
        indices, tokens = np.arange(num_runnable), running
    else:  # the others have their last token in flight, or are served in this step already
        indices = running.nonzero()[0]
        tokens = running.take(indices)
    if num_decodes and tokens.item(tokens.argmax()) > 1:  # decodes come before running prompts
        num_wanted = int(np.add.reduce(tokens))
        is_decode = tokens == 1
        num_decodes = int(np.count_nonzero(is_decode))
        order = np.concatenate((is_decode.nonzero()[0], (~is_decode).nonzero()[0]))
        indices, tokens = indices.take(order), tokens.take(order)
    if len(waiting) and limits.num_free_rows:
        if first is None:
            first_tokens = waiting[: limits.num_free_rows]
            admitted = np.arange(len(running), len(running) + len(first_tokens))
        else:
            first_tokens, admitted = waiting.take(first), first + len(running)
        wanted = first_tokens.tolist()
        num_wanted += sum(wanted)
        indices, tokens = np.concatenate((indices, admitted)), np.concatenate((tokens, first_tokens))
        if 0 in wanted:
            has_tokens = tokens > 0
            indices, tokens = indices[has_tokens], tokens[has_tokens]

    budget = limits.token_budget if token_budget is None else max(min(token_budget, limits.token_budget), 0)
    if num_decodes and limits.chunked_prefill:
        budget = min(budget, num_decodes + max(min_prefill_tokens, (num_wanted - num_decodes) // 2))
    if num_wanted > budget:
        uncut = tokens
        # What the requests before each one leave of the budget: the last that gets anything may be cut.
        tokens = np.minimum(np.maximum(budget - (tokens.cumsum() - tokens), 0), tokens)
        last = np.count_nonzero(tokens) - 1
        # Drop that last, cut one if a prompt stands before it and a later step can hold it whole beside the decodes.
        if last > 0 and uncut[last - 1] > 1 and tokens[last] < uncut[last] <= budget - num_decodes:
            tokens[last] = 0
        keep = tokens > 0 if limits.chunked_prefill else tokens == uncut
        indices, tokens = indices[keep], tokens[keep]
    return indices, tokens


def _to_indices(order: NDArray[np.int64] | list[int]) -> NDArray[np.int64]:
    """As an array of int64. Raises ``TypeError`` for what is no number of a request."""
    return np.array([*map(index, order if isinstance(order, list) else order.tolist())], np.int64)


def _is_order(order: object) -> TypeGuard[NDArray[np.int64]]:
    """Of the very type: a subclass (a masked array) may give other than it holds. An empty one has any dtype, as
    ``np.array([])`` does."""
    return type(order) is np.ndarray and order.ndim == 1 and (order.dtype.kind in "iu" or not order.size)
