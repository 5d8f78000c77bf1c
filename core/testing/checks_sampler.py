"""What every sampler must keep: the token is a function of logits, parameters, seed and position."""

from __future__ import annotations

import unittest
from typing import Any

import torch
from torch import Tensor

from quire.core.contracts.sampler import Sampler, SamplingBatch, SamplingTable
from quire.core.plugin.options import parse_options
from quire.core.testing.chi_square import ChiSquare

__all__ = [
    "check_a_row_does_not_depend_on_its_neighbours",
    "check_a_row_of_nan_harms_no_other",
    "check_neighbours_are_sampled_independently",
    "check_position_and_seed_matter",
    "check_result_is_one_int32_per_row",
    "check_same_seed_and_position_sample_the_same_token",
    "check_samples_follow_the_distribution",
    "check_sampling_from_the_table_is_the_same",
    "check_temperature_zero_is_the_argmax",
    "check_top_k_top_p_and_min_p_restrict",
]

_CPU = torch.device("cpu")
_MAX_DEVIATIONS = 6


def check_result_is_one_int32_per_row(cls: type[Sampler]) -> None:
    """(n, vocab) logits give (n,) int32 tokens inside the vocabulary."""
    tokens = _make(cls, 16).sample(_logits(5, 16), _batch(5))
    assert tokens.shape == (5,) and tokens.dtype == torch.int32, f"got {tuple(tokens.shape)} {tokens.dtype}"
    assert bool(((tokens >= 0) & (tokens < 16)).all()), "sampled a token outside the vocabulary"


def check_temperature_zero_is_the_argmax(cls: type[Sampler]) -> None:
    """Greedy rows take the largest logit, also beside random rows."""
    logits = _logits(6, 32)
    temperature = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    tokens = _make(cls, 32).sample(logits.clone(), _batch(6, temperature=temperature))
    assert torch.equal(tokens[::2].long(), logits[::2].argmax(-1)), "a greedy row is not the argmax"


def check_same_seed_and_position_sample_the_same_token(cls: type[Sampler]) -> None:
    """Sampling twice gives the same tokens: there is no hidden generator."""
    sampler, logits = _make(cls, 64), _logits(8, 64)
    first = sampler.sample(logits.clone(), _batch(8))
    assert torch.equal(first, sampler.sample(logits.clone(), _batch(8))), "sampling twice differs"
    assert torch.equal(first, _make(cls, 64).sample(logits.clone(), _batch(8))), "two samplers differ"


def check_a_row_does_not_depend_on_its_neighbours(cls: type[Sampler]) -> None:
    """A request samples the same token alone, in company, and in another place of the batch."""
    sampler, logits, batch = _make(cls, 64), _logits(8, 64), _batch(8)
    together = sampler.sample(logits.clone(), batch)
    for row in range(8):
        alone = sampler.sample(logits[row : row + 1].clone(), _rows(batch, torch.tensor([row])))
        assert int(alone[0]) == int(together[row]), f"row {row} samples another token alone"
    order = torch.arange(7, -1, -1)
    turned = sampler.sample(logits[order].clone(), _rows(batch, order))
    assert torch.equal(turned, together[order]), "the order of the rows matters"


def check_position_and_seed_matter(cls: type[Sampler]) -> None:
    """Flat logits give many different tokens over positions, and over seeds."""
    sampler, flat = _make(cls, 64), torch.zeros(64, 64)
    by_position = sampler.sample(flat.clone(), _batch(64, seed=torch.full((64,), 7)))
    by_seed = sampler.sample(flat.clone(), _batch(64, position=torch.full((64,), 3)))
    assert by_position.unique().numel() > 16, "the position hardly changes the noise"
    assert by_seed.unique().numel() > 16, "the seed hardly changes the noise"


