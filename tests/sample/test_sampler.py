"""Sampling against transformers' warpers, chi-square against the exact distribution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from quire.core.contracts.sampler import SamplingBatch
from quire.core.sample.filters import apply_filters
from quire.core.sample.logprobs import gather_logprobs
from quire.core.sample.sampler import GumbelSampler

VOCAB = 24


def batch_of(n: int, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0) -> SamplingBatch:
    return SamplingBatch(
        temperature=torch.full((n,), float(temperature)),
        top_k=torch.full((n,), top_k, dtype=torch.int32),
        top_p=torch.full((n,), float(top_p)),
        min_p=torch.full((n,), float(min_p)),
        seed=torch.full((n,), seed, dtype=torch.int64),
        position=torch.arange(n),
        any_random=temperature > 0,
        any_top_k=top_k > 0,
        any_top_p=top_p < 1,
        any_min_p=min_p > 0,
    )


def expected_logits(logits: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    ids = torch.zeros(len(logits), 1, dtype=torch.long)
    if min_p > 0:
        logits = MinPLogitsWarper(min_p)(ids, logits)
    if top_k > 0:
        logits = TopKLogitsWarper(top_k)(ids, logits)
    if top_p < 1:
        logits = TopPLogitsWarper(top_p)(ids, logits)
    return logits


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    top_k=st.integers(0, VOCAB + 3),
    top_p=st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.05]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
)
def test_filters_allow_what_transformers_allows(seed: int, top_k: int, top_p: float, min_p: float) -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    ours = apply_filters(logits.clone(), batch_of(3, top_k=top_k, top_p=top_p, min_p=min_p))
    assert torch.equal(ours.isfinite(), expected_logits(logits, top_k, top_p, min_p).isfinite())


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> float:
    expected = probs * counts.sum()
    big = expected >= 5
    cells = torch.cat((counts[big], counts[~big].sum()[None])), torch.cat((expected[big], expected[~big].sum()[None]))
    keep = cells[1] > 0
    return float((((cells[0] - cells[1]) ** 2 / cells[1].clamp(min=1e-9))[keep]).sum())


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"temperature": 1.5, "top_k": 12, "top_p": 0.9},
    ],
    ids=str,
)
def test_samples_follow_the_distribution(params: dict) -> None:
    count = 20_000
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(3)) * 2
    batch = batch_of(count, **params, seed=11)
    tokens = GumbelSampler(VOCAB, torch.device("cpu")).sample(logits.expand(count, -1).clone(), batch)
    scaled = logits / params.get("temperature", 1.0)
    probs = expected_logits(scaled, params.get("top_k", 0), params.get("top_p", 1.0), params.get("min_p", 0.0))
    counts = torch.bincount(tokens.long(), minlength=VOCAB).double()
    probs = probs.softmax(-1)[0].double()
    assert counts[probs == 0].sum() == 0
    assert chi_square(counts, probs) < 60  # 24 cells; p < 1e-4 beyond about 59


def test_a_row_samples_the_same_alone_and_in_company() -> None:
    logits = torch.randn(8, VOCAB)
    batch = batch_of(8, temperature=0.9, top_p=0.9)
    batch.seed = torch.arange(8)
    batch.temperature[3] = 0.0
    sampler = GumbelSampler(VOCAB, torch.device("cpu"))
    together = sampler.sample(logits.clone(), batch)
    assert together[3] == logits[3].argmax()
    for i in range(8):
        one = batch_of(1, temperature=0.9, top_p=0.9)
        one.temperature, one.seed, one.position = batch.temperature[i : i + 1], batch.seed[i : i + 1], torch.tensor([i])
        assert sampler.sample(logits[i : i + 1].clone(), one)[0] == together[i]


def test_logprobs_and_ranks() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]])
    ids, values, ranks = gather_logprobs(logits, torch.tensor([2]), 2)
    assert ids.tolist() == [[2, 1, 2]]
    assert ranks.tolist() == [2]
    torch.testing.assert_close(values[0], logits.log_softmax(-1)[0][[2, 1, 2]])
    named = torch.tensor([[3, 0, -1]])
    ids, values, ranks = gather_logprobs(logits, torch.tensor([2]), 0, named)
    assert ids[0, :3].tolist() == [2, 3, 0] and ranks.tolist() == [2]
    torch.testing.assert_close(values[0, :3], logits.log_softmax(-1)[0][[2, 3, 0]])
    ids = gather_logprobs(logits, torch.tensor([2]), 1, torch.full((1, 3), -1)).token_ids
    assert ids[0, :2].tolist() == [2, 1]
