"""Each kernel for weights of 8 bits, with each fusion, against float64 on the dequantized weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quire.core.contracts.quant import ActivationFormat, QuantActivation
from quire.core.ops import rms_norm, silu_and_mul_quantized
from quire.core.ops.kernels import activation_kernel as activation
from quire.core.ops.kernels import norm_kernel as norm
from quire.core.ops.norm import rms_norm_quantized
from quire.core.ops.quantize import quantize_activation
from quire.plugins.quant.kernels import fp8_quantize
from quire.plugins.quant.kernels.fp8_gemm_medium_m import launch_fp8_gemm_medium_m
from quire.plugins.quant.kernels.fp8_gemm_small_m import launch_fp8_gemm_small_m
from quire.plugins.quant.kernels.fp8_gemv import launch_fp8_gemv, launch_fp8_gemv_k_loop
from quire.plugins.quant.kernels.fp8_layer import dequantize_weight
from quire.plugins.quant.kernels.fp8_quantize import dequantize_activation
from quire.plugins.quant.kernels.int8 import launch_rescale

FP8, INT8 = torch.float8_e4m3fn, torch.int8
PLACES = [
    pytest.param("cpu", torch.float32, 1e-6, id="interpreter"),
    pytest.param("cuda", torch.bfloat16, 4e-3, id="gpu", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float16, 1e-3, id="gpu-f16", marks=pytest.mark.gpu),
]
FUSIONS = [pytest.param(set(), id="plain"), pytest.param({"norm", "bias", "gated", "residual"}, id="fused")]
TYPES = [pytest.param(FP8, id="fp8"), pytest.param(INT8, id="int8")]
EPS = 1e-5


class Problem:
    """A layer, some tokens, and what should come out, in float64."""

    def __init__(
        self,
        device: str,
        dtype: torch.dtype,
        shape: tuple[int, int, int],
        kind: torch.dtype,
        parts: set[str],
        blocks: bool = False,
    ) -> None:
        tokens, features, inputs = shape
        torch.manual_seed(features + tokens)
        width = features // 2 if "gated" in parts else features

        def make(*shape: int) -> Tensor:
            return torch.randn(*shape).to(device, dtype)

        self.x = make(tokens, inputs) * 3
        self.weight = (torch.randn(features, inputs) * 40).clamp(-127, 127).to(kind).to(device)
        sizes = (-(-features // 128), -(-inputs // 128)) if blocks else (features,)
        self.scale = (torch.rand(sizes) + 0.5).to(device) / 40
        self.bias = make(features) if "bias" in parts else None
        self.norm = ((make(inputs) * 0.2 + 1), EPS) if "norm" in parts else None
        self.residual = make(tokens, width) * 10 if "residual" in parts else None
        self.gated = "gated" in parts
        self.out = torch.full((tokens, width), float("nan"), device=device, dtype=dtype)

    def given(self) -> dict[str, Any]:
        return {"scale": self.scale, "gated": self.gated, "residual": self.residual, "enable_pdl": False}

    def check(self, tolerance: float, x: Tensor | None = None) -> None:
        """``x``: what a kernel that multiplies quantized activations was given."""
        x = self.x.cpu().double() if x is None else x.cpu().double()
        if self.norm is not None:
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * self.norm[0].cpu().double()
        weight = dequantize_weight(self.weight.cpu(), self.scale.cpu(), torch.float64)
        y = F.linear(x, weight, None if self.bias is None else self.bias.cpu().double())
        if self.gated:
            gate, up = y.chunk(2, -1)
            y = F.silu(gate) * up
        y = y if self.residual is None else y + self.residual.cpu().double()
        got = self.out.cpu().double()
        assert torch.isfinite(got).all()
        assert (got - y).norm() <= tolerance * y.norm()


@pytest.mark.parametrize(("device", "dtype", "tolerance"), PLACES)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("parts", FUSIONS)
@pytest.mark.parametrize("shape", [(1, 24, 64), (3, 44, 208)])
def test_gemv(
    device: str, dtype: torch.dtype, tolerance: float, kind: torch.dtype, parts: set[str], shape: tuple[int, int, int]
) -> None:
    p = Problem(device, dtype, shape, kind, parts)
    options = {"block_m": shape[0], "block_n": 4, "tiles_per_program": 3, "num_warps": 1}
    launch_fp8_gemv(p.x, p.weight, p.bias, p.out, norm=p.norm, **p.given(), **options)
    p.check(tolerance)


@pytest.mark.parametrize(("device", "dtype", "tolerance"), PLACES)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("parts", FUSIONS)
@pytest.mark.parametrize(("blocks", "features", "inputs"), [(False, 36, 208), (True, 160, 384)])
def test_gemv_k_loop(
    device: str,
    dtype: torch.dtype,
    tolerance: float,
    kind: torch.dtype,
    parts: set[str],
    blocks: bool,
    features: int,
    inputs: int,
) -> None:
    p = Problem(device, dtype, (1, features, inputs), kind, parts, blocks)
    launch_fp8_gemv_k_loop(p.x, p.weight, p.bias, p.out, norm=p.norm, **p.given(), block_n=8, block_k=256, num_warps=1)
    p.check(tolerance)


@pytest.mark.parametrize(("device", "dtype", "tolerance"), PLACES)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("parts", [set(), {"bias", "gated", "residual"}], ids=["plain", "fused"])
@pytest.mark.parametrize(("blocks", "features", "inputs"), [(False, 40, 208), (True, 144, 384)])
def test_gemm_small_m(
    device: str,
    dtype: torch.dtype,
    tolerance: float,
    kind: torch.dtype,
    parts: set[str],
    blocks: bool,
    features: int,
    inputs: int,
) -> None:
    p = Problem(device, dtype, (5, features, inputs), kind, parts, blocks)
    options = {"block_m": 8, "block_n": 16, "block_k": 128 if blocks else 32, "slice_k": 2, "num_stages": 2}
    launch_fp8_gemm_small_m(p.x, p.weight, p.bias, p.out, **p.given(), **options)
    p.check(tolerance)


@pytest.mark.parametrize(("device", "dtype", "tolerance"), PLACES)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("parts", [set(), {"bias", "gated", "residual"}], ids=["plain", "fused"])
@pytest.mark.parametrize("x_is_lhs", [False, True], ids=["rows", "tokens"])
@pytest.mark.parametrize("by", ["row", "block", "block-and-group"])
def test_gemm_medium_m(
    device: str,
    dtype: torch.dtype,
    tolerance: float,
    kind: torch.dtype,
    parts: set[str],
    x_is_lhs: bool,
    by: str,
) -> None:
    """Against the product of the quantized activations."""
    count = 70 if x_is_lhs else 19
    p = Problem(device, dtype, (count, 176, 384), kind, parts, by != "row")
    scale = (torch.rand(3 if by == "block-and-group" else 1, count + 2, device=device).T[:count] + 0.5) / 40
    values = (p.x.float() / 3 * 40).clamp(-127, 127).to(kind)
    x = QuantActivation(values, scale, dtype=dtype)
    options = {"block_m": 64 if x_is_lhs else 16, "block_n": 32 if x_is_lhs else 64, "block_k": 128}
    options |= {"num_warps": 4, "num_stages": 3, "x_is_lhs": x_is_lhs}
    launch_fp8_gemm_medium_m(values, p.weight, p.bias, p.out, x_scale=scale, **p.given(), **options)
    p.check(tolerance + (2e-3 if kind == FP8 and device == "cuda" else 0), dequantize_activation(x).double())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gemm_medium_m_by_one_scale(device: str) -> None:
    p = Problem(device, torch.float32, (3, 64, 128), INT8, set())
    scale = torch.tensor([0.02], device=device)
    values = torch.randint(-100, 100, (3, 128)).to(INT8).to(device)
    options = {"block_m": 8, "block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 2}
    launch_fp8_gemm_medium_m(values, p.weight, None, p.out, x_scale=scale, **p.given(), **options)
    p.check(1e-5, values.double() * scale.double())


def test_rescale() -> None:
    sums = torch.randint(-9999, 9999, (3, 40), dtype=torch.int32)
    x_scale, scale, bias = torch.rand(3, 1), torch.rand(40), torch.rand(40)
    got = launch_rescale(sums, x_scale, scale, bias, torch.float32)
    torch.testing.assert_close(got, sums * x_scale * scale + bias)


# ---- producers of quantized activations

KINDS = [
    pytest.param(ActivationFormat("int8_token"), id="int8"),
    pytest.param(ActivationFormat("fp8_group"), id="groups", marks=pytest.mark.gpu),
    pytest.param(ActivationFormat("fp8_token"), id="fp8", marks=pytest.mark.gpu),  # interpreted casts do not round
    pytest.param(ActivationFormat("fp8_tensor", torch.tensor([0.02])), id="static", marks=pytest.mark.gpu),
]


def same(got: Tensor | QuantActivation, expected: Tensor | QuantActivation) -> None:
    """Up to one step of the format, here and there: the twin rounds the same numbers, computed in another order."""
    assert isinstance(got, QuantActivation) and isinstance(expected, QuantActivation)
    assert got.values.dtype == expected.values.dtype and got.dtype == expected.dtype
    torch.testing.assert_close(got.scale.cpu(), expected.scale.cpu(), rtol=1e-2, atol=0)
    a, b = got.values.cpu().float(), expected.values.cpu().float()
    assert ((a - b).abs() <= 1 + b.abs() / 7).all()
    assert (a != b).float().mean() < 0.05


@pytest.mark.parametrize("wanted", KINDS)
def test_producers(wanted: ActivationFormat) -> None:
    place, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    if wanted.scale is not None:
        wanted = ActivationFormat(wanted.kind, wanted.scale.to(place))
    near = ActivationFormat(wanted.kind, None if wanted.scale is None else wanted.scale.cpu())
    torch.manual_seed(3)
    x, r, gain = (torch.randn(*s).to(place, dtype) for s in ((5, 768), (5, 768), (768,)))
    x[1] = 0
    same(fp8_quantize.launch_quantize_activation(x, wanted), quantize_activation(x.cpu(), near))
    for residual in (None, r):
        got, stream = norm.launch_rms_norm(x, gain, EPS, residual, wanted)
        twin, summed = rms_norm_quantized(x.cpu(), gain.cpu(), EPS, None if residual is None else r.cpu(), near)
        same(got, twin)
        assert torch.equal(stream.cpu(), summed)
    same(activation.launch_silu_and_mul(x, wanted), silu_and_mul_quantized(x.cpu(), near))


def test_a_native_activation_stays_as_it_is() -> None:
    x, gain = torch.randn(3, 64), torch.rand(64)
    native = ActivationFormat()
    assert quantize_activation(x, native) is x
    y, _ = rms_norm_quantized(x, gain, EPS, None, native)
    assert isinstance(y, Tensor) and torch.equal(y, rms_norm(x, gain, EPS)[0])
    assert torch.equal(silu_and_mul_quantized(x, native), F.silu(x[:, :32]) * x[:, 32:])


@pytest.mark.parametrize("kind", ["fp8_group", "fp8_token", "int8_token"])
def test_quantized_activations_are_near(kind: Any) -> None:
    """Half a step: of 4 bits relative for e4m3, of the row's largest over 127 for int8."""
    x = torch.randn(7, 384) * torch.logspace(-3, 3, 7)[:, None]
    q = quantize_activation(x, ActivationFormat(kind))
    assert isinstance(q, QuantActivation)
    off = (dequantize_activation(q) - x).abs()
    most = x.abs().amax(-1, keepdim=True)
    if kind == "fp8_group":
        assert q.scale.shape == (7, 3)
        most = x.view(7, 3, 128).abs().amax(-1).repeat_interleave(128, 1)
    allowed = x.abs() / 16 + most / 448 / 512 if kind.startswith("fp8") else most / 127 / 2
    assert (off <= allowed * 1.001 + 1e-12).all()
