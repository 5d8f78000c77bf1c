"""Linear layers at small batch: each kernel with each fusion against float64, over shapes that do and do not divide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from quire.core.ops.kernels.gemm_medium_m import launch_gemm_medium_m
from quire.core.ops.kernels.gemm_small_m import launch_gemm_small_m
from quire.core.ops.kernels.gemv import launch_gemv, launch_gemv_k_loop

PLACES = [
    pytest.param("cpu", torch.float32, 1e-6, id="interpreter"),
    pytest.param("cuda", torch.bfloat16, 4e-3, id="gpu", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float16, 1e-3, id="gpu-f16", marks=pytest.mark.gpu),
]
FUSIONS = [
    pytest.param({}, id="plain"),
    pytest.param({"norm", "bias"}, id="norm"),
    pytest.param({"norm", "gated"}, id="norm-gated"),
    pytest.param({"residual", "bias", "gated"}, id="residual"),
]
EPS = 1e-5


class Problem:
    """A layer, some tokens, and what should come out, in float64."""

    def __init__(self, device: str, dtype: torch.dtype, tokens: int, features: int, inputs: int, parts: set[str]):
        torch.manual_seed(features + tokens)
        width = features // 2 if "gated" in parts else features

        def make(*shape: int) -> torch.Tensor:
            return torch.randn(*shape).to(device, dtype)

        self.x, self.weight = make(tokens, inputs) * 3, make(features, inputs)
        self.bias = make(features) if "bias" in parts else None
        self.norm = ((make(inputs) * 0.2 + 1), EPS) if "norm" in parts else None
        self.residual = make(tokens, width) * 10 if "residual" in parts else None
        self.gated = "gated" in parts
        self.out = torch.full((tokens, width), float("nan"), device=device, dtype=dtype)

    def fusions(self) -> dict[str, Any]:
        return {"norm": self.norm, "gated": self.gated, "residual": self.residual}

    def expected(self) -> torch.Tensor:
        x = self.x.cpu().double()
        if self.norm is not None:
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * self.norm[0].cpu().double()
        y = F.linear(x, self.weight.cpu().double(), None if self.bias is None else self.bias.cpu().double())
        if self.gated:
            gate, up = y.chunk(2, -1)
            y = F.silu(gate) * up
        return y if self.residual is None else y + self.residual.cpu().double()

    def check(self, tolerance: float) -> None:
        got, expected = self.out.cpu().double(), self.expected()
        assert torch.isfinite(got).all()
        assert (got - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize(("device", "dtype", "tolerance"), PLACES)
@pytest.mark.parametrize("parts", FUSIONS)
@pytest.mark.parametrize(("tokens", "features", "inputs"), [(1, 24, 64), (3, 44, 200)])
def test_gemv(
    device: str, dtype: torch.dtype, tolerance: float, parts: set[str], tokens: int, features: int, inputs: int
) -> None:
    problem = Problem(device, dtype, tokens, features, inputs, parts)
    options = {"block_m": tokens, "block_n": 4, "tiles_per_program": 3, "num_warps": 1, "enable_pdl": False}
    launch_gemv(problem.x, problem.weight, problem.bias, problem.out, **problem.fusions(), **options)
    problem.check(tolerance)


@pytest.mark.parametrize(("device", "dtype", "tolerance"), PLACES)
@pytest.mark.parametrize("parts", FUSIONS)
def test_gemv_k_loop(device: str, dtype: torch.dtype, tolerance: float, parts: set[str]) -> None:
    problem = Problem(device, dtype, 1, 36, 200, parts)
    options = {"block_n": 8, "block_k": 64, "num_warps": 1, "enable_pdl": False}
    launch_gemv_k_loop(problem.x, problem.weight, problem.bias, problem.out, **problem.fusions(), **options)
    problem.check(tolerance)


@pytest.mark.parametrize(("device", "dtype", "tolerance"), PLACES)
@pytest.mark.parametrize("parts", FUSIONS)
@pytest.mark.parametrize(("tokens", "features", "inputs"), [(3, 48, 128), (11, 40, 200)])
def test_gemm_small_m(
    device: str, dtype: torch.dtype, tolerance: float, parts: set[str], tokens: int, features: int, inputs: int
) -> None:
    problem = Problem(device, dtype, tokens, features, inputs, parts)
    options = {"block_m": 16, "block_n": 16, "block_k": 32, "slice_k": 2, "num_stages": 2, "enable_pdl": False}
    launch_gemm_small_m(problem.x, problem.weight, problem.bias, problem.out, **problem.fusions(), **options)
    problem.check(tolerance)


@pytest.mark.parametrize(("device", "dtype", "tolerance"), PLACES)
@pytest.mark.parametrize("parts", [set(), {"bias", "gated", "residual"}], ids=["plain", "residual"])
def test_gemm_medium_m(device: str, dtype: torch.dtype, tolerance: float, parts: set[str]) -> None:
    problem = Problem(device, dtype, 19, 72, 200, parts)
    options = {"block_m": 32, "block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 2, "enable_pdl": False}
    launch_gemm_medium_m(problem.x, problem.weight, problem.bias, problem.out, **problem.fusions(), **options)
    problem.check(tolerance)
