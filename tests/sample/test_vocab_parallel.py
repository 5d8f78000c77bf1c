"""Sampling from parts of the vocabulary gives the tokens that the bundled sampler gives from the whole."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.sample.test_kernels import columns_of
from torch import Tensor

from quire.core.contracts.sampler import SamplingBatch, SamplingTable
from quire.core.layers.parallel import TensorParallel
from quire.core.layers.vocab import VocabShard
from quire.core.sample.inputs import SamplingColumns
from quire.core.sample.kernels.vocab_pick_kernel import PickWorkspace
from quire.core.sample.row_faults import NO_LOGITS
from quire.core.sample.sampler import GumbelSampler
from quire.core.sample.vocab_parallel import MAX_TOP_K, VocabParallelSampler, merge_picks, pick_local_tokens
from quire.core.testing.thread_ranks import run_on_ranks

CPU = torch.device("cpu")
PARAMS = [
    {"temperature": 0.0, "top_k": 3, "top_p": 0.5},
    {},
    {"temperature": 0.7},
    {"temperature": 1.3, "min_p": 0.2},
    {"top_k": 1},
    {"top_k": 5},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"temperature": 1.5, "top_k": MAX_TOP_K, "top_p": 0.5},
    {"temperature": 2.0, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 0.8, "top_k": 2, "top_p": 1e-4},
]
"""What it samples without whole logits."""


@dataclass(frozen=True)
class CountingRank(TensorParallel):
    """A rank of which the test sees what it exchanges."""

    def __init__(self, parallel: TensorParallel, exchanged: list[Tensor]) -> None:
        object.__setattr__(self, "rank", parallel.rank)
        object.__setattr__(self, "size", parallel.size)
        object.__setattr__(self, "stack", lambda x: exchanged.append(x) or parallel.stack(x))


def make_batch(columns: SamplingColumns) -> SamplingBatch:
    def any_where(mask: Tensor) -> bool:
        return bool((mask & (columns.temperature > 0)).any())

    return SamplingBatch(
        *columns[:5],
        columns.position.long(),
        any_random=bool((columns.temperature > 0).any()),
        any_top_k=any_where(columns.top_k > 0),
        any_top_p=any_where(columns.top_p < 1),
        any_min_p=any_where(columns.min_p > 0),
    )


def shard_logits(logits: Tensor, vocab: VocabShard) -> Tensor:
    """A rank's part, with padding behind it that no token may come from."""
    part = logits[:, vocab.first_token_id :][:, : vocab.size]
    return torch.nn.functional.pad(part, (0, vocab.size - part.shape[1]), value=99.0)


def sample_on_ranks(logits: Tensor, batch: SamplingBatch, size: int, exchanged: list[Tensor]) -> list[Tensor]:
    def run(parallel: TensorParallel) -> Tensor:
        counting = CountingRank(parallel, exchanged if parallel.rank == 0 else [])
        vocab = VocabShard(logits.shape[1], counting)
        return VocabParallelSampler(vocab, CPU, len(logits)).sample(shard_logits(logits, vocab), batch)

    return run_on_ranks(size, run)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from([2, 3, 4]),
    vocab_size=st.sampled_from([5, 61, 300]),
    levels=st.sampled_from([2, 9, 10_000]),
    rows=st.lists(st.sampled_from(PARAMS), min_size=1, max_size=5),
)
def test_tokens_are_those_of_one_process(seed: int, size: int, vocab_size: int, levels: int, rows: list[dict]) -> None:
    """Also where many logits are equal, at thresholds too, and where a rank has none of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(len(rows), vocab_size, generator=generator) * levels).round() * 3 / levels
    if seed % 3 == 0:
        logits[:, : vocab_size // 2] = float("-inf")
    batch = make_batch(columns_of(rows, seed, "cpu"))
    sampler = GumbelSampler(vocab_size, CPU)
    sampler.marks_invalid_rows = True
    expected = sampler.sample(logits.clone(), batch)
    for tokens in sample_on_ranks(logits, batch, size, []):
        assert torch.equal(tokens, expected)


def test_bfloat16_logits(size: int = 2) -> None:
    """In the model's dtype the k-th logit has many equals."""
    logits, rows = torch.randn(len(PARAMS), 2000, generator=torch.Generator().manual_seed(1)).bfloat16(), PARAMS
    batch = make_batch(columns_of(rows, 3, "cpu"))
    expected = GumbelSampler(2000, CPU).sample(logits.float(), batch)
    for tokens in sample_on_ranks(logits, batch, size, []):
        assert torch.equal(tokens, expected)


