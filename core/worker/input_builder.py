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
    """The logits rows of a step, on the host: one for each request that samples, and one more for each of its drafts.

    Logits are computed for these rows alone: most tokens of a prompt predict a token that is known.
    """

    request_indices: NDArray[np.int64]  # (num_logits_rows,) index into the step's requests
    max_sample_positions: NDArray[np.int64]
    """(num_logits_rows,) Upper bound of the position of the sampled token; exact without drafts."""
    token_indices: NDArray[np.int64]  # (num_logits_rows,) token of the step whose hidden state gives the row
    starts: NDArray[np.int64]  # (num_sampling_reqs,) first logits row of each request that samples
    num_drafts: NDArray[np.int64]  # (num_sampling_reqs,)

    @classmethod
    def from_step(cls, step: SchedulerOutput) -> LogitsIndices:
        """In the order of the requests."""
        sampling_requests = np.flatnonzero(step.sampling_mask)
        if step.num_draft_tokens is None:
            num_drafts = np.zeros(len(sampling_requests), np.int64)
        else:
            num_drafts = step.num_draft_tokens[sampling_requests].astype(np.int64)
        num_rows = num_drafts + 1
        starts = num_rows.cumsum() - num_rows
        request_indices = np.repeat(sampling_requests, num_rows)
        # A request's rows belong to the last of its tokens: -num_rows .. -1 counts them from the token after its last.
        from_end = np.arange(len(request_indices)) - np.repeat(starts + num_rows, num_rows)
        token_indices = step.num_scheduled_tokens.cumsum()[request_indices] + from_end
        return cls(
            request_indices=request_indices,
            max_sample_positions=step.max_seq_lens[request_indices] + from_end + 1,
            token_indices=token_indices,
            starts=starts,
            num_drafts=num_drafts,
        )


@dataclass(slots=True)
class StepInputs:
    """Everything a forward pass and the sampler need of a step. Device tensors."""

    rows: Tensor  # (num_reqs,) int64, of the request table
    input_ids: Tensor  # (num_tokens,) int32
    positions: Tensor  # (num_tokens,) int64
    seq_lens: Tensor  # (num_reqs,) int32, the step's tokens included
    query_start_loc: Tensor  # (num_reqs + 1,) int32
    slot_mapping: list[Tensor]  # by group: (num_tokens,) int64
    batches: list[AttentionBatch]  # by group
    logits_table_rows: Tensor  # (num_logits_rows,) int64: row of the request table
    logits_positions: Tensor  # (num_logits_rows,) int32: position of the sampled token, or tokens before it
    logits_indices: Tensor  # (num_logits_rows,) int64: token whose hidden state gives the row
    draft_spans: DraftSpans
    """The logits rows by request."""


def build_inputs(step: SchedulerOutput, indices: LogitsIndices, table: RequestTable, block_size: int) -> StepInputs:
    """Expand the grants of ``step`` and advance ``table.num_computed_tokens`` past them.

    Nothing is read from the device: how long a request is, is known there alone where drafts were verified.
    """
    device = table.device
    num_reqs, num_tokens = len(step.rows), step.total_num_scheduled_tokens
    # All that the host knows goes over in one copy: each copy costs more in launch time than in bytes.
    columns = (
        step.rows,
        step.num_scheduled_tokens,
        indices.request_indices,
        indices.token_indices,
        indices.request_indices[indices.starts],
        indices.starts,
        indices.num_drafts,
    )
    packed = copy_to_device(np.concatenate(columns, dtype=np.int64), torch.int64, device)
    rows, num_scheduled, request_indices, logits_indices, sampling_requests, starts, num_drafts = packed.split(
        [len(column) for column in columns]
    )
    query_start = torch.zeros(num_reqs + 1, dtype=torch.int64, device=device)
    torch.cumsum(num_scheduled, 0, out=query_start[1:])
    num_computed = table.num_computed_tokens[rows].long()  # (num_reqs,)
    # ``output_size``: without it ``repeat_interleave`` would wait for the device to learn how much to allocate.
    request_of_token = torch.repeat_interleave(
        torch.arange(num_reqs, device=device), num_scheduled, output_size=num_tokens
    )
    index_in_chunk = torch.arange(num_tokens, device=device) - query_start[request_of_token]
    positions = num_computed[request_of_token] + index_in_chunk  # (num_tokens,)
    row_of_token = rows[request_of_token]  # (num_tokens,)
    seq_lens = (num_computed + num_scheduled).int()
    # The step is launched, so its tokens count as computed for the next one, which is built before this one has run.
    # Rejected drafts are taken back by the verifier.
    table.num_computed_tokens[rows] = seq_lens
    query_start_loc = query_start.int()
    num_blocks = -(-step.max_seq_len // block_size)  # width of the block tables: a host bound, so nothing is read
    max_query_len = int(step.num_scheduled_tokens.max())
    slot_mapping, batches = [], []
    for block_table in table.block_tables:
        block = block_table[row_of_token, positions // block_size].long()
        slot_mapping.append(block * block_size + positions % block_size)
        batches.append(
            AttentionBatch(
                query_start_loc=query_start_loc,
                seq_lens=seq_lens,
                block_table=block_table[rows, :num_blocks],
                num_reqs=num_reqs,
                num_tokens=num_tokens,
                max_query_len=max_query_len,
                max_seq_len=step.max_seq_len,
                num_decodes=step.num_decodes,
            )
        )
    return StepInputs(
        rows=rows,
        input_ids=table.token_ids[row_of_token, positions],  # tokens sampled on the device included
        positions=positions,
        seq_lens=seq_lens,
        query_start_loc=query_start_loc,
        slot_mapping=slot_mapping,
        batches=batches,
        logits_table_rows=rows[request_indices],
        logits_positions=positions[logits_indices].int() + 1,
        logits_indices=logits_indices,
        draft_spans=DraftSpans(rows[sampling_requests], starts, num_drafts, 1 + int(indices.num_drafts.max(initial=0))),
    )
