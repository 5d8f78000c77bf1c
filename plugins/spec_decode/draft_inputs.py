"""Inputs of a draft model's forward passes, and what they are computed from, by table row of each request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from quire.sdk import AttentionBatch, ForwardContext, GraphKey, SamplingTable, StepTokens, TargetState

__all__ = [
    "DraftPassInputs",
    "NextTokens",
    "build_forward_context",
    "build_pass_inputs",
    "gather_next_tokens",
    "prepare_draft_pass",
    "prepare_forward",
]


@dataclass(frozen=True, slots=True)
class DraftPassInputs:
    """Inputs of a pass over ``n`` requests with ``query_len`` tokens each."""

    input_ids: Tensor  # (n * query_len,) int32
    positions: Tensor  # (n * query_len,) int64, below max_model_len
    slot_mapping: Tensor  # (n * query_len,) int64
    seq_lens: Tensor  # (n,) int32, these tokens included
    next_positions: Tensor  # (n,) int64: of the token that the pass predicts


def build_pass_inputs(
    target: TargetState,
    rows: Tensor,
    block_table: Tensor,
    *,
    num_ahead: int,
    query_len: int,
    draft_token_ids: Tensor | None = None,
) -> DraftPassInputs:
    """The last ``query_len`` tokens of the requests in table ``rows`` (n,) int64, ``num_ahead`` positions further than
    the tokens in the table.

    ``block_table`` (n, max_blocks) int32 is theirs; what lies beyond their blocks goes to a slot that padding may use.
    The tokens are those of the table, or ``draft_token_ids`` (n,) int32 with ``query_len`` 1. A request needs two
    tokens: padding, which has none, counts as having two. On a GPU one launch.
    """
    table, block_size, max_model_len = target.table, target.block_size, target.max_model_len
    if rows.is_cuda:
        from quire.plugins.spec_decode.draft_inputs_kernel import launch_build_pass_inputs

        n = len(rows)
        # zeros: they are looked up in the embedding also where kernels are only compiled
        input_ids = rows.new_zeros(n * query_len, dtype=torch.int32) if draft_token_ids is None else draft_token_ids
        inputs = DraftPassInputs(
            input_ids=input_ids,
            positions=rows.new_empty(n * query_len),
            slot_mapping=rows.new_empty(n * query_len),
            seq_lens=rows.new_empty(n, dtype=torch.int32),
            next_positions=rows.new_empty(n),
        )
        launch_build_pass_inputs(
            target,
            rows,
            block_table,
            draft_token_ids,
            num_ahead=num_ahead,
            query_len=query_len,
            input_ids=inputs.input_ids,
            positions=inputs.positions,
            slot_mapping=inputs.slot_mapping,
            seq_lens=inputs.seq_lens,
            next_positions=inputs.next_positions,
        )
        return inputs
    seq_lens = table.num_tokens[rows].long().clamp(min=2) + num_ahead
    positions = seq_lens[:, None] + torch.arange(-query_len, 0, device=rows.device)  # (n, query_len)
    input_ids = table.token_ids[rows[:, None], positions].flatten() if draft_token_ids is None else draft_token_ids
    blocks = block_table.gather(1, (positions // block_size).clamp(max=block_table.shape[1] - 1)).long()
    slot_mapping = (blocks * block_size + positions % block_size).flatten()
    positions = positions.flatten().clamp(max=max_model_len - 1)
    return DraftPassInputs(input_ids, positions, slot_mapping, seq_lens.int(), seq_lens)


class NextTokens(NamedTuple):
    """What a proposer that observes every step reads of it beside the inputs."""

    token_ids: Tensor  # (num_tokens,) int32: the token after each of the step's, sampled ones among them
    last_token_indices: Tensor  # (num_reqs,) int64
    """In the step, of each request's last token but one of all, or of its last in the step where that comes later."""


def gather_next_tokens(step: StepTokens, table: SamplingTable) -> NextTokens:
    """Look up, in the request table, what follows the tokens of ``step``. On a GPU one launch."""
    rows, query_start_loc, positions = step.rows, step.batch.query_start_loc, step.positions
    if positions.is_cuda:
        from quire.plugins.spec_decode.draft_inputs_kernel import launch_gather_next_tokens

        # zeros: both are indexed with also where kernels are only compiled
        next_tokens = NextTokens(positions.new_zeros(len(positions), dtype=torch.int32), positions.new_zeros(len(rows)))
        launch_gather_next_tokens(step, table, next_tokens.token_ids, next_tokens.last_token_indices)
        return next_tokens
    token_index = torch.arange(len(positions), dtype=query_start_loc.dtype, device=query_start_loc.device)
    request = torch.searchsorted(query_start_loc[1:], token_index, right=True).clamp(max=len(rows) - 1)
    next_position = (positions + 1).clamp(max=table.token_ids.shape[1] - 1)
    start, end = query_start_loc[:-1].long(), query_start_loc[1:].long()
    last = start + table.num_tokens[rows] - 2 - positions[start]
    return NextTokens(table.token_ids[rows[request], next_position], last.clamp(min=start, max=end - 1))


def prepare_draft_pass(
    target: TargetState, inputs: DraftPassInputs, block_table: Tensor, query_start_loc: Tensor, query_len: int
) -> ForwardContext:
    """Prepare attention over the inputs. ``query_start_loc`` (at least n + 1,) int32 holds multiples of
    ``query_len``."""
    n = len(block_table)
    batch = AttentionBatch(
        query_start_loc=query_start_loc[: n + 1],
        seq_lens=inputs.seq_lens,
        block_table=block_table,
        num_reqs=n,
        num_tokens=n * query_len,
        max_query_len=query_len,
        max_seq_len=target.max_model_len,
        num_decodes=n,
        decode_query_len=query_len,
    )
    key = GraphKey("decode" if query_len == 1 else "verify", n * query_len, n)
    return prepare_forward(target, inputs.slot_mapping, batch, key)


def prepare_forward(
    target: TargetState, slot_mapping: Tensor, batch: AttentionBatch, key: GraphKey | None = None
) -> ForwardContext:
    """Prepare the attention metadata of the proposer's layers for ``batch``, and build their context."""
    for backend in target.backends:
        backend.prepare_metadata(batch, key)
    return build_forward_context(target, slot_mapping)


def build_forward_context(target: TargetState, slot_mapping: Tensor) -> ForwardContext:
    """The context of the proposer's layers for a step whose keys and values go to ``slot_mapping``."""
    return ForwardContext(target.backends, [slot_mapping] * len(target.backends), target.kv, target.group_of)
