"""Cases of the GEMMs of linear layers, each with a whole epilogue."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from quire.core.ops.device_profile import PROFILES, DeviceProfile
from quire.core.ops.kernels.gemm_medium_m import launch_gemm_medium_m
from quire.core.ops.kernels.gemm_small_m import launch_gemm_small_m
from quire.core.ops.kernels.gemv import launch_gemv, launch_gemv_k_loop
from quire.core.ops.launch_table import LaunchStep
from quire.plugins.quant.kernels import fp8_layer
from quire.plugins.quant.kernels.fp8_gemm_medium_m import launch_fp8_gemm_medium_m
from quire.plugins.quant.kernels.fp8_gemm_small_m import launch_fp8_gemm_small_m
from quire.plugins.quant.kernels.fp8_gemv import launch_fp8_gemv, launch_fp8_gemv_k_loop
from quire.plugins.quant.kernels.int4 import IntWeights
from quire.plugins.quant.kernels.int4_launch import LAUNCHERS, launch_dequantize_int4
from quire.plugins.quant.kernels.int4_table import get_int4_steps

__all__ = ["GEMMS", "RULES"]

FP8, INT8 = torch.float8_e4m3fn, torch.int8


def linear(kernel: Callable[..., None], num_tokens: int, features: int, inputs: int, **options: int) -> None:
    """With everything before (but in ``launch_gemm_medium_m``) and after the layer in the same kernel, with PDL."""
    x, weight = (
        torch.empty(num_tokens, inputs, dtype=torch.bfloat16),
        torch.empty(features, inputs, dtype=torch.bfloat16),
    )
    out = torch.empty(num_tokens, features // 2, dtype=torch.bfloat16)
    kernel(
        x,
        weight,
        weight[:, 0],
        out,
        norm=None if kernel is launch_gemm_medium_m else (x[0], 1e-5),
        gated=True,
        residual=out,
        enable_pdl=True,
        **options,
    )


def int4(
    kernel: str, num_tokens: int, features: int, inputs: int, group: int = 128, bits: int = 4, half: bool = False,
    **options: int,
) -> None:  # fmt: skip
    """As ``linear``, but for the norm."""
    dtype = torch.float16 if half else torch.bfloat16
    tiles, blocks = features // 16, inputs * bits // 512
    words = torch.empty(tiles, blocks, 256, dtype=torch.int32)
    groups = torch.empty(tiles, inputs // group, 16, dtype=torch.int32)
    weights = IntWeights(words, groups, features, inputs, group, bits)
    x, out = torch.empty(num_tokens, inputs, dtype=dtype), torch.empty(num_tokens, features // 2, dtype=dtype)
    arguments = {"bias": torch.empty(features, dtype=dtype), "residual": out, "gated": True}
    LAUNCHERS[kernel](x, weights, out=out, enable_pdl=True, **arguments, **options)


def int4_dequantize(bits: int) -> None:
    words = torch.empty(256, 32, 256, dtype=torch.int32)
    inputs = 16384 // bits
    groups = torch.empty(256, inputs // 64, 16, dtype=torch.int32)
    launch_dequantize_int4(IntWeights(words, groups, 4096, inputs, 64, bits), torch.bfloat16)


def eight_bit(
    kernel: Callable[..., None], num_tokens: int, features: int, inputs: int, kind: torch.dtype, **options: int
) -> None:
    """As ``linear``, with weights of 8 bits; by 128x128 block where told."""
    x = torch.empty(num_tokens, inputs, dtype=torch.bfloat16)
    out = torch.empty(num_tokens, features // 2, dtype=torch.bfloat16)
    blocks = options.pop("blocks", 0)
    arguments: dict[str, Any] = {"scale": torch.empty((features // 128, inputs // 128) if blocks else features)}
    if kernel is launch_fp8_gemm_medium_m:
        arguments |= {"x_scale": torch.empty(inputs // 128 if blocks else 1, num_tokens).T}
    elif kernel is not launch_fp8_gemm_small_m:
        arguments |= {"norm": (x[0], 1e-5)}
    weight = torch.empty(features, inputs, dtype=kind)
    x = x.to(kind) if kernel is launch_fp8_gemm_medium_m else x
    kernel(x, weight, out[0], out, gated=True, residual=out, enable_pdl=True, **arguments, **options)


GEMMS: dict[str, Callable[[], None]] = {
    "gemv": partial(linear, launch_gemv, 1, 28672, 4096, block_m=1, block_n=4, tiles_per_program=28, num_warps=8),
    "gemv-2": partial(linear, launch_gemv, 2, 6144, 1024, block_m=2, block_n=2, tiles_per_program=3, num_warps=4),
    "gemv-k-loop": partial(linear, launch_gemv_k_loop, 1, 4096, 14336, block_n=4, block_k=1024, num_warps=4),
    "small-m-8": partial(
        linear, launch_gemm_small_m, 8, 4096, 14336, block_m=8, block_n=16, block_k=128, slice_k=4, num_stages=3
    ),
    "small-m-32": partial(
        linear, launch_gemm_small_m, 24, 6144, 1024, block_m=32, block_n=32, block_k=64, slice_k=4, num_stages=4
    ),
    "medium-m": partial(
        linear, launch_gemm_medium_m, 32, 6144, 1024, block_m=32, block_n=64, block_k=128, num_warps=4, num_stages=4
    ),
    "int4-small-m-8": partial(
        int4, "gemm_small_m", 8, 4096, 14336, block_m=8, tiles=2, slice_k=8, num_stages=3, unroll_k=1
    ),
    "int4-small-m-16": partial(
        int4, "gemm_small_m", 16, 4096, 4096, group=64, block_m=16, tiles=2, slice_k=4, num_stages=3, unroll_k=2
    ),
    "int4-small-m-8-bits": partial(
        int4, "gemm_small_m", 8, 4096, 4096, bits=8, block_m=8, tiles=2, slice_k=4, num_stages=4, unroll_k=1
    ),
    "int4-small-m-float16": partial(
        int4, "gemm_small_m", 8, 4096, 4096, half=True, block_m=8, tiles=2, slice_k=4, num_stages=4, unroll_k=1
    ),
    "int4-medium-m-32": partial(
        int4,
        "gemm_medium_m",
        32,
        4096,
        14336,
        block_m=32,
        tiles=8,
        split_k=8,
        scale_weights=0,
        num_warps=8,
        num_stages=3,
    ),
    "int4-medium-m-64": partial(
        int4,
        "gemm_medium_m",
        64,
        28672,
        4096,
        block_m=64,
        tiles=8,
        split_k=1,
        scale_weights=0,
        num_warps=8,
        num_stages=3,
    ),
    "int4-medium-m-groups-of-32": partial(
        int4,
        "gemm_medium_m",
        64,
        4096,
        4096,
        group=32,
        block_m=64,
        tiles=8,
        split_k=4,
        scale_weights=0,
        num_warps=8,
        num_stages=3,
    ),
    "int4-medium-m-256": partial(
        int4,
        "gemm_medium_m",
        256,
        4096,
        4096,
        block_m=256,
        tiles=8,
        split_k=1,
        scale_weights=1,
        num_warps=8,
        num_stages=3,
    ),
    "int4-hopper-64": partial(
        int4, "gemm_hopper", 64, 4096, 14336, block_m=64, tiles=4, split_k=4, num_consumers=1, num_warps=4, num_stages=4
    ),
    "int4-hopper-128": partial(
        int4,
        "gemm_hopper",
        128,
        28672,
        4096,
        block_m=128,
        tiles=8,
        split_k=1,
        num_consumers=2,
        num_warps=4,
        num_stages=4,
    ),
    "int4-hopper-256": partial(
        int4,
        "gemm_hopper",
        256,
        28672,
        4096,
        block_m=256,
        tiles=4,
        split_k=1,
        num_consumers=2,
        num_warps=4,
        num_stages=3,
    ),
    "int4-hopper-8-warps": partial(
        int4,
        "gemm_hopper",
        256,
        28672,
        4096,
        block_m=256,
        tiles=8,
        split_k=1,
        num_consumers=1,
        num_warps=8,
        num_stages=3,
    ),
    "int4-hopper-float16": partial(
        int4,
        "gemm_hopper",
        128,
        6144,
        4096,
        half=True,
        block_m=128,
        tiles=4,
        split_k=1,
        num_consumers=2,
        num_warps=4,
        num_stages=5,
    ),
    "int4-dequantize": partial(int4_dequantize, 4),
    "int8-dequantize": partial(int4_dequantize, 8),
    "fp8-gemv": partial(
        eight_bit, launch_fp8_gemv, 1, 6144, 4096, FP8, block_m=1, block_n=2, tiles_per_program=6, num_warps=8
    ),
    "int8-gemv": partial(
        eight_bit, launch_fp8_gemv, 2, 6144, 4096, INT8, block_m=2, block_n=2, tiles_per_program=6, num_warps=8
    ),
    "fp8-gemv-k-loop": partial(
        eight_bit, launch_fp8_gemv_k_loop, 1, 4096, 14336, FP8, block_n=4, block_k=1024, num_warps=2
    ),
    "fp8-gemv-k-loop-blocks": partial(
        eight_bit, launch_fp8_gemv_k_loop, 1, 4096, 4096, FP8, block_n=4, block_k=1024, num_warps=2, blocks=1
    ),
    "fp8-small-m": partial(
        eight_bit,
        launch_fp8_gemm_small_m,
        8,
        4096,
        14336,
        FP8,
        block_m=8,
        block_n=16,
        block_k=128,
        slice_k=4,
        num_stages=6,
    ),
    "fp8-small-m-blocks": partial(
        eight_bit,
        launch_fp8_gemm_small_m,
        8,
        4096,
        4096,
        FP8,
        block_m=8,
        block_n=16,
        block_k=128,
        slice_k=4,
        num_stages=6,
        blocks=1,
    ),
    "fp8-medium-m": partial(
        eight_bit,
        launch_fp8_gemm_medium_m,
        32,
        4096,
        14336,
        FP8,
        block_m=32,
        block_n=64,
        block_k=256,
        num_warps=4,
        num_stages=6,
    ),
    "int8-medium-m": partial(
        eight_bit,
        launch_fp8_gemm_medium_m,
        128,
        4096,
        4096,
        INT8,
        block_m=128,
        block_n=64,
        block_k=128,
        num_warps=4,
        num_stages=4,
    ),
    "fp8-medium-m-x-lhs": partial(
        eight_bit,
        launch_fp8_gemm_medium_m,
        64,
        4096,
        4096,
        FP8,
        block_m=64,
        block_n=32,
        block_k=256,
        num_warps=4,
        num_stages=6,
        x_is_lhs=True,
    ),
    "fp8-medium-m-blocks": partial(
        eight_bit,
        launch_fp8_gemm_medium_m,
        32,
        4096,
        4096,
        FP8,
        block_m=32,
        block_n=64,
        block_k=128,
        num_warps=4,
        num_stages=6,
        blocks=1,
    ),
}


def by_rule(
    steps: tuple[LaunchStep, ...], launchers: dict[str, Callable[..., None]], call: Callable[..., None]
) -> None:
    """All that a rule chooses for a layer of 4096 x 4096."""
    for max_tokens, launches in steps:
        for launch in launches:
            if launch is not None:
                call(launchers[launch.kernel], max_tokens, 4096, 4096, **launch.options)


def make_rule_cases(profile: DeviceProfile) -> dict[str, Callable[[], None]]:
    """A case for each format, with the launches of its rule on the card of ``profile``."""

    def quantized(dtype: torch.dtype) -> None:
        steps = fp8_layer.get_eight_bit_steps(profile, 4096, 4096, dtype)
        by_rule(
            steps, fp8_layer.LAUNCHERS, lambda kernel, *shape, **options: eight_bit(kernel, *shape, dtype, **options)
        )

    def grouped() -> None:
        names = {name: name for name in LAUNCHERS}
        by_rule(get_int4_steps(profile, 4096, 4096, 4, True), names, int4)  # type: ignore[arg-type]

    cases = {"rule-int8": partial(quantized, INT8), "rule-w4a16": grouped}
    return cases | ({"rule-fp8": partial(quantized, FP8)} if profile.has_fp8 else {})


RULES = {
    profile.capability[0] * 10 + profile.capability[1]: make_rule_cases(profile)
    for profile in PROFILES
    if profile.name in ("A100", "L4")
}
"""Capability -> cases of its own: cards without a table launch what the rules choose for them."""
