"""What is compiled ahead of time: calls of the host functions that launch each kernel, over types and shapes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tests.aot.cases_drafts import DRAFTS
from tests.aot.cases_sampling import SAMPLING

from quire.core.contracts.attention import AttentionLimits
from quire.core.contracts.quant import ActivationFormat
from quire.core.ops.kernels import activation_kernel as activation
from quire.core.ops.kernels import decode_inputs_kernel as decode_inputs
from quire.core.ops.kernels import norm_kernel as norm
from quire.core.ops.kernels import rope_kernel as rope
from quire.core.ops.kernels.gemm_medium_m import wide
from quire.core.ops.kernels.gemm_small_m import skinny
from quire.core.ops.kernels.gemv import gemv, gemv_long
from quire.core.testing.attention_problem import Problem, make_spec
from quire.plugins.attention.triton.backend import TritonBackend
from quire.plugins.attention.triton.hopper_prefill import HopperPrefill
from quire.plugins.quant.kernels import fp8_quantize
from quire.plugins.quant.kernels.fp8_gemm_medium_m import wide8
from quire.plugins.quant.kernels.fp8_gemm_small_m import skinny8
from quire.plugins.quant.kernels.fp8_gemv import gemv8, gemv8_long
from quire.plugins.quant.kernels.int4 import IntWeights
from quire.plugins.quant.kernels.int4_launch import LAUNCHERS, dequantized
from quire.plugins.quant.kernels.int8 import rescale

CPU = torch.device("cpu")
HALF = (torch.bfloat16, torch.float16)
FP8, INT8 = torch.float8_e4m3fn, torch.int8


def attention(dtype: torch.dtype, dim: int, decodes: int = 1, queries: int = 1, **fields: Any) -> None:
    """A step of long decodes and one chunk, of a model with 32 query heads and 8 KV heads unless told otherwise."""
    shape = {"num_heads": 32, "num_kv_heads": 8, "dtype": dtype, "kv_dtype": dtype, "qk_head_dim": dim}
    spec = make_spec(**(shape | {"v_head_dim": dim} | fields))
    problem = Problem.random(spec, [(queries, 600)] * decodes + [(9, 40)], num_decodes=decodes)
    backend = TritonBackend(spec, CPU)
    backend.allocate_workspaces(AttentionLimits(8, 8192, CPU, queries))
    backend.prepare_metadata(problem.batch(CPU))
    out = torch.empty(len(problem.q), spec.num_heads, spec.v_head_dim, dtype=dtype)
    backend.run(0, problem.q, problem.cache(backend, CPU), out, lse_out=torch.empty(out.shape[:2]))


def prompts(dim: int, log_sums: bool = False, **fields: Any) -> None:
    """Chunks of prompts, by Hopper's own kernel."""
    shape = {"num_heads": 32, "num_kv_heads": 8, "dtype": torch.bfloat16, "kv_dtype": torch.bfloat16}
    spec = make_spec(**(shape | {"qk_head_dim": dim, "v_head_dim": dim} | fields))
    problem = Problem.random(spec, [(9, 40), (100, 100)], num_decodes=0)
    kv = problem.cache(TritonBackend(spec, CPU), CPU)
    out = torch.empty_like(problem.q)
    lse = torch.empty(out.shape[:2]) if log_sums else None
    HopperPrefill(spec, CPU, num_sms=132).launch(problem.batch(CPU), problem.q, kv, out, lse)


def rms_norm(dtype: torch.dtype, features: int, residual: bool) -> None:
    x = torch.empty(4, features, dtype=dtype)
    norm.rms_norm(x, torch.empty(features, dtype=dtype), 1e-6, x.clone() if residual else None)


