"""Problems for attention backends, and their answers in float64. The checks and the GPU tests are made of these."""

from __future__ import annotations

import unittest
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quire.core.contracts.attention import AttentionBackend, AttentionBatch, AttentionLimits, AttentionSpec, LayerKV

__all__ = [
    "TOLERANCE",
    "Problem",
    "assert_close",
    "attend",
    "compare",
    "device_for",
    "expected_attention",
    "make_spec",
    "needed_device",
    "prepared",
    "run_problem",
]

Requests = Sequence[tuple[int, int]]
"""(queries, context length with them) of each request, the decodes first."""

TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Absolute and relative, of outputs and of the log-sum-exp."""

_LIMIT = 8192

_K_SCALE, _V_SCALE = 0.5, 0.25
"""Of caches of one byte an element; powers of two, so that the problem's keys and values are exactly what they hold."""


@dataclass(frozen=True)
class Problem:
    """One step's queries, and every request's keys and values."""

    spec: AttentionSpec
    requests: Requests
    num_decodes: int
    q: Tensor  # (num_tokens, num_heads, qk_head_dim)
    keys: list[Tensor]  # by request: (length, num_kv_heads, qk_head_dim)
    values: list[Tensor]
    table: Tensor  # (num_reqs, max_blocks) int32
    poison: bool = False
    k_scale: float = _K_SCALE

    @classmethod
    def random(
        cls,
        spec: AttentionSpec,
        requests: Requests,
        *,
        num_decodes: int | None = None,
        seed: int = 0,
        table_seed: int = 0,
        poison: bool = False,
    ) -> Problem:
        """Normal queries, keys and values, and blocks in any order."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(spec.dtype)

        def cached(scale: float, *shape: int) -> Tensor:
            x = normal(*shape)
            return x if spec.kv_dtype.itemsize > 1 else (x.float() / scale).to(spec.kv_dtype).float() * scale

        if num_decodes is None:
            num_decodes = sum(queries == 1 for queries, _ in requests)
        width = max(-(-length // spec.block_size) for _, length in requests)
        order = torch.randperm(len(requests) * width, generator=torch.Generator().manual_seed(table_seed))
        return cls(
            spec=spec,
            requests=requests,
            num_decodes=num_decodes,
            q=normal(sum(queries for queries, _ in requests), spec.num_heads, spec.qk_head_dim),
            keys=[cached(_K_SCALE, length, spec.num_kv_heads, spec.qk_head_dim) for _, length in requests],
            values=[cached(_V_SCALE, length, spec.num_kv_heads, spec.v_head_dim) for _, length in requests],
            table=(order + 1).int().view(len(requests), width),
            poison=poison,
        )

    def batch(self, device: torch.device) -> AttentionBatch:
        """The step as the backend sees it."""
        queries = [count for count, _ in self.requests]
        starts = [sum(queries[:i]) for i in range(len(queries) + 1)]
        return AttentionBatch(
            query_start_loc=torch.tensor(starts, dtype=torch.int32, device=device),
            seq_lens=torch.tensor([length for _, length in self.requests], dtype=torch.int32, device=device),
            block_table=self.table.to(device),
            num_reqs=len(self.requests),
            num_tokens=sum(queries),
            max_query_len=max(queries),
            max_seq_len=max(length for _, length in self.requests),
            num_decodes=self.num_decodes,
            decode_query_len=self.decode_query_len,
        )

    @property
    def decode_query_len(self) -> int:
        """Queries of each decode."""
        return self.requests[0][0] if self.num_decodes else 1

    def cache(self, backend: AttentionBackend, device: torch.device) -> LayerKV:
        """Every request's keys and values in their blocks, one layer of two in a pool of that layout."""
        layout, size = backend.kv_layout(), self.spec.block_size
        raw = torch.zeros(int(self.table.max()) + 1, 2 * layout.bytes_per_block, dtype=torch.uint8)
        kv = layout.view(raw[:, layout.bytes_per_block :])
        small = kv.k.dtype.itemsize == 1
        if self.poison and small:
            raw.fill_(0x7F)  # NaN in either type
        elif self.poison:
            kv.k.fill_(float("nan"))
            kv.v.fill_(float("nan"))
        for row, (queries, length) in enumerate(self.requests):
            window = self.spec.window
            first = 0 if window is None or not self.poison else max(0, length - queries - window + 1)
            position = torch.arange(first, length)
            block, offset = self.table[row].long()[position // size], position % size
            for cache, x, scale in ((kv.k, self.keys[row], self.k_scale), (kv.v, self.values[row], _V_SCALE)):
                some = (x[first:] / scale if small else x[first:]).to(cache.dtype)
                if small:
                    cache, some = cache.view(torch.uint8), some.view(torch.uint8)
                cache.transpose(1, 2)[block, offset] = some
        there = layout.view(raw.to(device)[:, layout.bytes_per_block :])
        if small:
            there.k_scale, there.v_scale = (torch.full((1,), x, device=device) for x in (self.k_scale, _V_SCALE))
        return there


def make_spec(**fields: Any) -> AttentionSpec:
    """A small float32 specification with some fields changed."""
    plain: dict[str, Any] = {
        "num_heads": 4,
        "num_kv_heads": 2,
        "qk_head_dim": 64,
        "v_head_dim": 64,
        "scale": 0.125,
        "dtype": torch.float32,
        "kv_dtype": torch.float32,
        "block_size": 16,
    }
    return AttentionSpec(**(plain | fields))


def compare(
    cls: type[AttentionBackend],
    spec: AttentionSpec,
    requests: Requests,
    *,
    num_decodes: int | None = None,
    lse: bool = False,
    poison: bool = False,
    seed: int = 0,
) -> None:
    """Raise unless ``cls`` gives what float64 gives. SkipTest where it does not support ``spec``."""
    problem = Problem.random(spec, requests, num_decodes=num_decodes, seed=seed, table_seed=seed, poison=poison)
    out, lse_out = attend(cls, spec, problem, lse)
    expected, expected_lse = expected_attention(spec, problem)
    assert_close(out, expected, spec.dtype)
    if lse_out is not None:
        assert_close(lse_out, expected_lse, spec.dtype)


def attend(
    cls: type[AttentionBackend], spec: AttentionSpec, problem: Problem, lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(out, log-sum-exp or None) of a new backend, on the CPU."""
    device = needed_device(cls, spec)
    backend = prepared(cls, spec, device, problem.decode_query_len)
    backend.prepare_metadata(problem.batch(device))
    return run_problem(backend, 0, problem, device, lse)


def expected_attention(spec: AttentionSpec, problem: Problem) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp) in float64, written out request by request."""
    outs, lses, start = [], [], 0
    group = spec.num_heads // spec.num_kv_heads
    for row, (queries, length) in enumerate(problem.requests):
        q = problem.q[start : start + queries].double()
        start += queries
        k = problem.keys[row].double().repeat_interleave(group, 1)
        v = problem.values[row].double().repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * spec.scale
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        position = torch.arange(length - queries, length).unsqueeze(1)
        key = torch.arange(length)
        seen = key <= position
        if spec.window is not None:
            seen &= key > position - spec.window
        scores = scores.masked_fill(~seen, float("-inf"))
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
        lses.append(scores.logsumexp(-1).T)
    return torch.cat(outs), torch.cat(lses)


def run_problem(
    backend: AttentionBackend, layer: int, problem: Problem, device: torch.device, lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(out, log-sum-exp or None) of one layer of a planned step, on the CPU."""
    spec = problem.spec
    # Queries as they come from a fused projection: heads dense, tokens strided.
    wide = torch.zeros(len(problem.q), spec.num_heads + 1, spec.qk_head_dim, dtype=spec.dtype, device=device)
    q = wide[:, : spec.num_heads]
    q.copy_(problem.q)
    out = torch.empty(len(q), spec.num_heads, spec.v_head_dim, dtype=spec.dtype, device=device)
    lse_out = torch.empty(len(q), spec.num_heads, device=device) if lse else None
    if backend.writes_kv:
        raise unittest.SkipTest("the backend writes K and V itself")
    backend.run(layer, q, problem.cache(backend, device), out, lse_out=lse_out)
    return out.cpu(), None if lse_out is None else lse_out.cpu()


def prepared(
    cls: type[AttentionBackend], spec: AttentionSpec, device: torch.device, decode_query_len: int = 1
) -> AttentionBackend:
    """A new backend, ready for its first step."""
    backend = cls(spec, device)
    backend.allocate_workspaces(AttentionLimits(64, _LIMIT, device, decode_query_len))
    return backend


def device_for(cls: type[AttentionBackend], spec: AttentionSpec) -> torch.device | None:
    """The GPU if there is one and ``cls`` takes it, else the CPU, else None."""
    devices = [torch.device("cuda")] if torch.cuda.is_available() else []
    return next((d for d in [*devices, torch.device("cpu")] if not cls.unsupported(spec, d)), None)


def needed_device(cls: type[AttentionBackend], spec: AttentionSpec) -> torch.device:
    """The same; SkipTest with the reasons where there is none."""
    device = device_for(cls, spec)
    if device is None:
        raise unittest.SkipTest("; ".join(cls.unsupported(spec, torch.device("cpu"))))
    return device


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within the tolerance of ``dtype``."""
    torch.testing.assert_close(got.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
