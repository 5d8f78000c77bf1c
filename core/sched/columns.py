"""The columns that describe a request to a policy: one layout for the running table and the waiting window."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quire.core.contracts.policy import Columns
from quire.core.request import Request

__all__ = ["VIEW_FIELDS", "as_columns", "describe"]

VIEW_FIELDS = 9
"""computed, known, limit, in flight, prompt_len, max_tokens, priority, arrival_ns, capacity: see ``describe``."""


def describe(request: Request, computed: int, capacity: int) -> tuple[int, ...]:
    """One request as a column. ``known`` counts the tokens in flight; ``limit`` is how many it will ever compute
    (its last token is never fed back); ``capacity`` is how many its blocks have room for."""
    return (
        computed,
        len(request.token_ids) + request.num_in_flight,
        request.max_total_tokens - 1,
        request.num_in_flight,
        request.prompt_len,
        request.max_total_tokens - request.prompt_len,
        request.priority,
        request.arrival_ns,
        capacity,
    )


def as_columns(snapshot: NDArray[np.int64], block_size: int) -> Columns:
    """A view for the policy of a private (VIEW_FIELDS, requests) array, which becomes read-only."""
    computed, known, limit, in_flight, prompt_len, max_tokens, priority, arrival_ns, capacity = snapshot
    remaining = np.minimum(known, limit) - computed
    held = capacity // block_size
    needed = np.maximum((computed + remaining + (block_size - 1)) // block_size - held, 0)
    output_len = known - prompt_len
    for array in (snapshot, remaining, held, needed, output_len):
        array.flags.writeable = False
    computed = snapshot[0]
    return Columns(
        computed, computed, remaining, in_flight, prompt_len, output_len, max_tokens, priority, arrival_ns, held, needed
    )
