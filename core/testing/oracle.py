"""The oracle rule: what a generated sequence must satisfy against a reference model, teacher-forced.

At every position the chosen token is the reference's, or the reference's (noise-added) score of the chosen token is
within a tolerance of its best: two summation orders may flip a near tie, and nothing else may differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quire.core.contracts.sampler import SamplingBatch
from quire.core.sample.filters import apply_filters
from quire.core.sample.noise import gumbel
from quire.core.sampling_params import SamplingParams

__all__ = ["assert_matches_reference", "compute_worst_gap"]


def compute_worst_gap(
    reference: Any,
    prompt: Sequence[int],
    tokens: Sequence[int],
    params: SamplingParams,
    seed: int = 0,
    filter_slack: float = 0.0,
) -> float:
    """The largest amount by which a chosen token falls short of the reference's best, in scaled logits.

    ``reference`` is a transformers causal language model. Penalties and logits processors are not modelled. With a
    ``filter_slack``, for an engine of lower precision than the reference, a token at the border of top-k, top-p or
    min-p may be allowed or not: the best is that of filters stricter by this share, the chosen one must pass laxer
    ones.
    """
    ids = torch.tensor([[*prompt, *tokens]], device=reference.device)
    with torch.inference_mode():
        logits = reference(ids).logits[0, len(prompt) - 1 : -1].float().cpu()  # (len(tokens), vocab)
    chosen = torch.tensor(tokens)[:, None]
    best = passing = logits
    if not params.greedy:
        position = len(prompt) + torch.arange(len(tokens))
        scaled = logits / params.temperature
        noise = gumbel(torch.full_like(position, seed), position, logits.shape[1])
        best = apply_filters(scaled.clone(), _batch(params, seed, position, -filter_slack)) + noise
        passing = apply_filters(scaled, _batch(params, seed, position, filter_slack)) + noise
    gaps = best.amax(-1) - passing.gather(-1, chosen)[:, 0]
    return float(gaps.max()) if len(tokens) else 0.0


def assert_matches_reference(
    reference: Any,
    prompt: Sequence[int],
    tokens: Sequence[int],
    params: SamplingParams,
    seed: int = 0,
    tolerance: float = 1e-3,
) -> None:
    """Raise ``AssertionError`` unless ``tokens`` is what ``reference`` samples after ``prompt``, by the oracle rule."""
    gap = compute_worst_gap(reference, prompt, tokens, params, seed)
    assert gap <= tolerance, f"a chosen token is {gap:.4g} below the reference's best (tolerance {tolerance:g})"


def _batch(params: SamplingParams, seed: int, position: Tensor, slack: float) -> SamplingBatch:
    """Parameters for each ``position`` (n,), of filters laxer by ``slack``, or stricter where it is negative."""
    n, round_k = len(position), math.ceil if slack > 0 else math.floor
    return SamplingBatch(
        temperature=torch.full((n,), params.temperature),
        top_k=torch.full((n,), max(1, round_k(params.top_k * (1 + slack))) if params.top_k else 0, dtype=torch.int32),
        top_p=torch.full((n,), max(params.top_p + slack, 1e-9) if params.top_p < 1 else 1.0),
        min_p=torch.full((n,), params.min_p * (1 - slack)),
        seed=torch.full((n,), seed, dtype=torch.int64),
        position=position,
        any_random=True,
        any_top_k=params.top_k > 0,
        any_top_p=params.top_p < 1,
        any_min_p=params.min_p > 0,
    )
