"""Inputs of a pass of a drafting model in one launch: a program for each of its tokens."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["pass_inputs"]


def pass_inputs(
    rows: Tensor,
    num_tokens: Tensor,
    token_ids: Tensor,
    blocks: Tensor,
    drawn: Tensor | None,
    out: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    *,
    ahead: int,
    queries: int,
    block_size: int,
    longest: int,
) -> None:
    """As ``quire.plugins.spec_decode.pass_inputs.pass_inputs``, into ``out``."""
    _pass_inputs_kernel[(len(rows) * queries,)](
        rows, num_tokens, token_ids, blocks, token_ids if drawn is None else drawn, *out,
        token_ids.stride(0), blocks.stride(0), blocks.shape[1] - 1, longest - 1, ahead,
        queries=queries, block_size=block_size, has_drawn=drawn is not None, num_warps=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["token_stride", "block_stride", "last_block", "last_position", "ahead"])
def _pass_inputs_kernel(
    rows_ptr, num_tokens_ptr, token_ids_ptr, blocks_ptr, drawn_ptr,
    token_ptr, position_ptr, slot_ptr, length_ptr, next_ptr,
    token_stride, block_stride, last_block, last_position, ahead,
    queries: tl.constexpr, block_size: tl.constexpr, has_drawn: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0)
    request = line // queries
    row = tl.load(rows_ptr + request)
    length = tl.maximum(tl.load(num_tokens_ptr + row), 2) + ahead
    position = length - queries + line % queries
    if has_drawn:
        token = tl.load(drawn_ptr + request)
    else:
        token = tl.load(token_ids_ptr + row * token_stride + position)
    page = tl.load(blocks_ptr + request * block_stride + tl.minimum(position // block_size, last_block))
    tl.store(token_ptr + line, token)
    tl.store(position_ptr + line, tl.minimum(position, last_position).to(tl.int64))
    tl.store(slot_ptr + line, page.to(tl.int64) * block_size + position % block_size)
    if line % queries == 0:
        tl.store(length_ptr + request, length)
        tl.store(next_ptr + request, length.to(tl.int64))
