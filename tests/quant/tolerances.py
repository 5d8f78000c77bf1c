"""How far logits may be from those of a format's own weights, relative to their norm, and why.

What is compared: a checkpoint's logits by Quire, and those that transformers computes in float64 from the weights as
the tool that wrote the checkpoint dequantizes them. So the error of quantizing the weights is in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor

__all__ = ["FLOAT32", "assert_near", "get_gpu_tolerance"]

FLOAT32 = 4e-6
"""Of every format on the CPU: its weights are widened exactly, to float32, and activations stay as they are. What is
left is float32's rounding, 6e-8 an operation; 4 to 10e-7 was measured over all fixtures."""


@dataclass(frozen=True)
class GpuTolerance:
    """In bfloat16 on a GPU."""

    fixtures: str
    """A pattern of their names."""
    one_token: float
    """Steps of one token, whose activations are never quantized."""
    prompt: float
    """24 tokens at once."""
    reason: str


GPU = (
    GpuTolerance("ct-mixed-*", 0.05, 0.05, "parts of several formats, of which none quantizes activations"),
    GpuTolerance("*fp8*", 0.03, 0.1, "e4m3 activations keep 4 bits of their significand: 5.8 to 7.5 % was measured"),
    GpuTolerance("*w8a8*", 0.03, 0.06, "int8 activations, in steps of 1/127 of a token's largest: 2.6 % was measured"),
    GpuTolerance("*", 0.03, 0.03, "bfloat16's rounding of activations in models this small: 0.9 to 1.4 % was measured"),
)
"""The first that fits a fixture is its own."""


def get_gpu_tolerance(fixture: str, num_tokens: int) -> float:
    """For steps of ``num_tokens``."""
    tolerance = next(each for each in GPU if fnmatch(fixture, each.fixtures))
    return tolerance.one_token if num_tokens == 1 else tolerance.prompt


def assert_near(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """``got`` differs from ``expected`` by ``tolerance`` of its norm at most."""
    assert got.shape == expected.shape and bool(torch.isfinite(got).all())
    off = ((got.double() - expected.double()).norm() / expected.double().norm()).item()
    assert off <= tolerance, f"off by {off:.2e} of the norm, where {tolerance:.0e} is allowed"
