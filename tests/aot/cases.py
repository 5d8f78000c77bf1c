"""What is compiled ahead of time: calls of the host functions that launch each kernel, over types and shapes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tests.aot.cases_drafts import DRAFTS
from tests.aot.cases_gemm import GEMMS
from tests.aot.cases_sampling import SAMPLING

from quire.core.contracts.attention import AttentionLimits
from quire.core.contracts.quant import ActivationFormat
from quire.core.ops.kernels import activation_kernel as activation
from quire.core.ops.kernels import decode_inputs_kernel as decode_inputs
from quire.core.ops.kernels import norm_kernel as norm
from quire.core.ops.kernels import rope_kernel as rope
from quire.core.testing.attention_problem import AttentionProblem, make_spec
from quire.plugins.attention.triton.backend import TritonBackend
from quire.plugins.attention.triton.hopper_prefill import HopperPrefill
from quire.plugins.quant.kernels import fp8_quantize
from quire.plugins.quant.kernels.int8 import launch_rescale

CPU = torch.device("cpu")
HALF = (torch.bfloat16, torch.float16)
FP8, INT8 = torch.float8_e4m3fn, torch.int8


def attention(dtype: torch.dtype, dim: int, decodes: int = 1, queries: int = 1, **fields: Any) -> None:
    """A step of long decodes and one chunk, of a model with 32 query heads and 8 KV heads unless told otherwise."""
    shape = {"num_heads": 32, "num_kv_heads": 8, "dtype": dtype, "kv_dtype": dtype, "qk_head_dim": dim}
    spec = make_spec(**(shape | {"v_head_dim": dim} | fields))
    problem = AttentionProblem.random(spec, [(queries, 600)] * decodes + [(9, 40)], num_decodes=decodes)
    backend = TritonBackend(spec, CPU)
    backend.allocate_workspaces(AttentionLimits(8, 8192, CPU, queries))
    backend.prepare_metadata(problem.make_batch(CPU))
    out = torch.empty(len(problem.q), spec.num_heads, spec.v_head_dim, dtype=dtype)
    backend.run(0, problem.q, problem.make_kv_cache(backend, CPU), out, lse_out=torch.empty(out.shape[:2]))


def prompts(dim: int, log_sums: bool = False, **fields: Any) -> None:
    """Chunks of prompts, by Hopper's own kernel."""
    shape = {"num_heads": 32, "num_kv_heads": 8, "dtype": torch.bfloat16, "kv_dtype": torch.bfloat16}
    spec = make_spec(**(shape | {"qk_head_dim": dim, "v_head_dim": dim} | fields))
    problem = AttentionProblem.random(spec, [(9, 40), (100, 100)], num_decodes=0)
    kv = problem.make_kv_cache(TritonBackend(spec, CPU), CPU)
    out = torch.empty_like(problem.q)
    lse = torch.empty(out.shape[:2]) if log_sums else None
    HopperPrefill(spec, CPU, num_sms=132).launch(problem.make_batch(CPU), problem.q, kv, out, lse)


def rms_norm(dtype: torch.dtype, features: int, residual: bool) -> None:
    x = torch.empty(4, features, dtype=dtype)
    norm.launch_rms_norm(x, torch.empty(features, dtype=dtype), 1e-6, x.clone() if residual else None)


def rope_and_cache(
    dtype: torch.dtype, dim: int, rotary_dim: int, normed: bool, kv_dtype: torch.dtype | None = None,
    queries: bool = True,
) -> None:  # fmt: skip
    spec = make_spec(
        dtype=dtype, kv_dtype=kv_dtype or dtype, num_heads=32, num_kv_heads=8, qk_head_dim=dim, v_head_dim=dim
    )
    problem = AttentionProblem.random(spec, [(4, 4)])
    kv = problem.make_kv_cache(TritonBackend(spec, CPU), CPU)
    weight = torch.empty(dim, dtype=dtype) if normed else None
    positions = torch.arange(4)
    table = torch.empty(8, rotary_dim)
    q = problem.q if queries else problem.keys[0][:, :0]
    rope.launch_rope_and_cache(
        q, problem.keys[0], problem.values[0], positions, table, kv, positions, weight, weight, 1e-6
    )


def silu(dtype: torch.dtype) -> None:
    activation.launch_silu_and_mul(torch.empty(4, 28672, dtype=dtype))


def step_inputs(queries: int) -> None:
    ints = partial(torch.zeros, dtype=torch.int32)
    longs = partial(torch.zeros, dtype=torch.int64)
    decode_inputs.launch_decode_inputs(
        longs(4), longs(4), ints(8, 64), ints(8), ints(8, 5), ints(4 * queries), longs(4 * queries), ints(4),
        longs(4 * queries), ints(4, 5), 16, 64, queries == 1,
    )  # fmt: skip


def quantized(kind: Any) -> None:
    wanted = ActivationFormat(kind, torch.ones(1) if kind == "fp8_tensor" else None)
    x, gain = torch.empty(4, 4096, dtype=torch.bfloat16), torch.empty(4096, dtype=torch.bfloat16)
    norm.launch_rms_norm(x, gain, 1e-6, x.clone(), wanted)
    fp8_quantize.launch_quantize_activation(x, wanted)
    activation.launch_silu_and_mul(torch.empty(4, 28672, dtype=torch.bfloat16), wanted)


def rescaled() -> None:
    launch_rescale(torch.zeros(4, 6144, dtype=torch.int32), torch.ones(4, 1), torch.ones(6144), None, torch.bfloat16)


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
    "fp8-quantized": partial(quantized, "fp8_token"),
    "fp8-quantized-groups": partial(quantized, "fp8_group"),
    "fp8-quantized-static": partial(quantized, "fp8_tensor"),
    "int8-quantized": partial(quantized, "int8_token"),
    "int8-rescaled": rescaled,
    **DRAFTS,
    **GEMMS,
    **SAMPLING,
}