def rope_and_cache(
    dtype: torch.dtype, dim: int, rotary_dim: int, normed: bool, kv_dtype: torch.dtype | None = None,
    queries: bool = True,
) -> None:  # fmt: skip
    spec = make_spec(
        dtype=dtype, kv_dtype=kv_dtype or dtype, num_heads=32, num_kv_heads=8, qk_head_dim=dim, v_head_dim=dim
    )
    problem = Problem.random(spec, [(4, 4)])
    kv = problem.cache(TritonBackend(spec, CPU), CPU)
    weight = torch.empty(dim, dtype=dtype) if normed else None
    positions = torch.arange(4)
    table = torch.empty(8, rotary_dim)
    q = problem.q if queries else problem.keys[0][:, :0]
    rope.rope_and_cache(q, problem.keys[0], problem.values[0], positions, table, kv, positions, weight, weight, 1e-6)


def silu(dtype: torch.dtype) -> None:
    activation.silu_and_mul(torch.empty(4, 28672, dtype=dtype))


def step_inputs(queries: int) -> None:
    ints = partial(torch.zeros, dtype=torch.int32)
    longs = partial(torch.zeros, dtype=torch.int64)
    decode_inputs.decode_inputs(
        longs(4), longs(4), ints(8, 64), ints(8), ints(8, 5), ints(4 * queries), longs(4 * queries), ints(4),
        longs(4 * queries), ints(4, 5), 16, 64, queries == 1,
    )  # fmt: skip


def linear(kernel: Callable[..., None], num_tokens: int, features: int, inputs: int, **options: int) -> None:
    """With everything before (but in ``wide``) and after the layer in the same kernel, with PDL."""
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
        norm=None if kernel is wide else (x[0], 1e-5),
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
    given = {"bias": torch.empty(features, dtype=dtype), "residual": out, "gated": True}
    LAUNCHERS[kernel](x, weights, out=out, enable_pdl=True, **given, **options)


