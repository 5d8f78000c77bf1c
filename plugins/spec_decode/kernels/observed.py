"""The lines of a step that a head observes, in one launch: a program for each."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["observed"]


def observed(
    start: Tensor, rows: Tensor, positions: Tensor, num_tokens: Tensor, token_ids: Tensor, following: Tensor,
    last: Tensor,
) -> None:  # fmt: skip
    """As ``quire.plugins.spec_decode.observed.observed``, into ``following`` and ``last``."""
    _observed_kernel[(len(positions),)](
        start, rows, positions, num_tokens, token_ids, following, last,
        len(rows), len(rows).bit_length(), token_ids.stride(0), token_ids.shape[1] - 1, num_warps=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_reqs", "halvings", "token_stride", "last_token"])
def _observed_kernel(
    start_ptr, row_ptr, position_ptr, num_tokens_ptr, token_ids_ptr, following_ptr, last_ptr,
    num_reqs, halvings, token_stride, last_token,
):  # fmt: skip
    line = tl.program_id(0)
    request, beyond = 0, num_reqs
    for _ in range(halvings):
        middle = (request + beyond) // 2
        mine = tl.load(start_ptr + middle) <= line
        request = tl.where(mine, middle, request)
        beyond = tl.where(mine, beyond, middle)
    row = tl.load(row_ptr + request)
    position = tl.load(position_ptr + line)
    token = tl.load(token_ids_ptr + row * token_stride + tl.minimum(position + 1, last_token))
    tl.store(following_ptr + line, token)
    first, end = tl.load(start_ptr + request), tl.load(start_ptr + request + 1)
    if line == first:
        reached = first + tl.load(num_tokens_ptr + row) - 2 - position
        tl.store(last_ptr + request, tl.minimum(tl.maximum(reached, first), end - 1).to(tl.int64))
