"""Cases of the Triton attention backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from quire.core.contracts.attention import AttentionLimits
from quire.core.testing.attention_problem import AttentionProblem, make_spec
from quire.plugins.attention.triton.backend import TritonBackend
from quire.plugins.attention.triton.decode import launch_paged_decode
from quire.plugins.attention.triton.decode_work_list import DecodeWorkList
from quire.plugins.attention.triton.hopper_prefill import HopperPrefill
from quire.plugins.attention.triton.prefill import launch_prefill

__all__ = ["ATTENTION"]

CPU = torch.device("cpu")


def attention(dtype: torch.dtype, head_dim: int, num_decodes: int = 1, query_len: int = 1, **fields: Any) -> None:
    """Long decodes and one chunk of a prompt, by the kernels for any GPU; by default 32 query heads and 8 KV heads."""
    shape = {"num_heads": 32, "num_kv_heads": 8, "dtype": dtype, "kv_dtype": dtype}
    spec = make_spec(**(shape | {"qk_head_dim": head_dim, "v_head_dim": head_dim} | fields))
    requests = [(query_len, 600)] * num_decodes + [(9, 40)]
    problem = AttentionProblem.random(spec, requests, num_decodes=num_decodes)
    batch, kv = problem.make_batch(CPU), problem.make_kv_cache(TritonBackend(spec, CPU), CPU)
    out = torch.empty(len(problem.q), spec.num_heads, spec.v_head_dim, dtype=dtype)
    lse_out = torch.empty(out.shape[:2])
    work_list = DecodeWorkList(spec, AttentionLimits(8, 8192, CPU, query_len), fixed_split_size=0)
    work_list.build(batch)
    launch_paged_decode(spec, batch, work_list, problem.q, kv, out, lse_out)
    launch_prefill(spec, batch, problem.q, kv, out, lse_out)  # also where the backend would take Hopper's


def hopper_prefill(head_dim: int, has_lse: bool = False, **fields: Any) -> None:
    """Chunks of prompts, by the Hopper prefill kernel."""
    shape = {"num_heads": 32, "num_kv_heads": 8, "dtype": torch.bfloat16, "kv_dtype": torch.bfloat16}
    spec = make_spec(**(shape | {"qk_head_dim": head_dim, "v_head_dim": head_dim} | fields))
    problem = AttentionProblem.random(spec, [(9, 40), (100, 100)], num_decodes=0)
    kv = problem.make_kv_cache(TritonBackend(spec, CPU), CPU)
    out = torch.empty_like(problem.q)
    lse_out = torch.empty(out.shape[:2]) if has_lse else None
    HopperPrefill(spec, CPU, num_sms=132).launch(problem.make_batch(CPU), problem.q, kv, out, lse_out)


ATTENTION: dict[str, Callable[[], None]] = {
    **{
        f"{str(dtype).removeprefix('torch.')}-{head_dim}": partial(attention, dtype, head_dim)
        for dtype in (torch.bfloat16, torch.float16)
        for head_dim in (64, 96, 128, 256)
    },
    **{f"float32-{head_dim}": partial(attention, torch.float32, head_dim) for head_dim in (64, 128, 256)},
    "window": partial(attention, torch.bfloat16, 128, kind="sliding", window=4096),
    "softcap": partial(attention, torch.bfloat16, 256, softcap=50.0, num_kv_heads=16),
    "group-7": partial(attention, torch.bfloat16, 128, num_heads=28, num_kv_heads=4),
    "multi-query": partial(attention, torch.bfloat16, 128, num_heads=48, num_kv_heads=1),
    "many-decodes": partial(attention, torch.bfloat16, 128, num_decodes=4, num_heads=16),
    "more-decodes": partial(attention, torch.bfloat16, 128, num_decodes=8),
    "fp8-cache-256": partial(attention, torch.bfloat16, 256, num_decodes=8, kv_dtype=torch.float8_e4m3fn),
    "verify-3": partial(attention, torch.bfloat16, 128, query_len=3, num_decodes=4, num_heads=16),
    "verify-5": partial(attention, torch.bfloat16, 128, query_len=5, num_decodes=4),
    "verify-9": partial(attention, torch.bfloat16, 128, query_len=9, num_decodes=4),
    "fp8-cache": partial(attention, torch.bfloat16, 128, num_decodes=4, kv_dtype=torch.float8_e4m3fn),
    "fp8-cache-verify": partial(attention, torch.float16, 128, query_len=5, kv_dtype=torch.float8_e5m2),
    "block-size-1": partial(attention, torch.bfloat16, 128, block_size=1),
    "hopper-prefill-64": partial(hopper_prefill, 64),
    "hopper-prefill-128": partial(hopper_prefill, 128),
    "hopper-prefill-128-lse": partial(hopper_prefill, 128, True),
    "hopper-prefill-float16-group-7": partial(
        hopper_prefill, 128, num_heads=28, num_kv_heads=4, dtype=torch.float16, kv_dtype=torch.float16
    ),
    "hopper-prefill-block-size-128": partial(hopper_prefill, 64, block_size=128),
}