def check_samples_follow_the_distribution(cls: type[Sampler]) -> None:
    """Counts over 8,192 positions, and over as many seeds, pass a chi-square test against the softmax, at three
    temperatures; so do those of tokens that are allowed by top-k, top-p and min-p."""
    row, n = torch.tensor([0.0, 0.5, 1.0, 2.0, -1.0, 0.2, 1.5, -3.0]), 8192
    by_seed = {"seed": torch.arange(n) * 31 + 5, "position": torch.full((n,), 9)}
    by_position = {"seed": torch.full((n,), 3), "position": torch.arange(n)}
    for temperature in (1.0, 0.5, 1.7):
        for what, columns in (("seeds", by_seed), ("positions", by_position)):
            tokens = _make(cls, 8).sample(
                row.repeat(n, 1), _batch(n, temperature=torch.full((n,), temperature), **columns)
            )
            _assert_follows(tokens, torch.softmax(row / temperature, -1), f"temperature {temperature}, over {what}")
    top_two, top_three = row.topk(2).indices, row.topk(3).indices
    cases: list[tuple[Tensor, dict[str, Any]]] = [
        (top_three, {"top_k": torch.full((n,), 3, dtype=torch.int32), "any_top_k": True}),
        (top_two, {"top_p": torch.full((n,), 0.6), "any_top_p": True}),
        (top_two, {"min_p": torch.full((n,), 0.5), "any_min_p": True}),
    ]
    for allowed, changes in cases:
        kept = torch.full_like(row, float("-inf")).index_copy(0, allowed, row[allowed])
        tokens = _make(cls, 8).sample(row.repeat(n, 1), _batch(n, **changes))
        _assert_follows(tokens, torch.softmax(kept, -1), next(iter(changes)))


def check_neighbours_are_sampled_independently(cls: type[Sampler]) -> None:
    """Pairs of tokens at neighbouring positions, and of neighbouring seeds, pass a chi-square test."""
    n = 8192
    probability = torch.softmax(torch.tensor([0.0, 1.0, -1.0]), -1)
    for what, stride in (("positions", (1, 0)), ("seeds", (0, 1))):
        numbers = torch.arange(2 * n)
        seed = numbers if stride[1] else torch.full((2 * n,), 11)
        position = numbers if stride[0] else torch.full((2 * n,), 40)
        logits = probability.log().repeat(2 * n, 1)
        tokens = _make(cls, 3).sample(logits, _batch(2 * n, seed=seed, position=position)).view(n, 2)
        _assert_follows(tokens[:, 0] * 3 + tokens[:, 1], torch.outer(probability, probability).flatten(), what)


def check_a_row_of_nan_harms_no_other(cls: type[Sampler]) -> None:
    """A row of NaN or infinities of either sign gives some token; the tokens of other rows stay as they are."""
    logits, batch = _logits(8, 64), _batch(8, temperature=torch.tensor([0.0, 1.0] * 4))
    expected = _make(cls, 64).sample(logits.clone(), batch)
    for value in (float("nan"), float("inf"), float("-inf")):
        wrong = logits.clone()
        wrong[2:4] = value
        tokens = _make(cls, 64).sample(wrong, _rows(batch, torch.arange(8)))
        others = [0, 1, 4, 5, 6, 7]
        assert torch.equal(tokens[others], expected[others]), f"rows of {value} change the tokens of others"
        assert bool(((tokens >= 0) & (tokens < 64)).all()), f"a row of {value} gives a token outside the vocabulary"


