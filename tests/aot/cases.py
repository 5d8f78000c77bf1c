"""What is compiled ahead of time: calls of the host functions that launch each kernel, over types and shapes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tests.aot.cases_adapters import ADAPTERS
from tests.aot.cases_all_reduce import ALL_REDUCE
from tests.aot.cases_attention import ATTENTION
from tests.aot.cases_drafts import DRAFTS
from tests.aot.cases_gemm import GEMMS
from tests.aot.cases_sampling import SAMPLING

from quire.core.contracts.quant import ActivationFormat
from quire.core.ops.kernels import activation_kernel as activation
from quire.core.ops.kernels import decode_inputs_kernel as decode_inputs
from quire.core.ops.kernels import norm_kernel as norm
from quire.core.ops.kernels import rope_kernel as rope
from quire.core.testing.attention_problem import AttentionProblem, make_spec
from quire.plugins.attention.triton.backend import TritonBackend
from quire.plugins.quant.kernels import fp8_quantize
from quire.plugins.quant.kernels.int8 import launch_rescale

CPU = torch.device("cpu")


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
    **ATTENTION,
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
    **ADAPTERS,
    **ALL_REDUCE,
    **DRAFTS,
    **GEMMS,
    **SAMPLING,
}
