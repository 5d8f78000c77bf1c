"""From a step's grants to the model's inputs, on the device: positions, tokens, slots, lengths."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.core.contracts.attention import AttentionBatch
from quire.core.messages import SchedulerOutput
from quire.core.worker.pinned import upload
from quire.core.worker.request_table import RequestTable

__all__ = ["StepInputs", "build_inputs"]


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
    sample_index: Tensor  # (num_samples,) int64: index into the step's requests of those that draw
    logits_index: Tensor  # (num_samples,) int64: token whose hidden state predicts the drawn one


def build_inputs(step: SchedulerOutput, table: RequestTable, block_size: int) -> StepInputs:
    """Expand the grants of ``step`` and advance ``table.num_computed`` past them."""
    device = table.device
    num_reqs, total = len(step.rows), step.total_tokens
    packed = upload(_pack(step), torch.int64, device)
    rows, grants = packed[0], packed[1]
    sample_index = packed[2, : int(step.samples.sum())]
    start = torch.zeros(num_reqs + 1, dtype=torch.int64, device=device)
    torch.cumsum(grants, 0, out=start[1:])
    computed = table.num_computed[rows].long()
    owner = torch.repeat_interleave(torch.arange(num_reqs, device=device), grants, output_size=total)
    positions = computed[owner] + torch.arange(total, device=device) - start[owner]
    token_row = rows[owner]
    seq_lens = (computed + grants).int()
    table.num_computed[rows] = seq_lens
    start32 = start.int()
    width = -(-step.max_seq_len // block_size)
    max_query_len = int(step.num_tokens.max())
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
        sample_index=sample_index,
        logits_index=start[1:][sample_index] - 1,
    )


def _pack(step: SchedulerOutput) -> NDArray[np.int64]:
    """(3, num_reqs): rows, grants, indices of the requests that draw, so that one copy carries them."""
    packed = np.zeros((3, len(step.rows)), dtype=np.int64)
    packed[0], packed[1] = step.rows, step.num_tokens
    drawn = np.flatnonzero(step.samples)
    packed[2, : len(drawn)] = drawn
    return packed
