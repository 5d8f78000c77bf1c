"""What a drafting model reads in a pass: the newest tokens of each request, or the draft that it drew last."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quire.sdk import AttentionBatch, ForwardContext, GraphKey, TargetState

__all__ = ["PassInputs", "context_of", "pass_inputs", "planned", "planned_pass"]


@dataclass(frozen=True, slots=True)
class PassInputs:
    """Tokens of ``n`` requests, as many for each."""

    tokens: Tensor  # (n * queries,) int32
    positions: Tensor  # (n * queries,) int64, within the model's length
    slots: Tensor  # (n * queries,) int64: what lies beyond a request's blocks goes to the padding block
    lengths: Tensor  # (n,) int32, with these tokens
    next: Tensor  # (n,) int64: the place of the token to draw


def pass_inputs(
    target: TargetState, rows: Tensor, blocks: Tensor, *, ahead: int, queries: int, drawn: Tensor | None = None
) -> PassInputs:
    """The last ``queries`` of the tokens of ``rows`` (n,) int64, with ``ahead`` drafts behind those in the table.

    ``blocks`` (n, max_blocks) int32 are theirs. With ``drawn`` (n,) int32 that is the one token. Padding has no token;
    it is given two.
    """
    table, size, longest = target.table, target.block_size, target.max_model_len
    if rows.is_cuda:
        from quire.plugins.spec_decode.kernels.pass_inputs import pass_inputs as launch

        n = len(rows)
        # zeros: they are looked up in the embedding also where kernels are only compiled
        tokens = rows.new_zeros(n * queries, dtype=torch.int32) if drawn is None else drawn
        out = (
            tokens, rows.new_empty(n * queries), rows.new_empty(n * queries),
            rows.new_empty(n, dtype=torch.int32), rows.new_empty(n),
        )  # fmt: skip
        launch(
            rows, table.num_tokens, table.token_ids, blocks, drawn, out,
            ahead=ahead, queries=queries, block_size=size, longest=longest,
        )  # fmt: skip
        return PassInputs(*out)
    length = table.num_tokens[rows].long().clamp(min=2) + ahead
    positions = length[:, None] + torch.arange(-queries, 0, device=rows.device)  # (n, queries)
    tokens = table.token_ids[rows[:, None], positions].flatten() if drawn is None else drawn
    pages = blocks.gather(1, (positions // size).clamp(max=blocks.shape[1] - 1)).long()
    slots = (pages * size + positions % size).flatten()
    return PassInputs(tokens, positions.flatten().clamp(max=longest - 1), slots, length.int(), length)


def planned_pass(
    target: TargetState, inputs: PassInputs, blocks: Tensor, starts: Tensor, queries: int
) -> ForwardContext:
    """Plan attention over the inputs and say what layers need. ``starts`` (at least n + 1,) int32: multiples of
    ``queries``."""
    n = len(blocks)
    batch = AttentionBatch(
        query_start_loc=starts[: n + 1],
        seq_lens=inputs.lengths,
        block_table=blocks,
        num_reqs=n,
        num_tokens=n * queries,
        max_query_len=queries,
        max_seq_len=target.max_model_len,
        num_decodes=n,
        decode_query_len=queries,
    )
    key = GraphKey("decode" if queries == 1 else "verify", n * queries, n)
    return planned(target, inputs.slots, batch, key)


def planned(target: TargetState, slots: Tensor, batch: AttentionBatch, key: GraphKey | None = None) -> ForwardContext:
    """Plan attention of the proposer's layers, and say what they need."""
    for backend in target.backends:
        backend.prepare_metadata(batch, key)
    return context_of(target, slots)


def context_of(target: TargetState, slots: Tensor) -> ForwardContext:
    """What the proposer's layers need of a step whose tokens go to ``slots``."""
    return ForwardContext(target.backends, [slots] * len(target.backends), target.kv, target.group_of)
