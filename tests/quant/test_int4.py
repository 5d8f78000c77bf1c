"""Int4 and int8 weights: each kernel with each fusion against float64, over groups and shapes that do not divide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.plugins.quant.kernels.int4 import (
    IntWeights,
    apply_linear,
    dequantize_weights,
    pack_weights,
    reference_linear,
)
from quire.plugins.quant.kernels.int4_launch import LAUNCHERS, launch_dequantize_int4

PLACES = [
    pytest.param("cpu", torch.float32, 1e-6, id="interpreter"),
    pytest.param("cuda", torch.bfloat16, 7e-3, id="gpu", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float16, 1e-3, id="gpu-f16", marks=pytest.mark.gpu),
]
SMALL_M = {"tiles": 2, "slice_k": 2}
KERNELS = [
    pytest.param("gemm_small_m", {"block_m": 8, "num_stages": 2, "unroll_k": 2, **SMALL_M}, 1, id="small-m-unrolled"),
    pytest.param("gemm_small_m", {"block_m": 8, "num_stages": 2, "unroll_k": 1, **SMALL_M}, 3, id="small-m"),
    pytest.param(
        "gemm_medium_m",
        {"block_m": 16, "tiles": 4, "split_k": 1, "scale_weights": 0, "num_warps": 4, "num_stages": 2},
        19,
        id="medium-m",
    ),
    pytest.param(
        "gemm_medium_m",
        {"block_m": 16, "tiles": 4, "split_k": 2, "scale_weights": 1, "num_warps": 4, "num_stages": 2},
        7,
        id="medium-m-split",
    ),
]
FUSIONS = [
    pytest.param(set(), id="plain"),
    pytest.param({"bias", "gated"}, id="gated"),
    pytest.param({"bias", "residual"}, id="residual"),
]
SHAPES = [  # features, inputs, group size, bits, zero points
    pytest.param(64, 256, 128, 4, True, id="g128"),
    pytest.param(96, 160, 32, 4, True, id="g32"),
    pytest.param(96, 192, 64, 4, False, id="g64-symmetric"),
    pytest.param(40, 200, -1, 4, True, id="row"),
    pytest.param(64, 192, 64, 8, True, id="8bit-g64"),
    pytest.param(32, 160, 32, 8, False, id="8bit-g32-symmetric"),
]


def quantized(features: int, inputs: int, group: int, bits: int, zeros: bool, device: str) -> tuple[Any, ...]:
    """Codes, scales and zero points."""
    torch.manual_seed(features * inputs + group)
    count = 1 if group == -1 else inputs // group
    codes = torch.randint(0, 1 << bits, (features, inputs), dtype=torch.uint8)
    scales = (torch.rand(features, count) + 0.1).half() / 16
    zero = torch.randint(0, 1 << bits, (features, count), dtype=torch.uint8) if zeros else None
    return codes.to(device), scales.to(device), None if zero is None else zero.to(device)


def dense(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int) -> torch.Tensor:
    times = codes.shape[1] // scales.shape[1]
    zero = torch.full_like(scales, 1 << (bits - 1)) if zeros is None else zeros
    return (codes.double() - zero.double().repeat_interleave(times, 1)) * scales.double().repeat_interleave(times, 1)


def packed(features: int, inputs: int, group: int, bits: int, zeros: bool, device: str) -> IntWeights:
    weights = pack_weights(*quantized(features, inputs, group, bits, zeros, device), group, bits)
    assert weights is not None
    return weights


def operands(weights: IntWeights, tokens: int, parts: set[str], dtype: torch.dtype) -> dict[str, Any]:
    device = weights.words.device
    width = weights.features // 2 if "gated" in parts else weights.features

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(device, dtype)

    return {
        "x": make(tokens, weights.inputs) * 0.2,  # so that float16 holds the product of gate and up
        "bias": make(weights.features) if "bias" in parts else None,
        "residual": make(tokens, width) if "residual" in parts else None,
    }


def check(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    assert torch.isfinite(got).all()
    assert (got.double() - expected).norm() <= tolerance * expected.norm()


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_nothing_is_lost_in_packing(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from([4, 8]))
    group = data.draw(st.sampled_from([32, 64, 128, -1]))
    inputs = data.draw(st.integers(1, 90)) if group == -1 else group * data.draw(st.integers(1, 3))
    features, zeros = data.draw(st.integers(1, 50)), data.draw(st.booleans())
    parts = quantized(features, inputs, group, bits, zeros, "cpu")
    weights = pack_weights(*parts, group, bits)
    assert weights is not None
    assert torch.equal(dequantize_weights(weights, torch.float64), dense(*parts, bits))


@pytest.mark.parametrize(("group", "bits"), [(16, 4), (96, 4), (48, 8), (128, 3)])
def test_groups_without_a_kernel(group: int, bits: int) -> None:
    codes, scales = torch.zeros(16, 384, dtype=torch.uint8), torch.zeros(16, 384 // group)
    assert pack_weights(codes, scales, None, group, bits) is None


def test_scales_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(16, 3\), not \(16, 2\)"):
        pack_weights(torch.zeros(16, 256, dtype=torch.uint8), torch.zeros(16, 3), None, 128)


@pytest.mark.parametrize(("device", "dtype", "tolerance"), PLACES)
@pytest.mark.parametrize("parts", FUSIONS)
@pytest.mark.parametrize(("features", "inputs", "group", "bits", "zeros"), SHAPES[:1] + SHAPES[3:4])
@pytest.mark.parametrize(("kernel", "options", "tokens"), KERNELS)
def test_kernels(
    device: str, dtype: torch.dtype, tolerance: float, parts: set[str], features: int, inputs: int, group: int,
    bits: int, zeros: bool, kernel: str, options: dict[str, int], tokens: int,
) -> None:  # fmt: skip
    gated = "gated" in parts and features % 32 == 0
    parts = parts if gated else parts - {"gated"}
    weights = packed(features, inputs, group, bits, zeros, device)
    arguments = operands(weights, tokens, parts, dtype)
    out = torch.full((tokens, features // 2 if gated else features), float("nan"), dtype=dtype, device=device)
    LAUNCHERS[kernel](weights=weights, out=out, gated=gated, enable_pdl=False, **arguments, **options)
    check(out, reference_linear(weights=weights, activation="silu" if gated else None, **arguments), tolerance)


@pytest.mark.parametrize(("device", "dtype", "tolerance"), PLACES)
@pytest.mark.parametrize(("features", "inputs", "group", "bits", "zeros"), SHAPES)
@pytest.mark.parametrize(("kernel", "options", "tokens"), KERNELS[1:3])
def test_groups(
    device: str, dtype: torch.dtype, tolerance: float, features: int, inputs: int, group: int, bits: int, zeros: bool,
    kernel: str, options: dict[str, int], tokens: int,
) -> None:  # fmt: skip
    weights = packed(features, inputs, group, bits, zeros, device)
    arguments = operands(weights, tokens, set(), dtype)
    out = torch.full((tokens, features), float("nan"), dtype=dtype, device=device)
    LAUNCHERS[kernel](weights=weights, out=out, enable_pdl=False, **arguments, **options)
    check(out, reference_linear(weights=weights, **arguments), tolerance)


@pytest.mark.parametrize(("device", "dtype", "tolerance"), PLACES)
@pytest.mark.parametrize(("features", "inputs", "group", "bits", "zeros"), SHAPES)
def test_dequantize(
    device: str, dtype: torch.dtype, tolerance: float, features: int, inputs: int, group: int, bits: int, zeros: bool
) -> None:
    weights = packed(features, inputs, group, bits, zeros, device)
    check(
        launch_dequantize_int4(weights, dtype, blocks_per_program=2),
        dequantize_weights(weights, torch.float64),
        tolerance,
    )


@pytest.mark.parametrize("tokens", [1, 3])
def test_linear_on_the_cpu(tokens: int) -> None:
    weights = packed(96, 192, 64, 4, True, "cpu")
    arguments = operands(weights, tokens, {"bias"}, torch.float32)
    out = apply_linear(arguments["x"], weights, arguments["bias"])
    assert out is not None
    check(out, reference_linear(arguments["x"], weights, arguments["bias"]), 1e-6)
    assert apply_linear(arguments["x"], weights, residual=out) is None


HOPPER = [  # block_m, tiles, split_k, num_consumers, warps, stages
    pytest.param((128, 8, 1, 2, 4, 4), id="128-tokens"),
    pytest.param((256, 4, 3, 2, 4, 3), id="256-tokens-split"),
    pytest.param((256, 8, 2, 1, 8, 3), id="8-warps-split"),
    pytest.param((64, 4, 1, 1, 4, 4), id="64-tokens"),
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="Hopper only")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parts", FUSIONS)
@pytest.mark.parametrize("options", HOPPER)
def test_hopper(options: tuple[int, ...], parts: set[str], dtype: torch.dtype) -> None:
    """Many times over: products are in flight while the next weights are unpacked."""
    features, inputs, group = [(1056, 1280, 128), (544, 2048, 256), (416, 2688, 128)][(options[0] + len(parts)) % 3]
    weights = packed(features, inputs, group, 4, True, "cuda")
    names = ("block_m", "tiles", "split_k", "num_consumers", "num_warps", "num_stages")
    for tokens in (1, 100, 128, 300):
        arguments = operands(weights, tokens, parts, dtype)
        expected = reference_linear(weights=weights, activation="silu" if "gated" in parts else None, **arguments)
        outs = [torch.full_like(expected, float("nan"), dtype=dtype) for _ in range(8)]
        for out in outs:
            LAUNCHERS["gemm_hopper"](
                weights=weights, out=out, gated="gated" in parts, enable_pdl=True, **arguments,
                **dict(zip(names, options, strict=True)),
            )  # fmt: skip
        check(outs[0], expected, 7e-3 if dtype == torch.bfloat16 else 1e-3)
        assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(
    ("features", "inputs", "group", "bits", "zeros"),
    [
        (6144, 4096, 128, 4, True),
        (4096, 14336, 128, 4, True),
        (1056, 1312, 32, 4, True),
        (544, 448, 64, 4, False),
        (200, 712, -1, 4, True),
        (1056, 1280, 128, 8, False),
    ],
)
def test_any_number_of_tokens(
    features: int, inputs: int, group: int, bits: int, zeros: bool, activation: str | None, dtype: torch.dtype
) -> None:
    weights = packed(features, inputs, group, bits, zeros, "cuda")
    for tokens in (1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 130, 257, 300, 700):
        arguments = operands(weights, tokens, {"bias"} if activation else {"residual"}, dtype)
        out = apply_linear(weights=weights, activation=activation, **arguments)
        if out is None:
            arguments["residual"], activation_now = None, None
            out = apply_linear(weights=weights, **arguments)
            assert out is not None
        else:
            activation_now = activation
        check(out, reference_linear(weights=weights, activation=activation_now, **arguments), 8e-3)
        again = apply_linear(weights=weights, activation=activation_now, **arguments)
        assert again is not None and torch.equal(out, again)
