"""The oracle rule: what a generated sequence must satisfy against a reference model, teacher-forced.

At every position the chosen token is the reference's, or the reference's (noise-added) score of the chosen token is
within a tolerance of its best: two summation orders may flip a near tie, and nothing else may differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from quire.core.contracts.sampler import SamplingBatch
from quire.core.sample.filters import apply_filters
from quire.core.sample.noise import gumbel
from quire.core.sampling_params import SamplingParams

__all__ = ["assert_matches_reference", "compute_worst_gap"]


def compute_worst_gap(
    reference: Any, prompt: Sequence[int], tokens: Sequence[int], params: SamplingParams, seed: int = 0
) -> float:
    """The largest amount by which a chosen token falls short of the reference's best, in scaled logits.

    ``reference`` is a transformers causal language model. Penalties and logits processors are not modelled.
    """
    ids = torch.tensor([[*prompt, *tokens]], device=reference.device)
    with torch.inference_mode():
        logits = reference(ids).logits[0, len(prompt) - 1 : -1].float().cpu()  # (len(tokens), vocab)
    chosen = torch.tensor(tokens)
    if not params.greedy:
        n = len(tokens)
        batch = SamplingBatch(
            temperature=torch.full((n,), params.temperature),
            top_k=torch.full((n,), params.top_k, dtype=torch.int32),
            top_p=torch.full((n,), params.top_p),
            min_p=torch.full((n,), params.min_p),
            seed=torch.full((n,), seed, dtype=torch.int64),
            position=len(prompt) + torch.arange(n),
            any_random=True,
            any_top_k=params.top_k > 0,
            any_top_p=params.top_p < 1,
            any_min_p=params.min_p > 0,
        )
        logits = apply_filters(logits / params.temperature, batch) + gumbel(batch.seed, batch.position, logits.shape[1])
    gaps = logits.amax(-1) - logits.gather(-1, chosen[:, None])[:, 0]
    return float(gaps.max()) if len(tokens) else 0.0


def assert_matches_reference(
    reference: Any,
    prompt: Sequence[int],
    tokens: Sequence[int],
    params: SamplingParams,
    seed: int = 0,
    tolerance: float = 1e-3,
) -> None:
    """Raise ``AssertionError`` unless ``tokens`` is what ``reference`` draws after ``prompt``, by the oracle rule."""
    gap = compute_worst_gap(reference, prompt, tokens, params, seed)
    assert gap <= tolerance, f"a chosen token is {gap:.4g} below the reference's best (tolerance {tolerance:g})"
