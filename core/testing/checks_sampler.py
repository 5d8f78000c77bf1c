"""What every sampler must keep: the token is a function of logits, parameters, seed and position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quire.core.contracts.sampler import Sampler, SamplingBatch

__all__ = [
    "check_a_row_does_not_depend_on_its_neighbours",
    "check_position_and_seed_matter",
    "check_result_is_one_int32_per_row",
    "check_same_seed_and_position_sample_the_same_token",
    "check_samples_follow_the_distribution",
    "check_temperature_zero_is_the_argmax",
    "check_top_k_top_p_and_min_p_restrict",
]

_CPU = torch.device("cpu")


def check_result_is_one_int32_per_row(cls: type[Sampler]) -> None:
    """(n, vocab) logits give (n,) int32 tokens inside the vocabulary."""
    tokens = cls(16, _CPU).sample(_logits(5, 16), _batch(5))
    assert tokens.shape == (5,) and tokens.dtype == torch.int32, f"got {tuple(tokens.shape)} {tokens.dtype}"
    assert bool(((tokens >= 0) & (tokens < 16)).all()), "sampled a token outside the vocabulary"


def check_temperature_zero_is_the_argmax(cls: type[Sampler]) -> None:
    """Greedy rows take the largest logit, also beside random rows."""
    logits = _logits(6, 32)
    temperature = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    tokens = cls(32, _CPU).sample(logits.clone(), _batch(6, temperature=temperature))
    assert torch.equal(tokens[::2].long(), logits[::2].argmax(-1)), "a greedy row is not the argmax"


def check_same_seed_and_position_sample_the_same_token(cls: type[Sampler]) -> None:
    """Sampling twice gives the same tokens: there is no hidden generator."""
    sampler, logits = cls(64, _CPU), _logits(8, 64)
    first = sampler.sample(logits.clone(), _batch(8))
    assert torch.equal(first, sampler.sample(logits.clone(), _batch(8))), "sampling twice differs"
    assert torch.equal(first, cls(64, _CPU).sample(logits.clone(), _batch(8))), "two samplers differ"


def check_a_row_does_not_depend_on_its_neighbours(cls: type[Sampler]) -> None:
    """A request samples the same token alone, in company, and in another place of the batch."""
    sampler, logits, batch = cls(64, _CPU), _logits(8, 64), _batch(8)
    together = sampler.sample(logits.clone(), batch)
    for row in range(8):
        alone = sampler.sample(logits[row : row + 1].clone(), _rows(batch, torch.tensor([row])))
        assert int(alone[0]) == int(together[row]), f"row {row} samples another token alone"
    order = torch.arange(7, -1, -1)
    turned = sampler.sample(logits[order].clone(), _rows(batch, order))
    assert torch.equal(turned, together[order]), "the order of the rows matters"


def check_position_and_seed_matter(cls: type[Sampler]) -> None:
    """Flat logits give many different tokens over positions, and over seeds."""
    sampler, flat = cls(64, _CPU), torch.zeros(64, 64)
    by_position = sampler.sample(flat.clone(), _batch(64, seed=torch.full((64,), 7)))
    by_seed = sampler.sample(flat.clone(), _batch(64, position=torch.full((64,), 3)))
    assert by_position.unique().numel() > 16, "the position hardly changes the noise"
    assert by_seed.unique().numel() > 16, "the seed hardly changes the noise"


def check_samples_follow_the_distribution(cls: type[Sampler]) -> None:
    """Frequencies over 8,192 positions are the softmax's within 0.03, at two temperatures."""
    row, n = torch.tensor([0.0, 0.5, 1.0, 2.0, -1.0, 0.2, 1.5, -3.0]), 8192
    for temperature in (1.0, 0.5):
        tokens = cls(8, _CPU).sample(row.repeat(n, 1), _batch(n, temperature=torch.full((n,), temperature)))
        frequencies = torch.bincount(tokens.long(), minlength=8) / n
        error = (frequencies - torch.softmax(row / temperature, -1)).abs().max().item()
        assert error < 0.03, f"temperature {temperature}: a frequency is off by {error:.3f}"


def check_top_k_top_p_and_min_p_restrict(cls: type[Sampler]) -> None:
    """Only the allowed tokens are sampled, row by row, each restriction on its own."""
    row, n = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0, -2.0]), 512
    sampler = cls(6, _CPU)
    cases: list[tuple[str, dict[str, Any], int]] = [
        ("top_k", {"top_k": torch.full((n,), 2, dtype=torch.int32), "any_top_k": True}, 2),
        ("top_p", {"top_p": torch.full((n,), 0.7), "any_top_p": True}, 2),
        ("min_p", {"min_p": torch.full((n,), 0.3), "any_min_p": True}, 2),
    ]
    for name, changes, allowed in cases:
        sampled = sampler.sample(row.repeat(n, 1), _batch(n, **changes)).unique().tolist()
        assert sampled == list(range(allowed)), f"{name}: sampled {sampled}, allowed are the first {allowed}"


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
