"""The kernels of ``draft_inputs``: a program for each token, which reads a few integers and writes a few."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quire.sdk import SamplingTable, StepTokens, TargetState

__all__ = ["launch_build_pass_inputs", "launch_gather_next_tokens"]


def launch_build_pass_inputs(
    target: TargetState,
    rows: Tensor,
    block_table: Tensor,
    draft_token_ids: Tensor | None,
    *,
    num_ahead: int,
    query_len: int,
    input_ids: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    seq_lens: Tensor,
    next_positions: Tensor,
) -> None:
    """As ``build_pass_inputs``, into the tensors of a ``DraftPassInputs``."""
    table = target.table
    _build_pass_inputs_kernel[(len(rows) * query_len,)](
        rows,
        table.num_tokens,
        table.token_ids,
        block_table,
        table.token_ids if draft_token_ids is None else draft_token_ids,
        input_ids,
        positions,
        slot_mapping,
        seq_lens,
        next_positions,
        table.token_ids.stride(0),
        block_table.stride(0),
        block_table.shape[1] - 1,
        target.max_model_len - 1,
        num_ahead,
        query_len=query_len,
        block_size=target.block_size,
        has_draft_tokens=draft_token_ids is not None,
        num_warps=1,
    )


def launch_gather_next_tokens(
    step: StepTokens, table: SamplingTable, next_token_ids: Tensor, last_token_indices: Tensor
) -> None:
    """As ``gather_next_tokens``, into the tensors of a ``NextTokens``."""
    num_reqs = len(step.rows)
    _gather_next_tokens_kernel[(len(step.positions),)](
        step.batch.query_start_loc,
        step.rows,
        step.positions,
        table.num_tokens,
        table.token_ids,
        next_token_ids,
        last_token_indices,
        num_reqs,
        num_reqs.bit_length(),
        table.token_ids.stride(0),
        table.token_ids.shape[1] - 1,
        num_warps=1,
    )


@triton.jit(do_not_specialize=["token_stride", "block_stride", "last_block", "last_position", "num_ahead"])
def _build_pass_inputs_kernel(
    rows_ptr,  # (n,) int64
    num_tokens_ptr,  # by table row
    token_ids_ptr,  # by table row
    block_table_ptr,  # (n, max_blocks) int32
    draft_token_ids_ptr,  # (n,) int32, where has_draft_tokens
    input_ids_ptr,
    positions_ptr,
    slot_mapping_ptr,
    seq_lens_ptr,
    next_positions_ptr,
    token_stride,
    block_stride,
    last_block,
    last_position,
    num_ahead,
    query_len: tl.constexpr,
    block_size: tl.constexpr,
    has_draft_tokens: tl.constexpr,
):
    token_index = tl.program_id(0)
    request = token_index // query_len
    row = tl.load(rows_ptr + request)
    seq_len = tl.maximum(tl.load(num_tokens_ptr + row), 2) + num_ahead
    position = seq_len - query_len + token_index % query_len
    if has_draft_tokens:
        token = tl.load(draft_token_ids_ptr + request)
    else:
        token = tl.load(token_ids_ptr + row * token_stride + position)
    # A position beyond the request's blocks takes an entry of its last column: padding, or a draft that is cut off.
    block = tl.load(block_table_ptr + request * block_stride + tl.minimum(position // block_size, last_block))
    tl.store(input_ids_ptr + token_index, token)
    tl.store(positions_ptr + token_index, tl.minimum(position, last_position).to(tl.int64))
    tl.store(slot_mapping_ptr + token_index, block.to(tl.int64) * block_size + position % block_size)
    if token_index % query_len == 0:  # one program of each request
        tl.store(seq_lens_ptr + request, seq_len)
        tl.store(next_positions_ptr + request, seq_len.to(tl.int64))


@triton.jit(do_not_specialize=["num_reqs", "num_halvings", "token_stride", "last_position"])
def _gather_next_tokens_kernel(
    query_start_ptr,  # (num_reqs + 1,) int32
    rows_ptr,  # (num_reqs,) int64
    positions_ptr,  # (num_tokens,) int64
    num_tokens_ptr,  # by table row
    token_ids_ptr,  # by table row
    next_token_ids_ptr,
    last_token_indices_ptr,
    num_reqs,
    num_halvings,  # enough for a bisection of num_reqs
    token_stride,
    last_position,
):
    token_index = tl.program_id(0)
    request, request_end = 0, num_reqs
    for _ in range(num_halvings):  # the last request that begins at or before the token
        middle = (request + request_end) // 2
        begins_before = tl.load(query_start_ptr + middle) <= token_index
        request = tl.where(begins_before, middle, request)
        request_end = tl.where(begins_before, request_end, middle)
    row = tl.load(rows_ptr + request)
    position = tl.load(positions_ptr + token_index)
    next_token = tl.load(token_ids_ptr + row * token_stride + tl.minimum(position + 1, last_position))
    tl.store(next_token_ids_ptr + token_index, next_token)
    start, end = tl.load(query_start_ptr + request), tl.load(query_start_ptr + request + 1)
    if token_index == start:  # one program of each request
        last = start + tl.load(num_tokens_ptr + row) - 2 - position
        tl.store(last_token_indices_ptr + request, tl.minimum(tl.maximum(last, start), end - 1).to(tl.int64))
