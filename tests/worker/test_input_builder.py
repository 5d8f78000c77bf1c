"""Inputs that are built in whole columns, against the same worked out request by request."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quire import SamplingParams
from quire.core.messages import BlockDiff, NewRequest, SchedulerOutput
from quire.core.worker.input_builder import LogitsIndices, build_inputs
from quire.core.worker.request_table import RequestTable

BLOCK = 4


def make_step(rows, num_tokens, samples, seq_lens, num_drafts=None, num_decodes=0) -> SchedulerOutput:
    return SchedulerOutput(
        step=0,
        rows=np.array(rows, np.int32),
        num_scheduled_tokens=np.array(num_tokens, np.int32),
        sampling_mask=np.array(samples, bool),
        num_decodes=num_decodes,
        total_num_scheduled_tokens=sum(num_tokens),
        max_seq_len=max(seq_lens),
        max_seq_lens=np.array(seq_lens, np.int32),
        num_draft_tokens=None if num_drafts is None else np.array(num_drafts, np.int32),
    )


def test_logits_rows_of_a_step() -> None:
    """One for each request that samples, and one for each draft."""
    step = make_step([4, 1, 7], [3, 5, 1], [True, False, True], [20, 9, 6], num_drafts=[2, 0, 0])
    indices = LogitsIndices.from_step(step)
    assert indices.request_indices.tolist() == [0, 0, 0, 2]
    assert indices.token_indices.tolist() == [0, 1, 2, 8]
    assert indices.max_sample_positions.tolist() == [18, 19, 20, 6]
    assert indices.starts.tolist() == [0, 3] and indices.num_drafts.tolist() == [2, 0]


def test_a_step_in_which_no_request_samples() -> None:
    indices = LogitsIndices.from_step(make_step([0, 1], [4, 4], [False, False], [4, 8]))
    assert len(indices.request_indices) == len(indices.starts) == 0


@pytest.mark.parametrize("seed", range(6))
def test_inputs_are_those_of_each_request(seed: int) -> None:
    """Decodes, chunks of prompts and drafts in one step, in two groups of layers; what a request computes in it counts
    as computed afterwards."""
    rng = np.random.default_rng(seed)
    table = RequestTable(8, 64, BLOCK, 2, torch.device("cpu"), lookahead=2)
    rows = rng.permutation(8)[:5].tolist()
    num_computed = rng.integers(0, 20, 5).tolist()
    num_drafts = [0, 0, 2, 1, 0]
    num_tokens = [1, 1, 3, 2, int(rng.integers(2, 20))]
    samples = [True, True, True, True, bool(rng.integers(2))]
    lengths = [computed + count for computed, count in zip(num_computed, num_tokens, strict=True)]
    params = SamplingParams()
    table.add_requests(
        [
            NewRequest(row, row, rng.integers(0, 1000, length).tolist(), length, computed, params, 0)
            for row, length, computed in zip(rows, lengths, num_computed, strict=True)
        ]
    )
    diffs = [BlockDiff(g, row, 0, rng.integers(1, 500, 8).tolist()) for g in range(2) for row in rows]
    table.update_block_tables(diffs)
    step = make_step(rows, num_tokens, samples, lengths, num_drafts, num_decodes=2)
    indices = LogitsIndices.from_step(step)

    inputs = build_inputs(step, indices, table, BLOCK)

    positions = [range(length - count, length) for length, count in zip(lengths, num_tokens, strict=True)]
    assert inputs.rows.tolist() == rows
    assert inputs.positions.tolist() == [p for chunk in positions for p in chunk]
    assert inputs.seq_lens.tolist() == lengths
    assert inputs.query_start_loc.tolist() == [0, *np.cumsum(num_tokens)]
    tokens = [table.token_ids[row, p] for row, chunk in zip(rows, positions, strict=True) for p in chunk]
    assert inputs.input_ids.tolist() == tokens
    for blocks, slots, batch in zip(table.block_tables, inputs.slot_mapping, inputs.batches, strict=True):
        expected = [
            int(blocks[row, p // BLOCK]) * BLOCK + p % BLOCK
            for row, chunk in zip(rows, positions, strict=True)
            for p in chunk
        ]
        assert slots.tolist() == expected
        assert batch.block_table.tolist() == blocks[rows, : -(-max(lengths) // BLOCK)].tolist()
        assert (batch.num_reqs, batch.num_tokens, batch.num_decodes) == (5, sum(num_tokens), 2)
        assert (batch.max_query_len, batch.max_seq_len) == (max(num_tokens), max(lengths))
    starts = np.cumsum([0, *num_tokens])
    logits_rows = [
        (i, int(starts[i + 1]) - 1 - num_drafts[i] + draft)
        for i in range(5)
        if samples[i]
        for draft in range(1 + num_drafts[i])
    ]
    assert inputs.logits_indices.tolist() == [token for _, token in logits_rows]
    assert inputs.logits_table_rows.tolist() == [rows[i] for i, _ in logits_rows]
    assert inputs.logits_positions.tolist() == [int(inputs.positions[token]) + 1 for _, token in logits_rows]
    assert inputs.draft_spans.max_len == 3
    assert table.num_computed_tokens[rows].tolist() == lengths
