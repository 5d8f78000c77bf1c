"""Inputs of a decode step, built on the device: one program a request, one kernel a group of layers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["decode_inputs"]

_BLOCK = 256


def decode_inputs(
    rows: Tensor,
    token_ids: Tensor,
    num_computed: Tensor,
    block_table: Tensor,
    input_ids: Tensor,
    positions: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
    batch_blocks: Tensor,
    block_size: int,
    advance: bool,
) -> None:
    """For request ``i`` in row ``rows[i]``: its next token and position, its length, its slot and its block table.

    ``rows`` (n,) int64; ``token_ids`` (rows, length), ``num_computed`` (rows,), ``block_table`` (rows, max_blocks)
    int32 are the request table's; the others (n,) or (n, max_blocks) are written. The last row of the table stands for
    padding: it has one token in block 0 for ever. With ``advance`` the token counts as computed afterwards.
    """
    _decode_inputs_kernel[(len(rows),)](
        rows,
        token_ids,
        num_computed,
        block_table,
        input_ids,
        positions,
        seq_lens,
        slots,
        batch_blocks,
        token_ids.stride(0),
        block_table.stride(0),
        batch_blocks.stride(0),
        len(num_computed) - 1,
        block_size=block_size,
        advance=advance,
        block=_BLOCK,
        num_warps=1,
    )


@triton.jit
def _decode_inputs_kernel(
    rows_ptr,
    token_ptr,
    computed_ptr,
    table_ptr,
    input_ptr,
    position_ptr,
    seq_len_ptr,
    slot_ptr,
    batch_ptr,
    token_stride,
    table_stride,
    batch_stride,
    padding_row,
    block_size: tl.constexpr,
    advance: tl.constexpr,
    block: tl.constexpr,
):
    request = tl.program_id(0)
    row = tl.load(rows_ptr + request)
    real = row != padding_row
    computed = tl.where(real, tl.load(computed_ptr + row), 0)
    tl.store(input_ptr + request, tl.load(token_ptr + row * token_stride + computed))
    tl.store(position_ptr + request, computed.to(tl.int64))
    tl.store(seq_len_ptr + request, computed + 1)
    page = tl.load(table_ptr + row * table_stride + computed // block_size)
    tl.store(slot_ptr + request, page.to(tl.int64) * block_size + computed % block_size)
    num_blocks = computed // block_size + 1
    for first in range(0, num_blocks, block):
        at = first + tl.arange(0, block)
        inside = at < num_blocks
        pages = tl.load(table_ptr + row * table_stride + at, mask=inside, other=0)
        tl.store(batch_ptr + request.to(tl.int64) * batch_stride + at, pages, mask=inside)
    if advance:
        tl.store(computed_ptr + row, computed + 1, mask=real)
