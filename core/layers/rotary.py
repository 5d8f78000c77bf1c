"""Rotary tables: every variant that the Llama, Mistral and Qwen families use in transformers.

A table has one row a position: the cosines, then the sines, of ``position * inverse frequency``, in float32 and times
the variant's attention factor. ``config.rope_parameters`` is transformers' spelling (v5; v4 checkpoints are converted
when the configuration is read).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quire.core.errors import CheckpointError

__all__ = ["list_rope_types", "make_rope_table"]

_Parameters = Mapping[str, Any]


class _Frequencies(NamedTuple):
    inv_freq: Tensor  # (rotary_dim / 2,) float32, or (positions, rotary_dim / 2)
    attention_factor: float
    """Cosines and sines are multiplied by it."""


def make_rope_table(hf_config: Any, head_dim: int, max_positions: int, device: torch.device) -> Tensor:
    """(max_positions, rotary_dim) float32 for ``hf_config.rope_parameters``.

    Raises ``CheckpointError`` for a variant these families do not have.
    """
    parameters = dict(hf_config.rope_parameters)
    rope_type = parameters.get("rope_type", "default")
    positions = torch.arange(max_positions, dtype=torch.float32, device=device)
    dim = int(head_dim * _get_rotary_fraction(parameters, rope_type))
    if rope_type == "dynamic":
        inv_freq, factor = _compute_dynamic_ntk(parameters, dim, positions, hf_config.max_position_embeddings)
        angles = positions[:, None] * inv_freq
    elif rope_type in _ROPE_VARIANTS:
        inv_freq, factor = _ROPE_VARIANTS[rope_type](parameters, dim, hf_config.max_position_embeddings)
        angles = positions[:, None] * inv_freq.to(device)  # (max_positions, rotary_dim / 2)
    else:
        known = ", ".join(list_rope_types())
        raise CheckpointError(
            f"rope_type {rope_type!r} in config.json is not supported; this architecture knows {known}"
        )
    return torch.cat([angles.cos() * factor, angles.sin() * factor], dim=-1)


def list_rope_types() -> list[str]:
    """The names ``rope_type`` may have."""
    return sorted([*_ROPE_VARIANTS, "dynamic"])


def _get_rotary_fraction(parameters: _Parameters, rope_type: str) -> float:
    """The part of a head that is rotated. With the default type transformers always rotates the whole head in these
    families."""
    return 1.0 if rope_type == "default" else float(parameters.get("partial_rotary_factor") or 1.0)


def _compute_inv_freq(base: float, dim: int) -> Tensor:
    return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))


def _compute_default(parameters: _Parameters, dim: int, max_position: int) -> _Frequencies:
    """Su et al., 2021, arXiv:2104.09864."""
    return _Frequencies(_compute_inv_freq(parameters["rope_theta"], dim), 1.0)


def _compute_linear(parameters: _Parameters, dim: int, max_position: int) -> _Frequencies:
    """Position interpolation: Chen et al., 2023, arXiv:2306.15595."""
    return _Frequencies(_compute_inv_freq(parameters["rope_theta"], dim) / parameters["factor"], 1.0)


def _compute_dynamic_ntk(parameters: _Parameters, dim: int, positions: Tensor, max_position: int) -> _Frequencies:
    """Dynamic NTK: past the trained length the base grows with the length. Returns (positions, dim / 2) frequencies.

    Here a position's frequencies come from its own index, as transformers computes them when it decodes one token at
    a time. So a cached key never depends on what came after it, and chunks, prefix hits and batches change nothing;
    a prompt longer than the trained length differs from transformers', which gives all of it the last one's base.
    """
    factor = parameters["factor"]
    length = (positions.double() + 1).clamp(min=max_position)
    base = parameters["rope_theta"] * (factor * length / max_position - (factor - 1)) ** (dim / (dim - 2))
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
    return _Frequencies(1.0 / (base[:, None].float() ** exponent), 1.0)


def _compute_yarn(parameters: _Parameters, dim: int, max_position: int) -> _Frequencies:
    """YaRN: Peng et al., 2023, arXiv:2309.00071; ``mscale`` as DeepSeek added it."""
    base, original = parameters["rope_theta"], parameters["original_max_position_embeddings"]
    factor = parameters["factor"] or max_position / original

    def find_correction_dim(rotations: float) -> float:
        """The dimension whose angle makes so many full turns over the trained length."""
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = (
        find_correction_dim(parameters.get("beta_fast") or 32),
        find_correction_dim(parameters.get("beta_slow") or 1),
    )
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    inv_freq = _compute_inv_freq(base, dim)
    inv_freq = inv_freq / factor * ramp + inv_freq * (1 - ramp)
    return _Frequencies(inv_freq, _compute_yarn_attention_factor(parameters, factor))


def _compute_yarn_attention_factor(parameters: _Parameters, factor: float) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    factor_in_config = parameters.get("attention_factor")
    if factor_in_config is not None:
        return float(factor_in_config)
    weight, weight_all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return mscale(weight) / mscale(weight_all_dim) if weight and weight_all_dim else mscale(1.0)


def _compute_llama3(parameters: _Parameters, dim: int, max_position: int) -> _Frequencies:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between blended."""
    inv_freq = _compute_inv_freq(parameters["rope_theta"], dim)
    factor, original = parameters["factor"], parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    inv_freq = torch.where(
        wavelength > original / low,
        inv_freq / factor,
        torch.where(wavelength < original / high, inv_freq, blended),
    )
    return _Frequencies(inv_freq, 1.0)


_ROPE_VARIANTS: dict[str, Callable[[_Parameters, int, int], _Frequencies]] = {
    "default": _compute_default,
    "linear": _compute_linear,
    "yarn": _compute_yarn,
    "llama3": _compute_llama3,
}