def int4_dequantize(bits: int) -> None:
    words = torch.empty(256, 32, 256, dtype=torch.int32)
    inputs = 16384 // bits
    groups = torch.empty(256, inputs // 64, 16, dtype=torch.int32)
    dequantized(IntWeights(words, groups, 4096, inputs, 64, bits), torch.bfloat16)


def eight_bit(
    kernel: Callable[..., None], num_tokens: int, features: int, inputs: int, kind: torch.dtype, **options: int
) -> None:
    """As ``linear``, with weights of 8 bits; by 128x128 block where told."""
    x = torch.empty(num_tokens, inputs, dtype=torch.bfloat16)
    out = torch.empty(num_tokens, features // 2, dtype=torch.bfloat16)
    blocks = options.pop("blocks", 0)
    given: dict[str, Any] = {"scale": torch.empty((features // 128, inputs // 128) if blocks else features)}
    if kernel is wide8:
        given |= {"x_scale": torch.empty(inputs // 128 if blocks else 1, num_tokens).T}
    elif kernel is not skinny8:
        given |= {"norm": (x[0], 1e-5)}
    weight = torch.empty(features, inputs, dtype=kind)
    x = x.to(kind) if kernel is wide8 else x
    kernel(x, weight, out[0], out, gated=True, residual=out, enable_pdl=True, **given, **options)


def quantized(kind: Any) -> None:
    wanted = ActivationFormat(kind, torch.ones(1) if kind == "fp8_tensor" else None)
    x, gain = torch.empty(4, 4096, dtype=torch.bfloat16), torch.empty(4096, dtype=torch.bfloat16)
    norm.rms_norm(x, gain, 1e-6, x.clone(), wanted)
    fp8_quantize.launch(x, wanted)
    activation.silu_and_mul(torch.empty(4, 28672, dtype=torch.bfloat16), wanted)


def rescaled() -> None:
    rescale(torch.zeros(4, 6144, dtype=torch.int32), torch.ones(4, 1), torch.ones(6144), None, torch.bfloat16)


CASES: dict[str, Callable[[], None]] = {
    **{
        f"{str(dt).removeprefix('torch.')}-{dim}": partial(attention, dt, dim)
        for dt in HALF
        for dim in (64, 96, 128, 256)
    },
    **{f"float32-{dim}": partial(attention, torch.float32, dim) for dim in (64, 128, 256)},
    "window": partial(attention, torch.bfloat16, 128, kind="sliding", window=4096),
    "softcap": partial(attention, torch.bfloat16, 256, softcap=50.0, num_kv_heads=16),
    "group-7": partial(attention, torch.bfloat16, 128, num_heads=28, num_kv_heads=4),
    "multi-query": partial(attention, torch.bfloat16, 128, num_heads=48, num_kv_heads=1),
    "many-decodes": partial(attention, torch.bfloat16, 128, decodes=4, num_heads=16),
    "more-decodes": partial(attention, torch.bfloat16, 128, decodes=8),
    "fp8-cache-256": partial(attention, torch.bfloat16, 256, decodes=8, kv_dtype=torch.float8_e4m3fn),
    "verify-3": partial(attention, torch.bfloat16, 128, queries=3, decodes=4, num_heads=16),
    "verify-5": partial(attention, torch.bfloat16, 128, queries=5, decodes=4),
    "verify-9": partial(attention, torch.bfloat16, 128, queries=9, decodes=4),
    "fp8-cache": partial(attention, torch.bfloat16, 128, decodes=4, kv_dtype=torch.float8_e4m3fn),
    "fp8-cache-verify": partial(attention, torch.float16, 128, queries=5, kv_dtype=torch.float8_e5m2),
    "page-1": partial(attention, torch.bfloat16, 128, block_size=1),
    "hopper-64": partial(prompts, 64),
    "hopper-128": partial(prompts, 128),
    "hopper-128-log-sums": partial(prompts, 128, True),
    "hopper-float16-group-7": partial(
        prompts, 128, num_heads=28, num_kv_heads=4, dtype=torch.float16, kv_dtype=torch.float16
    ),
    "hopper-page-128": partial(prompts, 64, block_size=128),
    "norm": partial(rms_norm, torch.bfloat16, 4096, False),
    "norm-residual": partial(rms_norm, torch.float16, 1024, True),
    "rope": partial(rope_and_cache, torch.bfloat16, 128, 128, False),
    "rope-keys-alone": partial(rope_and_cache, torch.bfloat16, 128, 128, False, queries=False),
    "fp8-rope": partial(rope_and_cache, torch.bfloat16, 128, 128, True, torch.float8_e4m3fn),
    "rope-norm-partial": partial(rope_and_cache, torch.bfloat16, 128, 64, True),
    "silu": partial(silu, torch.bfloat16),
    "decode-inputs": partial(step_inputs, 1),
    "verify-inputs": partial(step_inputs, 5),
    "gemv": partial(linear, gemv, 1, 28672, 4096, tokens=1, rows=4, turns=28, num_warps=8),
    "gemv-2": partial(linear, gemv, 2, 6144, 1024, tokens=2, rows=2, turns=3, num_warps=4),
    "gemv-long": partial(linear, gemv_long, 1, 4096, 14336, rows=4, block=1024, num_warps=4),
    "skinny-8": partial(linear, skinny, 8, 4096, 14336, tokens=8, rows=16, block=128, ways=4, num_stages=3),
    "skinny-32": partial(linear, skinny, 24, 6144, 1024, tokens=32, rows=32, block=64, ways=4, num_stages=4),
    "wide": partial(linear, wide, 32, 6144, 1024, tokens=32, rows=64, block=128, num_warps=4, num_stages=4),
    "int4-skinny-8": partial(int4, "skinny", 8, 4096, 14336, tokens=8, tiles=2, ways=8, num_stages=3, depth=1),
    "int4-skinny-16": partial(
        int4, "skinny", 16, 4096, 4096, group=64, tokens=16, tiles=2, ways=4, num_stages=3, depth=2
    ),
    "int4-skinny-8-bits": partial(
        int4, "skinny", 8, 4096, 4096, bits=8, tokens=8, tiles=2, ways=4, num_stages=4, depth=1
    ),
    "int4-skinny-float16": partial(
        int4, "skinny", 8, 4096, 4096, half=True, tokens=8, tiles=2, ways=4, num_stages=4, depth=1
    ),
    "int4-wide-32": partial(
        int4, "wide", 32, 4096, 14336, tokens=32, tiles=8, splits=8, scaled=0, num_warps=8, num_stages=3
    ),
    "int4-wide-64": partial(
        int4, "wide", 64, 28672, 4096, tokens=64, tiles=8, splits=1, scaled=0, num_warps=8, num_stages=3
    ),
    "int4-wide-groups-of-32": partial(
        int4, "wide", 64, 4096, 4096, group=32, tokens=64, tiles=8, splits=4, scaled=0, num_warps=8, num_stages=3
    ),
    "int4-wide-256": partial(
        int4, "wide", 256, 4096, 4096, tokens=256, tiles=8, splits=1, scaled=1, num_warps=8, num_stages=3
    ),
    "int4-hopper-64": partial(
        int4, "hopper", 64, 4096, 14336, tokens=64, tiles=4, splits=4, consumers=1, num_warps=4, num_stages=4
    ),
    "int4-hopper-128": partial(
        int4, "hopper", 128, 28672, 4096, tokens=128, tiles=8, splits=1, consumers=2, num_warps=4, num_stages=4
    ),
    "int4-hopper-256": partial(
        int4, "hopper", 256, 28672, 4096, tokens=256, tiles=4, splits=1, consumers=2, num_warps=4, num_stages=3
    ),
    "int4-hopper-8-warps": partial(
        int4, "hopper", 256, 28672, 4096, tokens=256, tiles=8, splits=1, consumers=1, num_warps=8, num_stages=3
    ),
    "int4-hopper-float16": partial(
        int4,
        "hopper",
        128,
        6144,
        4096,
        half=True,
        tokens=128,
        tiles=4,
        splits=1,
        consumers=2,
        num_warps=4,
        num_stages=5,
    ),
    "int4-dequantize": partial(int4_dequantize, 4),
    "int8-dequantize": partial(int4_dequantize, 8),
    "fp8-gemv": partial(eight_bit, gemv8, 1, 6144, 4096, FP8, tokens=1, rows=2, turns=6, num_warps=8),
    "int8-gemv": partial(eight_bit, gemv8, 2, 6144, 4096, INT8, tokens=2, rows=2, turns=6, num_warps=8),
    "fp8-gemv-long": partial(eight_bit, gemv8_long, 1, 4096, 14336, FP8, rows=4, block=1024, num_warps=2),
    "fp8-gemv-long-blocks": partial(
        eight_bit, gemv8_long, 1, 4096, 4096, FP8, rows=4, block=1024, num_warps=2, blocks=1
    ),
    "fp8-skinny": partial(eight_bit, skinny8, 8, 4096, 14336, FP8, tokens=8, rows=16, block=128, ways=4, num_stages=6),
    "fp8-skinny-blocks": partial(
        eight_bit, skinny8, 8, 4096, 4096, FP8, tokens=8, rows=16, block=128, ways=4, num_stages=6, blocks=1
    ),
    "fp8-wide": partial(
        eight_bit, wide8, 32, 4096, 14336, FP8, tokens=32, rows=64, block=256, num_warps=4, num_stages=6
    ),
    "int8-wide": partial(
        eight_bit, wide8, 128, 4096, 4096, INT8, tokens=128, rows=64, block=128, num_warps=4, num_stages=4
    ),
    "fp8-wide-tokens": partial(
        eight_bit,
        wide8,
        64,
        4096,
        4096,
        FP8,
        tokens=64,
        rows=32,
        block=256,
        num_warps=4,
        num_stages=6,
        tokens_first=True,
    ),
    "fp8-wide-blocks": partial(
        eight_bit, wide8, 32, 4096, 4096, FP8, tokens=32, rows=64, block=128, num_warps=4, num_stages=6, blocks=1
    ),
    "fp8-quantized": partial(quantized, "fp8_token"),
    "fp8-quantized-groups": partial(quantized, "fp8_group"),
    "fp8-quantized-static": partial(quantized, "fp8_tensor"),
    "int8-quantized": partial(quantized, "int8_token"),
    "int8-rescaled": rescaled,
    **DRAFTS,
    **SAMPLING,
}