def check_sampling_from_the_table_is_the_same(cls: type[Sampler]) -> None:
    """Where ``prepare_graph_sampling`` allows it, ``sample_from_table`` gives the tokens of ``sample`` and appends
    them; the padding row never grows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sampler = _make(cls, 64, device)
    if not sampler.prepare_graph_sampling(8):
        raise unittest.SkipTest(f"cannot be captured on {device.type}")
    source = _logits(6, 64).to(device)
    for greedy in (True, False):
        table = _make_table(7, device, greedy)
        rows = torch.tensor([2, 0, 6, 5, 6, 1], device=device)  # 6 is the padding row, which may come often
        counts, position = table.num_tokens.clone(), table.num_tokens[rows].long()
        batch = SamplingBatch.from_table(table, rows, position, any_random=not greedy)
        expected = _make(cls, 64, device).sample(source.clone(), batch)
        tokens, logits = torch.zeros(6, dtype=torch.int32, device=device), source.clone()
        sampler.sample_from_table(logits, rows, table, tokens, greedy=greedy)
        real = rows != 6
        assert torch.equal(tokens[real], expected[real]), f"greedy {greedy}: other tokens than sample gives"
        assert torch.equal(logits, source), f"greedy {greedy}: the logits were changed"
        appended = table.token_ids[rows[real], counts[rows[real]].long()]
        assert torch.equal(appended, expected[real]), f"greedy {greedy}: the tokens are not behind those of the table"
        grown = (table.num_tokens - counts).tolist()
        assert grown == [1, 1, 1, 0, 0, 1, 0], f"greedy {greedy}: rows grew by {grown}"


def check_top_k_top_p_and_min_p_restrict(cls: type[Sampler]) -> None:
    """Only the allowed tokens are sampled, row by row: each restriction on its own, and top-p over what min-p or top-k
    leaves."""
    row, n = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0, -2.0]), 512
    sampler = _make(cls, 6)
    cases: list[tuple[str, dict[str, Any], int]] = [
        ("top_k", {"top_k": torch.full((n,), 2, dtype=torch.int32), "any_top_k": True}, 2),
        ("top_p", {"top_p": torch.full((n,), 0.7), "any_top_p": True}, 2),
        ("min_p", {"min_p": torch.full((n,), 0.3), "any_min_p": True}, 2),
    ]
    top_p = {"top_p": torch.full((n,), 0.9), "any_top_p": True}  # of all tokens it would allow three
    cases += [
        ("top_p after top_k", {"top_k": torch.full((n,), 3, dtype=torch.int32), "any_top_k": True, **top_p}, 2),
        ("top_p after min_p", {"min_p": torch.full((n,), 0.1), "any_min_p": True, **top_p}, 2),
    ]
    for name, changes, allowed in cases:
        sampled = sampler.sample(row.repeat(n, 1), _batch(n, **changes)).unique().tolist()
        assert sampled == list(range(allowed)), f"{name}: sampled {sampled}, allowed are the first {allowed}"


def _make(cls: type[Sampler], vocab_size: int, device: torch.device = _CPU) -> Sampler:
    return cls(vocab_size, device, parse_options(cls, {}))


def _make_table(rows: int, device: torch.device, greedy: bool) -> SamplingTable:
    """A table of rows with some tokens each, the last of them for padding."""
    return SamplingTable(
        token_ids=torch.zeros(rows, 16, dtype=torch.int32, device=device),
        num_tokens=torch.arange(3, 3 + rows, dtype=torch.int32, device=device),
        temperature=torch.full((rows,), 0.0 if greedy else 0.8, device=device),
        top_k=torch.full((rows,), 20, dtype=torch.int32, device=device),
        top_p=torch.full((rows,), 0.9, device=device),
        min_p=torch.full((rows,), 0.01, device=device),
        seed=torch.arange(rows, dtype=torch.int64, device=device) * 7 + 1,
    )


def _assert_follows(tokens: Tensor, probability: Tensor, what: str) -> None:
    """Raise unless counts of ``tokens`` (n,) pass a chi-square test against ``probability`` (classes,). Samples are the
    same in every run."""
    counts = torch.bincount(tokens.long().cpu(), minlength=len(probability))
    assert len(counts) == len(probability), f"{what}: token {len(counts) - 1} is outside the vocabulary"
    result = ChiSquare.measure(counts, probability)
    assert not result.num_impossible, f"{what}: {result.num_impossible} tokens are not allowed"
    expected = [round(x) for x in (probability.double() * len(tokens)).tolist()]
    assert result.deviations <= _MAX_DEVIATIONS, (
        f"{what}: chi-square is {result.statistic:.1f} with {result.freedom} degrees of freedom, which is more than "
        f"{_MAX_DEVIATIONS} standard deviations above what chance gives; sampled {counts.tolist()}, expected {expected}"
    )


def _logits(n: int, vocab: int) -> Tensor:
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(n * vocab))


def _batch(n: int, **changes: Any) -> SamplingBatch:
    values: dict[str, Any] = {
        "temperature": torch.ones(n),
        "top_k": torch.zeros(n, dtype=torch.int32),
        "top_p": torch.ones(n),
        "min_p": torch.zeros(n),
        "seed": torch.arange(n, dtype=torch.int64) * 7919 + 1,
        "position": torch.arange(n, dtype=torch.int64) + 5,
        "any_random": True,
        "any_top_k": False,
        "any_top_p": False,
        "any_min_p": False,
    }
    return SamplingBatch(**(values | changes))


def _rows(batch: SamplingBatch, rows: Tensor) -> SamplingBatch:
    """The same parameters for a selection of rows."""
    fields = {n: getattr(batch, n) for n in ("temperature", "top_k", "top_p", "min_p", "seed", "position")}
    return _batch(len(rows), **{n: value[rows] for n, value in fields.items()})