@pytest.mark.parametrize(
    ("params", "numbers"), [({"temperature": 0.0}, 2), ({"temperature": 0.7}, 2), ({"top_k": 20}, 2 + 2 * MAX_TOP_K)]
)
def test_few_numbers_are_exchanged(params: dict, numbers: int) -> None:
    """By row, whatever the size of the vocabulary."""
    exchanged: list[Tensor] = []
    sample_on_ranks(torch.randn(3, 5000), make_batch(columns_of([params] * 3, 0, "cpu")), 2, exchanged)
    assert sum(each.numel() for each in exchanged) == 3 * numbers


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_k": 3, "top_p": 0.5}])
def test_invalid_rows_are_said_and_harm_no_other(params: dict) -> None:
    """One NaN, in the part of one rank, and a row without any number."""
    logits, batch = torch.randn(4, 40, generator=torch.Generator().manual_seed(0)), columns_of([params] * 4, 0, "cpu")
    logits[1, 33], logits[3] = float("nan"), float("-inf")
    sampler = GumbelSampler(40, CPU)
    sampler.marks_invalid_rows = True
    expected = sampler.sample(logits.clone(), make_batch(batch))
    assert (expected[1], expected[3]) == (NO_LOGITS, NO_LOGITS)
    for tokens in sample_on_ranks(logits, make_batch(batch), 2, []):
        assert torch.equal(tokens, expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("vocab_size", [61, 130])
def test_kernels_pick_the_same(device: str, vocab_size: int) -> None:
    rows = [{"temperature": 0.0}, {}, {"temperature": 0.6}, {"temperature": 1.4}]
    columns = columns_of(rows, 5, device)
    logits = torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(2)).to(device)
    logits[2, 3] = float("nan")
    thresholds = logits.topk(7).values[:, -1]
    for random, limits in ((False, None), (True, None), (True, thresholds)):
        picks, expected = [], []
        for rank in range(3):
            vocab = VocabShard(vocab_size, TensorParallel(rank, 3))
            local = shard_logits(logits, vocab)
            workspace = PickWorkspace(4, vocab, torch.device(device), chunk_size=16)
            first, again = (workspace.pick(local, columns, limits, random=random).clone() for _ in range(2))
            assert torch.equal(first.nan_to_num(), again.nan_to_num()), "a launch leaves the workspace as it found it"
            picks.append(first)
            expected.append(pick_local_tokens(local, columns_long(columns), limits, vocab, random=random))
            torch.testing.assert_close(picks[-1][:, 0], expected[-1][:, 0], atol=1e-4, rtol=1e-5, equal_nan=True)
            is_number = ~expected[-1][:, 0].isnan()
            assert torch.equal(picks[-1][is_number, 1], expected[-1][is_number, 1])
        assert torch.equal(merge_with_kernel(torch.stack(picks), vocab_size), merge_picks(torch.stack(expected)))


def test_kernels_append_to_the_table() -> None:
    """The padding row gets no token and never grows."""
    vocab = VocabShard(50, TensorParallel())
    sampler = VocabParallelSampler(vocab, CPU, 3, use_kernels=True)
    ints = torch.zeros(4, dtype=torch.int32)
    columns = columns_of([{}, {"top_k": 5}, {"temperature": 0.0}, {}], 1, "cpu")
    table = SamplingTable(
        torch.zeros(4, 9, dtype=torch.int32), ints + 3, columns.temperature, columns.top_k, columns.top_p,
        columns.min_p, columns.seed,
    )  # fmt: skip
    rows, logits = torch.tensor([2, 0, 3]), torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    tokens = torch.zeros(3, dtype=torch.int32)
    sampler.sample_from_table(logits, rows, table, tokens, random=True, filters=True)
    of_rows = SamplingColumns(*(column[rows] for column in columns[:5]), torch.full((3,), 3))
    expected = GumbelSampler(50, CPU).sample(logits.clone(), make_batch(of_rows))
    assert tokens[:2].tolist() == expected[:2].tolist()
    assert table.num_tokens.tolist() == [4, 3, 4, 3]
    assert [table.token_ids[2, 3], table.token_ids[0, 3]] == expected[:2].tolist()


def columns_long(columns: SamplingColumns) -> SamplingColumns:
    return SamplingColumns(*columns[:5], columns.position.long())


def merge_with_kernel(picks: Tensor, vocab_size: int) -> Tensor:
    """(ranks, n, 2) as the ranks would exchange them."""
    stacked = CountingRank(TensorParallel(0, len(picks)), [])
    object.__setattr__(stacked, "stack", lambda x: picks)
    workspace = PickWorkspace(picks.shape[1], VocabShard(vocab_size, TensorParallel()), picks.device)
    tokens = torch.zeros(picks.shape[1], dtype=torch.int32, device=picks.device)
    workspace.merge(stacked, tokens)
    return tokens
