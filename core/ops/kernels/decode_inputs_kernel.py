"""Inputs of steps whose requests all have as many tokens, built on the device: the host need not know the last tokens.

Algorithm: a program reads its request's row of the request table and writes token ids, positions, KV slots, sequence
length and block table of the step, as ``build_inputs`` does on the host for other steps.

Shapes: ``rows`` (n,) into the table's (rows, ...); the outputs (n * queries,), (n,) and (n, max_blocks).
Grid: ``(n,)``, once for each group of KV-cache layers. One warp: there is next to nothing to compute.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["launch_decode_inputs"]

_BLOCK = 256


def launch_decode_inputs(
    rows: Tensor,
    drafts: Tensor,
    token_ids: Tensor,
    num_computed: Tensor,
    block_table: Tensor,
    input_ids: Tensor,
    positions: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
    batch_blocks: Tensor,
    block_size: int,
    max_model_len: int,
    advance: bool,
) -> None:
    """For request ``i`` in row ``rows[i]``: its next tokens, their positions and slots, its length and block table.

    ``rows`` and ``drafts`` (n,) int64; ``token_ids`` (rows, length), ``num_computed`` (rows,), ``block_table`` (rows,
    max_blocks) int32 are the request table's; the others are written: ``input_ids``, ``positions`` and ``slots``
    (n * queries,), ``seq_lens`` (n,), ``batch_blocks`` (n, max_blocks). A request has its next token and ``drafts``
    more; what is left of its ``queries`` is padding: its slots are in block 0. The last row of the table stands for
    padding: it has one token in block 0 for ever. With ``advance`` one token counts as computed afterwards.
    """
    n = len(rows)
    queries = len(input_ids) // n
    _decode_inputs_kernel[(n,)](
        rows,
        drafts,
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
        max_model_len - 1,
        block_size=block_size,
        advance=advance,
        block=_BLOCK,
        queries=queries,
        width=triton.next_power_of_2(queries),
        num_warps=1,
    )


@triton.jit
def _decode_inputs_kernel(
    rows_ptr,
    drafts_ptr,
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
    last_position,
    block_size: tl.constexpr,
    advance: tl.constexpr,
    block: tl.constexpr,
    queries: tl.constexpr,
    width: tl.constexpr,
):
    request = tl.program_id(0)
    row = tl.load(rows_ptr + request)
    real = row != padding_row
    computed = tl.where(real, tl.load(computed_ptr + row), 0)
    place = tl.arange(0, width)
    inside = place < queries
    granted = place < 1
    if queries > 1:
        granted = inside & (place <= tl.load(drafts_ptr + request))
    at = computed + place
    line = request * queries + place
    tl.store(input_ptr + line, tl.load(token_ptr + row * token_stride + at, mask=granted, other=0), mask=inside)
    tl.store(position_ptr + line, tl.minimum(at, last_position).to(tl.int64), mask=inside)
    tl.store(seq_len_ptr + request, computed + queries)
    page = tl.load(table_ptr + row * table_stride + at // block_size, mask=granted, other=0)
    tl.store(slot_ptr + line, page.to(tl.int64) * block_size + at % block_size, mask=inside)
    num_blocks = (computed + queries - 1) // block_size + 1
    for first in range(0, num_blocks, block):
        at_block = first + tl.arange(0, block)
        known = at_block < num_blocks
        pages = tl.load(table_ptr + row * table_stride + at_block, mask=known, other=0)
        tl.store(batch_ptr + request.to(tl.int64) * batch_stride + at_block, pages, mask=known)
    if advance:
        tl.store(computed_ptr + row, computed + 1, mask=real)
