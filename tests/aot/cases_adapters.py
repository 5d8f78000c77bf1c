"""Cases of the LoRA kernels: the layers of an 8B model, for few and many tokens; and of few, which their layers' own
kernels add."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from quire.core.contracts.attention import LayerKV
from quire.core.ops.kernels.gemm_small_m import launch_gemm_small_m
from quire.core.ops.kernels.gemv import launch_gemv, launch_gemv_k_loop
from quire.core.ops.kernels.rope_kernel import launch_rope_and_cache
from quire.plugins.adapters.lora.appended_kernels import launch_add_appended, launch_add_appended_and_norm
from quire.plugins.adapters.lora.batch import AdapterBatch
from quire.plugins.adapters.lora.kernels import launch_lora
from quire.plugins.adapters.lora.partial_kernels import launch_add_to_partial
from quire.plugins.quant.kernels.fp8_gemm_small_m import launch_fp8_gemm_small_m
from quire.plugins.quant.kernels.fp8_gemv import launch_fp8_gemv, launch_fp8_gemv_k_loop
from quire.plugins.quant.kernels.int4 import IntWeights
from quire.plugins.quant.kernels.int4_launch import PARTIAL_LAUNCHERS, launch_int4_gemm_small_m
from quire.sdk import ActivationFormat, AdapterLimits, AppendedTerm, LowRankTerm

__all__ = ["ADAPTERS"]


def lora(
    num_tokens: int, part_sizes: tuple[int, ...], inputs: int, max_rank: int, half: bool = False, norm: bool = False
) -> None:
    """With PDL, where the target has it."""
    dtype = torch.float16 if half else torch.bfloat16
    batch = AdapterBatch(AdapterLimits(8, max_rank, 4096, dtype, torch.device("cpu")))
    batch.update(np.arange(num_tokens, dtype=np.int32) % 8, is_captured=True)
    parts, features = len(part_sizes), sum(part_sizes)
    launch_lora(
        torch.empty(num_tokens, inputs, dtype=dtype),
        torch.empty(num_tokens, features, dtype=dtype),
        torch.empty(8, parts, max_rank, inputs, dtype=dtype),
        torch.empty(8, max_rank, features, dtype=dtype),
        torch.empty(8, parts, dtype=torch.int32),
        part_sizes,
        batch,
        (torch.empty(inputs, dtype=dtype), 1e-5) if norm else None,
    )


def product(
    kernel: Callable[..., None], num_tokens: int, part_sizes: tuple[int, ...], inputs: int, *, max_rank: int = 16,
    norm: bool = False, gated: bool = False, shrinks: bool = False, **options: Any,
) -> None:  # fmt: skip
    """A layer's kernel that adds adapters, with PDL where the target has it. ``shrinks``: all of it."""
    features, parts, dtype = sum(part_sizes), len(part_sizes), torch.bfloat16
    x = torch.empty(num_tokens, inputs, dtype=dtype)
    out = torch.empty(num_tokens, features // 2 if gated else features, dtype=dtype)
    weight: Any = torch.empty(features, inputs, dtype=torch.float8_e4m3fn if "fp8" in kernel.__name__ else dtype)
    if "fp8" in kernel.__name__:
        options["scale"] = torch.empty(features)
    if "int4" in kernel.__name__:
        words = torch.empty(features // 16, inputs // 128, 256, dtype=torch.int32)
        groups = torch.empty(features // 16, inputs // 128, 16, dtype=torch.int32)
        weight = IntWeights(words, groups, features, inputs, 128, 4)
    elif kernel is not launch_fp8_gemm_small_m:
        options["norm"] = (x[0], 1e-5) if norm else None
    batch = AdapterBatch(AdapterLimits(8, max_rank, 4096, dtype, torch.device("cpu")))
    batch.update(np.arange(num_tokens, dtype=np.int32) % 8, is_captured=True)
    a = torch.empty(8, parts, max_rank, inputs, dtype=dtype)
    term = LowRankTerm(
        None if shrinks else torch.empty(4, num_tokens, parts * max_rank),
        torch.empty(8, max_rank, features, dtype=dtype),
        torch.empty(8, parts, dtype=torch.int32),
        batch.slots,
        part_sizes,
        batch.describe_shrink(a, 0) if shrinks else None,
    )
    kernel(x, weight, None, out, gated=gated, residual=out, adapters=term, enable_pdl=True, **options)


def partial_sums(
    kernel: str, num_tokens: int, part_sizes: tuple[int, ...], inputs: int, num_slots: int, *, max_rank: int = 16,
    gated: bool = False, residual: bool = False, half: bool = False, **options: Any,
) -> None:  # fmt: skip
    """An int4 layer's partial sums, and what adds adapters to them, with PDL where the target has it."""
    features, parts, dtype = sum(part_sizes), len(part_sizes), torch.float16 if half else torch.bfloat16
    words = torch.empty(features // 16, inputs // 128, 256, dtype=torch.int32)
    weight = IntWeights(words, words[:, :, :16].contiguous(), features, inputs, 128, 4)
    x = torch.empty(num_tokens, inputs, dtype=dtype)
    batch = AdapterBatch(AdapterLimits(64, max_rank, 4096, dtype, torch.device("cpu")))
    token_slots = np.arange(num_tokens, dtype=np.int32) % num_slots
    batch.update(token_slots, is_captured=True)
    batch.tiles.update(token_slots, num_slots)
    a, b = torch.empty(64, parts, max_rank, inputs, dtype=dtype), torch.empty(64, max_rank, features, dtype=dtype)
    ranks, shrink = torch.empty(64, parts, dtype=torch.int32), batch.describe_shrink(a, 0)
    term = LowRankTerm(None, b, ranks, batch.slots, part_sizes, shrink)
    sums = PARTIAL_LAUNCHERS[kernel](x, weight, None, None, enable_pdl=True, **options)
    launch_add_to_partial(x, sums, None, term, batch, gated=gated, residual=x[:, :features] if residual else None)


def appended(
    num_tokens: int, part_sizes: tuple[int, ...], num_slots: int, *, max_rank: int = 16, gated: bool = False,
    residual: bool = False, norm: bool = False, half: bool = False,
) -> None:  # fmt: skip
    """What reads the first product behind a layer's, with PDL where the target has it."""
    dtype, features = torch.float16 if half else torch.bfloat16, sum(part_sizes)
    batch = AdapterBatch(AdapterLimits(64, max_rank, 4096, dtype, torch.device("cpu")))
    batch.tiles.update(np.arange(num_tokens, dtype=np.int32) % num_slots, num_slots)
    wide = torch.empty(num_tokens, features + 64 * max_rank * len(part_sizes), dtype=dtype)
    b, ranks = torch.empty(64, max_rank, features, dtype=dtype), torch.empty(64, len(part_sizes), dtype=torch.int32)
    stream = torch.empty(num_tokens, features, dtype=dtype)
    if norm:
        launch_add_appended_and_norm(wide, b, ranks, batch, stream, (stream[0], 1e-5), ActivationFormat())
    else:
        launch_add_appended(wide, b, ranks, part_sizes, batch, gated=gated, residual=stream if residual else None)


def appended_rope(dim: int, rotary_dim: int, normed: bool, max_rank: int) -> None:
    """The rotary embedding that adds adapters to queries, keys and values."""
    dtype, sizes = torch.bfloat16, (32 * dim, 8 * dim, 8 * dim)
    wide, b = (
        torch.empty(32, sum(sizes) + 24 * max_rank, dtype=dtype),
        torch.empty(8, max_rank, sum(sizes), dtype=dtype),
    )
    ints, positions = torch.zeros(32, dtype=torch.int32), torch.arange(32)
    term = AppendedTerm(wide[:, sum(sizes) :], b, torch.zeros(8, 3, dtype=torch.int32), ints)
    q, k, v = (x.unflatten(1, (-1, dim)) for x in wide[:, : sum(sizes)].split(sizes, 1))
    cache, norm = torch.empty(2, 2, 8, 16, dim, dtype=dtype), torch.empty(dim, dtype=dtype) if normed else None
    kv = LayerKV(cache[0], cache[1])
    launch_rope_and_cache(q, k, v, positions, torch.empty(64, rotary_dim), kv, positions, norm, norm, 1e-6, term)


_QKV, _GATE_UP = (4096, 1024, 1024), (14336, 14336)
ADAPTERS = {
    "gemv-adapters": partial(
        product, launch_gemv, 1, _QKV, 4096, norm=True, block_m=1, block_n=2, tiles_per_program=3, num_warps=8
    ),
    "gemv-gated-adapters": partial(
        product, launch_gemv, 1, _GATE_UP, 4096, norm=True, gated=True,
        block_m=1, block_n=2, tiles_per_program=28, num_warps=4,
    ),
    "gemv-k-loop-adapters": partial(
        product, launch_gemv_k_loop, 1, (4096,), 14336, block_n=4, block_k=1024, num_warps=4
    ),
    "gemv-shrinks": partial(
        product, launch_gemv, 1, _QKV, 4096, norm=True, shrinks=True,
        block_m=1, block_n=2, tiles_per_program=3, num_warps=8,
    ),
    "gemv-gated-shrinks": partial(
        product, launch_gemv, 1, _GATE_UP, 4096, norm=True, gated=True, shrinks=True,
        block_m=1, block_n=2, tiles_per_program=28, num_warps=4,
    ),
    "gemv-k-loop-shrinks": partial(
        product, launch_gemv_k_loop, 1, (4096,), 14336, shrinks=True, block_n=4, block_k=1024, num_warps=4
    ),
    "small-m-8-shrinks": partial(
        product, launch_gemm_small_m, 8, _QKV, 4096, shrinks=True,
        block_m=8, block_n=16, block_k=64, slice_k=2, num_stages=6,
    ),
    "small-m-8-shrinks-rank-64": partial(
        product, launch_gemm_small_m, 8, _GATE_UP, 4096, max_rank=64, gated=True, shrinks=True,
        block_m=8, block_n=16, block_k=64, slice_k=4, num_stages=4,
    ),
    "fp8-gemv-shrinks": partial(
        product, launch_fp8_gemv, 1, _QKV, 4096, norm=True, shrinks=True,
        block_m=1, block_n=2, tiles_per_program=6, num_warps=8,
    ),
    "fp8-gemv-k-loop-shrinks": partial(
        product, launch_fp8_gemv_k_loop, 1, _GATE_UP, 4096, gated=True, shrinks=True,
        block_n=4, block_k=1024, num_warps=1,
    ),
    "fp8-small-m-8-shrinks": partial(
        product, launch_fp8_gemm_small_m, 8, (4096,), 14336, shrinks=True,
        block_m=8, block_n=16, block_k=128, slice_k=4, num_stages=4,
    ),
    "int4-small-m-8-shrinks": partial(
        product, launch_int4_gemm_small_m, 8, _GATE_UP, 4096, gated=True, shrinks=True,
        block_m=8, tiles=4, slice_k=2, num_stages=3, unroll_k=2,
    ),
    "partial-sums-medium-m": partial(
        partial_sums, "gemm_medium_m", 32, _QKV, 4096, 64,
        block_m=32, tiles=4, split_k=4, scale_weights=0, num_warps=4, num_stages=4,
    ),
    "partial-sums-hopper-down": partial(
        partial_sums, "gemm_hopper", 64, (4096,), 14336, 1, residual=True,
        block_m=64, tiles=4, split_k=4, num_consumers=1, num_warps=4, num_stages=4,
    ),
    "partial-sums-hopper-gated": partial(
        partial_sums, "gemm_hopper", 64, _GATE_UP, 4096, 1, gated=True,
        block_m=64, tiles=8, split_k=1, num_consumers=1, num_warps=4, num_stages=4,
    ),
    "partial-sums-hopper-rank-64": partial(
        partial_sums, "gemm_hopper", 128, _GATE_UP, 4096, 64, max_rank=64, gated=True, half=True,
        block_m=128, tiles=8, split_k=1, num_consumers=2, num_warps=4, num_stages=4,
    ),
    "small-m-8-adapters": partial(
        product, launch_gemm_small_m, 8, _QKV, 4096, block_m=8, block_n=16, block_k=64, slice_k=2, num_stages=6
    ),
    "small-m-8-adapters-rank-32": partial(
        product, launch_gemm_small_m, 8, _GATE_UP, 4096, max_rank=32, gated=True,
        block_m=8, block_n=16, block_k=64, slice_k=4, num_stages=4,
    ),
    "fp8-gemv-adapters": partial(
        product, launch_fp8_gemv, 1, _QKV, 4096, norm=True, block_m=1, block_n=2, tiles_per_program=6, num_warps=8
    ),
    "fp8-gemv-k-loop-adapters": partial(
        product, launch_fp8_gemv_k_loop, 1, _GATE_UP, 4096, gated=True, block_n=4, block_k=1024, num_warps=1
    ),
    "fp8-small-m-8-adapters": partial(
        product, launch_fp8_gemm_small_m, 8, (4096,), 14336,
        block_m=8, block_n=16, block_k=128, slice_k=4, num_stages=4,
    ),
    "int4-small-m-8-adapters": partial(
        product, launch_int4_gemm_small_m, 8, _GATE_UP, 4096, gated=True,
        block_m=8, tiles=4, slice_k=2, num_stages=3, unroll_k=2,
    ),
    "lora-qkv-1": partial(lora, 1, (4096, 1024, 1024), 4096, 16, norm=True),
    "lora-qkv-300-f16": partial(lora, 300, (4096, 1024, 1024), 4096, 64, half=True),
    "lora-gate-up-64": partial(lora, 64, (14336, 14336), 4096, 16),
    "lora-down-256-rank-64": partial(lora, 256, (4096,), 14336, 64),
    "lora-o-2048": partial(lora, 2048, (4096,), 4096, 32),
    "appended-qkv-32": partial(appended, 32, _QKV, 1),
    "appended-qkv-64-of-64": partial(appended, 64, _QKV, 64),
    "appended-gate-up-16": partial(appended, 16, _GATE_UP, 1, gated=True),
    "appended-gate-up-64-of-8": partial(appended, 64, _GATE_UP, 8, gated=True),
    "appended-o-2048-rank-64": partial(appended, 2048, (4096,), 8, max_rank=64, residual=True),
    "appended-rope": partial(appended_rope, 128, 128, False, 16),
    "appended-rope-norm-partial": partial(appended_rope, 128, 64, True, 64),
    "appended-norm-32": partial(appended, 32, (4096,), 1, norm=True),
    "appended-norm-8192-rank-64-f16": partial(appended, 32, (8192,), 1, max_rank=64, norm=True, half=True),
}  # fmt: skip
"""By name: what is launched."""
