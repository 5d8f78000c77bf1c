"""From a step's grants to the model's inputs, on the device: positions, tokens, slots, lengths."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.core.contracts.attention import AttentionBatch
from quire.core.messages import SchedulerOutput
from quire.core.ops.pinned import copy_to_device
from quire.core.sample.inputs import DraftSpans
from quire.core.worker.request_table import RequestTable

__all__ = ["LogitsIndices", "StepInputs", "build_inputs"]


@dataclass(slots=True)
class LogitsIndices:
    """The lines of logits of a step, on the host: one for each request that draws, and one more for each draft."""

    request_indices: NDArray[np.int64]  # (num_lines,) index into the step's requests
    max_sample_positions: NDArray[
        np.int64
    ]  # (num_lines,) upper bound of where the drawn token goes; exact without drafts
    token_indices: NDArray[np.int64]  # (num_lines,) token of the step whose hidden state predicts the drawn one
    starts: NDArray[np.int64]  # (num_drawing,) first line of each request that draws
    num_drafts: NDArray[np.int64]  # (num_drawing,)

    @classmethod
    def from_step(cls, step: SchedulerOutput) -> LogitsIndices:
        """In the order of the requests."""
        sampling_requests = np.flatnonzero(step.sampling_mask)
        drafts = (
            np.zeros(len(sampling_requests), np.int64)
            if step.num_draft_tokens is None
            else step.num_draft_tokens[sampling_requests].astype(np.int64)
        )
        count = drafts + 1
        first = count.cumsum() - count
        owner = np.repeat(sampling_requests, count)
        behind = np.arange(len(owner)) - np.repeat(first + count, count)  # -count .. -1 within each request
        token = step.num_scheduled_tokens.cumsum()[owner] + behind
        return cls(owner, step.max_seq_lens[owner] + behind + 1, token, first, drafts)


@dataclass(slots=True)
class StepInputs:
    """Everything a forward pass and the sampler need of a step. Device tensors."""

    rows: Tensor  # (num_reqs,) int64
    input_ids: Tensor  # (num_tokens,) int32
    positions: Tensor  # (num_tokens,) int64
    seq_lens: Tensor  # (num_reqs,) int32, the step's tokens included
    query_start_loc: Tensor  # (num_reqs + 1,) int32
    slot_mapping: list[Tensor]  # by group: (num_tokens,) int64
    batches: list[AttentionBatch]  # by group
    logits_table_rows: Tensor  # (num_lines,) int64: row of the request table, for each line of logits
    logits_positions: Tensor  # (num_lines,) int32: tokens before the drawn one, which is also its position
    logits_indices: Tensor  # (num_lines,) int64: token whose hidden state predicts the drawn one
    draft_spans: DraftSpans
    """The lines by request."""


def build_inputs(
    step: SchedulerOutput, logits_indices: LogitsIndices, table: RequestTable, block_size: int
) -> StepInputs:
    """Expand the grants of ``step`` and advance ``table.num_computed_tokens`` past them."""
    device = table.device
    num_reqs, total = len(step.rows), step.total_num_scheduled_tokens
    sampling_requests = logits_indices.request_indices[logits_indices.starts]
    columns = (
        step.rows,
        step.num_scheduled_tokens,
        logits_indices.request_indices,
        logits_indices.token_indices,
        sampling_requests,
        logits_indices.starts,
        logits_indices.num_drafts,
    )
    packed = copy_to_device(np.concatenate(columns, dtype=np.int64), torch.int64, device)
    rows, grants, owners, logits_index, sampling, first, drafts = packed.split([len(column) for column in columns])
    start = torch.zeros(num_reqs + 1, dtype=torch.int64, device=device)
    torch.cumsum(grants, 0, out=start[1:])
    computed = table.num_computed_tokens[rows].long()
    owner = torch.repeat_interleave(torch.arange(num_reqs, device=device), grants, output_size=total)
    positions = computed[owner] + torch.arange(total, device=device) - start[owner]
    token_row = rows[owner]
    seq_lens = (computed + grants).int()
    table.num_computed_tokens[rows] = seq_lens
    start32 = start.int()
    width = -(-step.max_seq_len // block_size)
    max_query_len = int(step.num_scheduled_tokens.max())
    slots, batches = [], []
    for blocks in table.block_tables:
        block = blocks[token_row, positions // block_size].long()
        slots.append(block * block_size + positions % block_size)
        batches.append(
            AttentionBatch(
                query_start_loc=start32,
                seq_lens=seq_lens,
                block_table=blocks[rows, :width],
                num_reqs=num_reqs,
                num_tokens=total,
                max_query_len=max_query_len,
                max_seq_len=step.max_seq_len,
                num_decodes=step.num_decodes,
            )
        )
    return StepInputs(
        rows=rows,
        input_ids=table.token_ids[token_row, positions],
        positions=positions,
        seq_lens=seq_lens,
        query_start_loc=start32,
        slot_mapping=slots,
        batches=batches,
        logits_table_rows=rows[owners],
        logits_positions=positions[logits_index].int() + 1,
        logits_indices=logits_index,
        draft_spans=DraftSpans(rows[sampling], first, drafts, 1 + int(logits_indices.num_drafts.max(initial=0))),
    )
