"""Rows of logits from which nothing can be sampled: found by kernels and by torch alike, whatever the row asks for."""

from __future__ import annotations

import pytest
import torch

from quire.core.contracts.sampler import SamplingBatch, SamplingTable
from quire.core.sample.checked_sampler import CheckedSampler
from quire.core.sample.inputs import DraftSpans, SamplingColumns
from quire.core.sample.kernels.argmax_kernel import launch_argmax
from quire.core.sample.kernels.launch_sample import launch_sample
from quire.core.sample.kernels.verify_kernel import launch_verify_drafts
from quire.core.sample.kernels.workspace import Tiles, Workspace
from quire.core.sample.row_faults import NO_LOGITS, NO_TOKEN
from quire.core.sample.sampler import GumbelSampler
from quire.core.sample.verify import verify_drafts

TINY = Tiles(groups_per_chunk=2, group_size=8, tile_size=8, num_parts=2, max_candidates=32, max_topk=12)
VOCAB, NAN, MINUS_INF = 61, float("nan"), float("-inf")
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
PARAMS = [  # temperature, top-k, top-p, min-p
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.7, 0, 0.9, 0.0),
    (1.0, 0, 0.8, 0.1),
    (1.0, 3, 0.9, 0.0),
    (1.0, 40, 0.9, 0.0),
]


def make_columns(device: str) -> SamplingColumns:
    temperature, top_k, top_p, min_p = (torch.tensor(column) for column in zip(*PARAMS, strict=True))
    numbers = torch.arange(len(PARAMS))
    columns = (temperature, top_k.int(), top_p, min_p, numbers, numbers.int())
    return SamplingColumns(*(column.to(device) for column in columns))


def make_logits(seed: int, token: int, row: int, fault: str) -> torch.Tensor:
    logits = torch.randn(len(PARAMS), VOCAB, generator=torch.Generator().manual_seed(seed))
    if fault == "NaN":
        logits[row, token] = NAN
    elif fault == "all NaN":
        logits[row] = NAN
    elif fault == "masked":
        logits[row] = MINUS_INF
    return logits


@DEVICES
def test_kernels_mark_the_rows_that_torch_marks(device: str) -> None:
    """Every kind of request with a NaN in one place, and with one of the other faults."""
    faults = ["NaN"] * len(PARAMS) + ["none", "masked", "all NaN", "none", "masked", "all NaN"]
    parts = [make_logits(i, 11 * i % VOCAB, i % len(PARAMS), fault) for i, fault in enumerate(faults)]
    logits = torch.stack([part[i % len(PARAMS)] for i, part in enumerate(parts)])
    columns = SamplingColumns(*(column.repeat(2).to(device) for column in make_columns("cpu")))
    is_faulty = [fault != "none" for fault in faults]
    workspace = Workspace(len(logits), VOCAB, torch.device(device), TINY)
    tokens, best = (torch.full((len(logits),), 99, dtype=torch.int32, device=device) for _ in range(2))
    launch_sample(logits.to(device), columns, workspace, tokens, mark_invalid=True)
    launch_argmax(logits.to(device), workspace, best, mark_invalid=True)
    assert (tokens == NO_LOGITS).tolist() == (best == NO_LOGITS).tolist() == is_faulty
    sampler, c = GumbelSampler(VOCAB, torch.device("cpu")), SamplingColumns(*(column.cpu() for column in columns))
    sampler.marks_invalid_rows = True
    batch = SamplingBatch(c.temperature, c.top_k, c.top_p, c.min_p, c.seed, c.position.long(), True, True, True, True)
    assert tokens.tolist() == sampler.sample(logits.clone(), batch).tolist()
    assert best.tolist() == torch.where(torch.tensor(is_faulty), NO_LOGITS, logits.argmax(-1)).tolist()


@pytest.mark.parametrize("fault", ["none", "NaN", "all NaN", "masked"])
@pytest.mark.parametrize("foreign", [False, True])
def test_torch_marks_the_same_rows(fault: str, foreign: bool) -> None:
    c, cpu = make_columns("cpu"), torch.device("cpu")
    for row in range(len(PARAMS)):
        logits = make_logits(row, 17, row, fault)
        for any_random in (False, True):
            batch = SamplingBatch(
                c.temperature, c.top_k, c.top_p, c.min_p, c.seed, c.position.long(), any_random, True, True, True
            )
            plain, marking = GumbelSampler(VOCAB, cpu), GumbelSampler(VOCAB, cpu)
            marking.marks_invalid_rows = True
            expected = plain.sample(logits.clone(), batch)
            if fault != "none":
                expected[row] = NO_LOGITS
            tokens = (CheckedSampler(plain) if foreign else marking).sample(logits.clone(), batch)
            assert tokens.tolist() == expected.tolist()


def test_a_token_outside_of_the_vocabulary_is_a_fault_of_the_sampler() -> None:
    class Wrong(GumbelSampler):
        def prepare_graph_sampling(self, max_rows: int) -> bool:
            return True

        def sample(self, logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
            return torch.tensor([3, VOCAB, -5, 7], dtype=torch.int32)

        def sample_from_table(self, logits, rows, table, tokens, *, greedy) -> None:
            tokens.copy_(self.sample(logits, None))
            table.token_ids[rows, table.num_tokens[rows].long()] = tokens
            table.num_tokens[rows] += 1

    logits, longs = torch.zeros(4, VOCAB), torch.zeros(4, dtype=torch.int64)
    logits[3] = NAN
    floats, ints = torch.zeros(5), torch.zeros(5, dtype=torch.int32)
    sampler = CheckedSampler(Wrong(VOCAB, torch.device("cpu")))
    batch = SamplingBatch(floats[:4], ints[:4], floats[:4], floats[:4], longs, longs, False, False, False, False)
    expected = [3, NO_TOKEN, NO_TOKEN, NO_LOGITS]
    assert sampler.sample(logits, batch).tolist() == expected
    table = SamplingTable(
        torch.zeros(5, 8, dtype=torch.int32), ints.clone(), floats, ints, floats, floats, torch.zeros(5).long()
    )
    tokens = torch.zeros(4, dtype=torch.int32)
    sampler.sample_from_table(logits, torch.arange(4), table, tokens, greedy=True)
    assert tokens.tolist() == expected
    assert table.token_ids[:4, 0].tolist() == [3, 0, 0, 7], "what the next step embeds is in the vocabulary"


@DEVICES
@pytest.mark.parametrize("faulty", [0, 1, 2])
def test_verification_keeps_a_fault_for_the_host_alone(device: str, faulty: int) -> None:
    """Drafts 4 and 5 of one request, of which as many are accepted as come before the fault."""
    sampled = torch.tensor([4, 5, 6], dtype=torch.int32, device=device)
    sampled[faulty] = NO_LOGITS
    ints = torch.zeros(2, dtype=torch.int32, device=device)
    floats, longs = ints.float(), ints.long()
    token_ids = torch.zeros(2, 9, dtype=torch.int32, device=device)
    table = SamplingTable(token_ids, ints + 1, floats, ints, floats, floats, longs)
    spans = DraftSpans(longs[:1], longs[:1], longs[:1] + 2, 3)
    for verify in (verify_drafts, launch_verify_drafts):
        table.token_ids[0, :3] = torch.tensor([9, 4, 5])
        table.num_tokens.fill_(1)
        packed = verify(sampled, spans, table, ints.clone(), ints + 2)
        assert packed[0, :2].tolist() == [faulty + 1, 2]
        assert packed[0, 2 : 3 + faulty].tolist() == [*[4, 5][:faulty], NO_LOGITS]
        assert bool((table.token_ids >= 0).all())
