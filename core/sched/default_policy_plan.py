"""The plan of a policy that chooses nothing but the order of the queue."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quire.core.contracts.policy_view import Grants, StepView

__all__ = ["MIN_PREFILL_TOKENS", "make_default_plan"]

MIN_PREFILL_TOKENS = 1536
"""Prompt tokens that a step with decodes may compute, unless half of the prompt tokens that remain are more. Enough to
fill a GPU, and one of the sizes for which prompt steps are CUDA graphs: a larger step would only delay the first tokens
of the prompts and the decodes in it. ``docs/performance.md`` has the time to first token with and without it."""


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
    ``token_budget``: spend at most this of the view's. ``victims``: see ``Grants``.
    """
    running = view.running.num_remaining_tokens
    num_running, num_decodes = len(running), int(np.count_nonzero(running == 1))
    num_admitted = min(len(view.waiting if waiting_order is None else waiting_order), view.num_free_rows)
    # Tokens that each request asks for: the running ones, then as many of the waiting ones as have a row.
    indices, tokens = np.arange(num_running + num_admitted), running
    if num_admitted:
        waiting = view.waiting.num_remaining_tokens
        if waiting_order is None:
            waiting = waiting[:num_admitted]
        else:
            first = waiting_order[:num_admitted]
            waiting = waiting.take(first)
            indices[num_running:] = num_running + first
        tokens = np.concatenate((running, waiting))
    if num_decodes < num_running:
        if np.count_nonzero(running) > num_decodes:  # there are running prompts: decodes come before them
            is_decode = tokens == 1
            is_decode[num_running:] = False  # a waiting request with one token keeps its place in the queue
            places = np.concatenate((is_decode.nonzero()[0], (tokens > is_decode).nonzero()[0]))
        else:
            places = tokens.nonzero()[0]
        # 0 tokens: the last ones are in flight, or the request is already served in this step.
        indices, tokens = indices.take(places), tokens.take(places)

    num_wanted = int(np.add.reduce(tokens))
    budget = view.token_budget if token_budget is None else min(token_budget, view.token_budget)
    if num_decodes and view.chunked_prefill:
        budget = min(budget, num_decodes + max(min_prefill_tokens, (num_wanted - num_decodes) // 2))
    if num_wanted > budget:
        uncut = tokens
        # What the requests before each one leave of the budget: the last that gets anything may be cut.
        tokens = np.minimum(np.maximum(budget - (tokens.cumsum() - tokens), 0), tokens)
        last = np.count_nonzero(tokens) - 1
        # Drop that last, cut one if a prompt stands before it and a later step can hold it whole beside the decodes.
        if last > 0 and uncut[last - 1] > 1 and tokens[last] < uncut[last] <= budget - num_decodes:
            tokens[last] = 0
        keep = tokens > 0 if view.chunked_prefill else tokens == uncut
        indices, tokens = indices[keep], tokens[keep]
    return Grants(indices, tokens, victims)
