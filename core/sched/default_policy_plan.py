"""The plan of a policy that chooses nothing but the order of the queue."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quire.core.contracts.policy_view import Grants, StepView
from quire.core.sched.checked_plan import PlanLimits

__all__ = ["MIN_PREFILL_TOKENS", "DefaultPlan", "fill_step", "make_default_plan"]

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
    ``token_budget``: spend at most this of the view's. ``victims``: see ``Grants``. The plan is made when it is read:
    one that ``schedule`` returns unread costs least, because the engine makes it from its own numbers and need not
    check it.
    """
    plan = DefaultPlan(view, waiting_order, token_budget, min_prefill_tokens, victims)
    if victims is not None or (waiting_order is not None and not _is_order(waiting_order)):
        plan.make()  # what is wrong shows here, or when the plan is checked
    return plan


class DefaultPlan(Grants):
    """What ``make_default_plan`` returns. The plan is made when it is first read. One that a policy returns unread is
    made by the engine, from numbers that the policy had no access to, and so needs no check."""

    __slots__ = ("_min_prefill_tokens", "_plan", "_token_budget", "_view", "_waiting_order")

    def __init__(
        self,
        view: StepView,
        waiting_order: NDArray[np.int64] | None,
        token_budget: int | None,
        min_prefill_tokens: int,
        victims: NDArray[np.int64] | None,
    ) -> None:
        self._view, self._waiting_order = view, waiting_order
        self._token_budget, self._min_prefill_tokens = token_budget, min_prefill_tokens
        self._plan: list[NDArray[np.int64]] | None = None
        self.victims, self.refusals = victims, []

    def make(self) -> list[NDArray[np.int64]]:
        """Requests and their tokens, from the view."""
        if self._plan is None:
            options = self._token_budget, self._min_prefill_tokens
            self._plan = [*fill_step(PlanLimits.from_view(self._view), self._waiting_order, *options)]
        return self._plan

    def make_trusted(self, limits: PlanLimits) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """The plan from what the engine knows of the view. None if it has to be checked: it was read, so that it may
        have been changed, or it has more in it than an order of the waiting requests."""
        order, budget, min_prefill_tokens = self._waiting_order, self._token_budget, self._min_prefill_tokens
        if self._plan is not None or self.refusals or self.victims is not None:
            return None
        if type(min_prefill_tokens) is not int or type(budget) not in _INT_OR_NONE:
            return None
        if order is not None:
            if not _is_order(order):
                return None
            first = order[: limits.num_free_rows].tolist()
            if len(set(first)) < len(first) or (first and not 0 <= min(first) <= max(first) < len(limits.waiting)):
                return None
        return fill_step(limits, order, budget, min_prefill_tokens)

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
    waiting_order: NDArray[np.int64] | None = None,
    token_budget: int | None = None,
    min_prefill_tokens: int = MIN_PREFILL_TOKENS,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Requests and their tokens: see ``make_default_plan``."""
    running, waiting = limits.running, limits.waiting
    num_running, num_free_rows = len(running), limits.num_free_rows
    num_admitted = min(len(waiting) if waiting_order is None else len(waiting_order), num_free_rows)
    admitted: list[int] = []  # as many of the waiting ones as have a row
    admitted_tokens: list[int] = []
    if num_admitted:
        if waiting_order is None:
            admitted, admitted_tokens = list(range(num_admitted)), waiting[:num_admitted].tolist()
        else:
            admitted = waiting_order[:num_admitted].tolist()
            admitted_tokens = [waiting.item(i) for i in admitted]
        if 0 in admitted_tokens:
            admitted = [i for i, tokens in zip(admitted, admitted_tokens, strict=True) if tokens]
            admitted_tokens = [tokens for tokens in admitted_tokens if tokens]
    # Running ones with 0 tokens have their last in flight, or are served in this step already.
    is_decode = running == 1
    num_decodes = int(np.count_nonzero(is_decode))
    num_others = int(np.count_nonzero(running)) - num_decodes
    num_served = num_decodes + num_others
    num_wanted = num_decodes + sum(admitted_tokens)
    indices = np.empty(num_served + len(admitted_tokens), np.int64)
    tokens = _make_ones(len(indices))
    indices[:num_decodes] = is_decode.nonzero()[0]
    if num_others:  # decodes come before running prompts
        prompts = (running > 1).nonzero()[0]
        indices[num_decodes:num_served] = prompts
        tokens[num_decodes:num_served] = prompt_tokens = running.take(prompts)
        num_wanted += int(np.add.reduce(prompt_tokens))
    for place, (i, num_tokens) in enumerate(zip(admitted, admitted_tokens, strict=True), num_served):
        indices[place], tokens[place] = num_running + i, num_tokens

    budget = limits.token_budget if token_budget is None else min(token_budget, limits.token_budget)
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


_ones = np.ones(1024, np.int64)


def _make_ones(count: int) -> NDArray[np.int64]:
    """Copied, which takes half the time of ``np.ones``."""
    return _ones[:count].copy() if count <= len(_ones) else np.ones(count, np.int64)


def _is_order(order: object) -> bool:
    return isinstance(order, np.ndarray) and order.ndim == 1 and order.dtype.kind in "iu"
