"""Kernels that place drafts and build a draft model's inputs, against torch: in the interpreter, and on a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.core.contracts.attention import AttentionBatch
from quire.core.contracts.sampler import SamplingTable
from quire.core.contracts.spec_decode import StepTokens, TargetState
from quire.core.messages import HostDraft
from quire.core.sample import verify
from quire.core.sample.kernels import verify_kernel
from quire.core.worker import request_table
from quire.core.worker.request_table import RequestTable
from quire.plugins.spec_decode.draft_inputs import build_pass_inputs, gather_next_tokens
from quire.plugins.spec_decode.draft_inputs_kernel import launch_build_pass_inputs, launch_gather_next_tokens

ROWS, LENGTH, VOCAB = 7, 40, 9  # the last row is padding
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def make_sampling_table(generator: torch.Generator) -> SamplingTable:
    ints = {"dtype": torch.int32, "generator": generator}
    num_tokens = torch.randint(1, LENGTH - 8, (ROWS,), **ints)
    seeds = torch.randint(-(2**62), 2**62, (ROWS,), generator=generator)
    floats = torch.zeros(ROWS)
    token_ids = torch.randint(0, 3, (ROWS, LENGTH), **ints)
    return SamplingTable(token_ids, num_tokens, floats, floats.int(), floats, floats, seeds)


def copy_table(table: SamplingTable, device: str) -> SamplingTable:
    names = ("token_ids", "num_tokens", "temperature", "top_k", "top_p", "min_p", "seed")
    return SamplingTable(*(getattr(table, name).clone().to(device) for name in names))


@DEVICES
@settings(max_examples=12)
@given(seed=st.integers(0, 2**31), lengths=st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_host_drafts_are_placed_where_they_agree(device: str, seed: int, lengths: list[int]) -> None:
    """Drafts of a host proposer begin some tokens before the end; those tokens are what was sampled since."""
    generator = torch.Generator().manual_seed(seed)
    sampling = make_sampling_table(generator)
    rows = torch.randperm(ROWS - 1, generator=generator)[: len(lengths)].tolist()
    drafts = []
    for row, length in zip(rows, lengths, strict=True):
        num_tokens = int(sampling.num_tokens[row])
        base_len = max(1, num_tokens - int(torch.randint(0, 3, (), generator=generator)))
        sampled_since = sampling.token_ids[row, base_len:num_tokens].tolist()
        predicted = torch.randint(0, 3, (length,), generator=generator).tolist()
        drafts.append(HostDraft(row, base_len, [*sampled_since, *predicted][:length]))
    results = []
    for where, place_drafts in (("cpu", verify.place_drafts), (device, verify_kernel.launch_place_drafts)):
        table = RequestTable(ROWS - 1, LENGTH - 1, 4, 1, torch.device(where))
        table.token_ids.copy_(sampling.token_ids)
        table.num_tokens.copy_(sampling.num_tokens)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(request_table, "place_drafts", place_drafts)
            table.place_host_drafts(drafts, VOCAB)
        results.append((table.num_drafts.tolist(), table.token_ids.tolist()))
    assert results[0] == results[1]
    for draft in drafts:
        num_sampled_since = int(sampling.num_tokens[draft.row]) - draft.base_len
        assert results[0][0][draft.row] == max(0, len(draft.token_ids) - num_sampled_since)


@DEVICES
@settings(max_examples=12)
@given(seed=st.integers(0, 2**31), num_ahead=st.integers(0, 6), num_reqs=st.integers(1, 5))
def test_build_pass_inputs(device: str, seed: int, num_ahead: int, num_reqs: int) -> None:
    """The last two tokens, or the last draft; what lies beyond a request's blocks goes where padding goes."""
    generator = torch.Generator().manual_seed(seed)
    table = make_sampling_table(generator)
    table.num_tokens[-1] = 0
    rows = torch.randperm(ROWS, generator=generator)[:num_reqs]
    blocks = torch.randint(0, 99, (num_reqs, 4), generator=generator, dtype=torch.int32)  # 16 of 40 positions
    query_len, draft_token_ids = 2, None
    if num_ahead:
        query_len, draft_token_ids = 1, torch.randint(0, VOCAB, (num_reqs,), generator=generator, dtype=torch.int32)
    num_computed_tokens = table.num_tokens + 3
    target = TargetState(None, table, num_computed_tokens, blocks, [], [], [], 4, LENGTH - 10, num_reqs)
    expected = build_pass_inputs(
        target, rows, blocks, num_ahead=num_ahead, query_len=query_len, draft_token_ids=draft_token_ids
    )
    outputs = {
        name: torch.full((size,), -7, dtype=dtype, device=device)
        for name, size, dtype in (
            ("input_ids", num_reqs * query_len, torch.int32),
            ("positions", num_reqs * query_len, torch.int64),
            ("slot_mapping", num_reqs * query_len, torch.int64),
            ("seq_lens", num_reqs, torch.int32),
            ("next_positions", num_reqs, torch.int64),
        )
    }
    on_device = TargetState(None, copy_table(table, device), None, None, [], [], [], 4, LENGTH - 10, num_reqs)
    launch_build_pass_inputs(
        on_device,
        rows.to(device),
        blocks.to(device),
        None if draft_token_ids is None else draft_token_ids.to(device),
        num_ahead=num_ahead,
        query_len=query_len,
        **outputs,
    )
    for name, output in outputs.items():
        assert torch.equal(output.cpu(), getattr(expected, name)), name


@DEVICES
@settings(max_examples=12)
@given(seed=st.integers(0, 2**31), query_lens=st.lists(st.integers(1, 9), min_size=1, max_size=ROWS))
def test_gather_next_tokens(device: str, seed: int, query_lens: list[int]) -> None:
    """Chunks of prompts, drafts of which some were accepted, and padding, which has no token."""
    generator = torch.Generator().manual_seed(seed)
    table = make_sampling_table(generator)
    table.num_tokens[-1] = 0
    rows = torch.randperm(ROWS, generator=generator)[: len(query_lens)]
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    first = [int(torch.randint(0, LENGTH - n + 1, (), generator=generator)) for n in query_lens]
    positions = torch.cat([position + torch.arange(n) for position, n in zip(first, query_lens, strict=True)])

    def make_step(device: str) -> StepTokens:
        start, where = starts.to(device), positions.to(device)
        batch = AttentionBatch(start, start, start, len(rows), len(positions), max(query_lens), LENGTH, 0)
        return StepTokens(where, where, where, rows.to(device), batch)

    expected = gather_next_tokens(make_step("cpu"), table)
    next_token_ids = torch.full((len(positions),), -7, dtype=torch.int32, device=device)
    last_token_indices = torch.full((len(rows),), -7, device=device)
    launch_gather_next_tokens(make_step(device), copy_table(table, device), next_token_ids, last_token_indices)
    assert torch.equal(next_token_ids.cpu(), expected.token_ids)
    assert torch.equal(last_token_indices.cpu(), expected.last_token_indices)
