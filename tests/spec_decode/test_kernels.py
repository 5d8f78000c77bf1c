"""The kernels of verification against the torch code: in the interpreter by default, and on a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.core.contracts.attention import AttentionBatch
from quire.core.contracts.sampler import SamplingTable
from quire.core.contracts.spec_decode import StepTokens, TargetState
from quire.core.messages import HostDraft
from quire.core.sample import verify as twin
from quire.core.sample.kernels import verify_kernel as kernels
from quire.core.worker import request_table
from quire.core.worker.request_table import RequestTable
from quire.plugins.spec_decode.kernels.observed import observed as launch_observed
from quire.plugins.spec_decode.kernels.pass_inputs import pass_inputs as launch_pass_inputs
from quire.plugins.spec_decode.observed import observed
from quire.plugins.spec_decode.pass_inputs import pass_inputs

ROWS, LENGTH, VOCAB = 7, 40, 9  # the last row is padding


def table_of(chance: torch.Generator) -> tuple[SamplingTable, torch.Tensor, torch.Tensor]:
    ints = {"dtype": torch.int32, "generator": chance}
    lengths = torch.randint(1, LENGTH - 8, (ROWS,), **ints)
    seeds = torch.randint(-(2**62), 2**62, (ROWS,), generator=chance)
    floats = torch.zeros(ROWS)
    tokens = torch.randint(0, 3, (ROWS, LENGTH), **ints)
    table = SamplingTable(tokens, lengths, floats, floats.int(), floats, floats, seeds)
    return table, lengths + 3, torch.randint(0, 5, (ROWS,), **ints)


def moved(table: SamplingTable, device: str) -> SamplingTable:
    names = ("token_ids", "num_tokens", "temperature", "top_k", "top_p", "min_p", "seed")
    return SamplingTable(*(getattr(table, name).clone().to(device) for name in names))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@settings(max_examples=12)
@given(seed=st.integers(0, 2**31), lengths=st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_continuations(device: str, seed: int, lengths: list[int]) -> None:
    """What a proposer on the host expects of several requests, where it agrees with what was drawn since."""
    chance = torch.Generator().manual_seed(seed)
    columns, _, _ = table_of(chance)
    rows = torch.randperm(ROWS - 1, generator=chance)[: len(lengths)].tolist()
    guesses = []
    for row, length in zip(rows, lengths, strict=True):
        drawn = int(torch.randint(0, 3, (), generator=chance))
        anchor = max(1, int(columns.num_tokens[row]) - drawn)
        said = columns.token_ids[row, anchor : int(columns.num_tokens[row])].tolist()
        told = torch.randint(0, 3, (length,), generator=chance).tolist()
        guesses.append(HostDraft(row, anchor, [*said, *told][:length]))
    found = []
    for where, place in (("cpu", twin.place_drafts), (device, kernels.launch_place_drafts)):
        table = RequestTable(ROWS - 1, LENGTH - 1, 4, 1, torch.device(where))
        table.token_ids.copy_(columns.token_ids)
        table.num_tokens.copy_(columns.num_tokens)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(request_table, "place_drafts", place)
            table.place_host_drafts(guesses, VOCAB)
        found.append((table.num_drafts.tolist(), table.token_ids.tolist()))
    assert found[0] == found[1]
    for guess in guesses:
        behind = int(columns.num_tokens[guess.row]) - guess.base_len
        assert found[0][0][guess.row] == max(0, len(guess.token_ids) - behind)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@settings(max_examples=12)
@given(seed=st.integers(0, 2**31), ahead=st.integers(0, 6), count=st.integers(1, 5))
def test_pass_inputs(device: str, seed: int, ahead: int, count: int) -> None:
    """The last two tokens, or the draft drawn last; what lies behind a request's blocks goes where padding goes."""
    chance = torch.Generator().manual_seed(seed)
    table, computed, _ = table_of(chance)
    table.num_tokens[-1] = 0
    rows = torch.randperm(ROWS, generator=chance)[:count]
    blocks = torch.randint(0, 99, (count, 4), generator=chance, dtype=torch.int32)  # 16 of 40 places
    queries, drawn = (1, torch.randint(0, VOCAB, (count,), generator=chance, dtype=torch.int32)) if ahead else (2, None)
    target = TargetState(None, table, computed, blocks, [], [], [], 4, LENGTH - 10, count)
    expected = pass_inputs(target, rows, blocks, ahead=ahead, queries=queries, drawn=drawn)
    mine = moved(table, device)
    sizes = (count * queries, count * queries, count * queries, count, count)
    kinds = (torch.int32, torch.int64, torch.int64, torch.int32, torch.int64)
    out = tuple(torch.full((n,), -7, dtype=kind, device=device) for n, kind in zip(sizes, kinds, strict=True))
    launch_pass_inputs(
        rows.to(device), mine.num_tokens, mine.token_ids, blocks.to(device),
        None if drawn is None else drawn.to(device), out,
        ahead=ahead, queries=queries, block_size=4, longest=LENGTH - 10,
    )  # fmt: skip
    names = ("tokens", "positions", "slots", "lengths", "next")
    for name, got in zip(names, out, strict=True):
        assert torch.equal(got.cpu(), getattr(expected, name)), name


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@settings(max_examples=12)
@given(seed=st.integers(0, 2**31), grants=st.lists(st.integers(1, 9), min_size=1, max_size=ROWS))
def test_observed(device: str, seed: int, grants: list[int]) -> None:
    """Chunks of prompts, drafts of which some were accepted, and padding, which knows no token."""
    chance = torch.Generator().manual_seed(seed)
    table, _, _ = table_of(chance)
    table.num_tokens[-1] = 0
    rows = torch.randperm(ROWS, generator=chance)[: len(grants)]
    start = torch.tensor([0, *grants]).cumsum(0).int()
    first = [int(torch.randint(0, LENGTH - grant + 1, (), generator=chance)) for grant in grants]
    positions = torch.cat([at + torch.arange(grant) for at, grant in zip(first, grants, strict=True)])
    batch = AttentionBatch(start, start, start, len(rows), len(positions), max(grants), LENGTH, 0)
    expected = observed(StepTokens(positions, positions, positions, rows, batch), table)
    mine = moved(table, device)
    out = (
        torch.full((len(positions),), -7, dtype=torch.int32, device=device),
        torch.full((len(rows),), -7, device=device),
    )
    launch_observed(start.to(device), rows.to(device), positions.to(device), mine.num_tokens, mine.token_ids, *out)
    for got, wanted in zip(out, expected, strict=True):
        assert torch.equal(got.cpu(), wanted)
