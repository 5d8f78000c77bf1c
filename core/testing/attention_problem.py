"""Random attention problems, their solution in float64, and the comparison of a backend's result with it."""

from __future__ import annotations

import unittest
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quire.core.contracts.attention import AttentionBackend, AttentionBatch, AttentionLimits, AttentionSpec, LayerKV
from quire.core.plugin.options import parse_options

__all__ = [
    "TOLERANCE",
    "AttentionProblem",
    "assert_backend_matches",
    "assert_matches",
    "compute_reference",
    "find_device",
    "make_backend",
    "make_spec",
    "require_device",
    "run_layer",
    "solve_with",
]

Requests = Sequence[tuple[int, int]]
"""(queries, context length with them) of each request, the decodes first."""

TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Absolute and relative, of outputs and of the log-sum-exp. Outputs are weighted means of values of size one. In 16
bits the softmax weights are rounded as well as the output: these are six times float16's rounding error of 2**-11 and
five times bfloat16's of 2**-8. float32 rounds sums over thousands of keys: 300 times its 2**-24."""

_MAX_MODEL_LEN = 8192

_K_SCALE, _V_SCALE = 0.5, 0.25
"""Of FP8 caches; powers of two, so that the cache holds the problem's keys and values exactly."""


@dataclass(frozen=True)
class AttentionProblem:
    """One step's queries, and every request's keys and values, on the CPU."""

    spec: AttentionSpec
    requests: Requests
    num_decodes: int
    q: Tensor  # (num_tokens, num_heads, qk_head_dim)
    keys: list[Tensor]  # by request: (length, num_kv_heads, qk_head_dim)
    values: list[Tensor]
    block_table: Tensor  # (num_reqs, max_blocks) int32
    fill_unused_with_nan: bool = False
    """Also slots before a window."""
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
        fill_unused_with_nan: bool = False,
    ) -> AttentionProblem:
        """Normal queries, keys and values, and blocks in random order."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(spec.dtype)

        def normal_as_cached(scale: float, *shape: int) -> Tensor:
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
            keys=[normal_as_cached(_K_SCALE, length, spec.num_kv_heads, spec.qk_head_dim) for _, length in requests],
            values=[normal_as_cached(_V_SCALE, length, spec.num_kv_heads, spec.v_head_dim) for _, length in requests],
            block_table=(order + 1).int().view(len(requests), width),
            fill_unused_with_nan=fill_unused_with_nan,
        )

    def make_batch(self, device: torch.device) -> AttentionBatch:
        """The step as the backend sees it."""
        queries = [count for count, _ in self.requests]
        starts = [sum(queries[:i]) for i in range(len(queries) + 1)]
        return AttentionBatch(
            query_start_loc=torch.tensor(starts, dtype=torch.int32, device=device),
            seq_lens=torch.tensor([length for _, length in self.requests], dtype=torch.int32, device=device),
            block_table=self.block_table.to(device),
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

    def make_kv_cache(self, backend: AttentionBackend, device: torch.device) -> LayerKV:
        """Every request's keys and values in their blocks, as the second of two layers that share each block; without
        those of the step for a backend that ``writes_kv``."""
        layout, block_size = backend.kv_layout(), self.spec.block_size
        raw = torch.zeros(int(self.block_table.max()) + 1, 2 * layout.bytes_per_block, dtype=torch.uint8)
        kv = layout.view(raw[:, layout.bytes_per_block :])
        is_fp8 = kv.k.dtype.itemsize == 1
        if self.fill_unused_with_nan and is_fp8:
            raw.fill_(0x7F)  # NaN in either type
        elif self.fill_unused_with_nan:
            kv.k.fill_(float("nan"))
            kv.v.fill_(float("nan"))
        for row, (queries, length) in enumerate(self.requests):
            first = 0
            if self.spec.window is not None and self.fill_unused_with_nan:
                first = max(0, length - queries - self.spec.window + 1)
            last = length - queries if backend.writes_kv else length
            position = torch.arange(first, last)
            block, offset = self.block_table[row].long()[position // block_size], position % block_size
            for cache, x, scale in ((kv.k, self.keys[row], self.k_scale), (kv.v, self.values[row], _V_SCALE)):
                cached = (x[first:last] / scale if is_fp8 else x[first:last]).to(cache.dtype)
                if is_fp8:  # of which indexing knows nothing
                    cache, cached = cache.view(torch.uint8), cached.view(torch.uint8)
                cache.transpose(1, 2)[block, offset] = cached
        kv = layout.view(raw.to(device)[:, layout.bytes_per_block :])
        if is_fp8:
            kv.k_scale, kv.v_scale = (torch.full((1,), x, device=device) for x in (self.k_scale, _V_SCALE))
        return kv

    def step_kv(self, backend: AttentionBackend, device: torch.device) -> dict[str, Tensor]:
        """The step's own keys and values as arguments of ``run``, for a backend that ``writes_kv``."""
        if not backend.writes_kv:
            return {}
        both = {"k": self.keys, "v": self.values}
        rows = [length - queries for queries, length in self.requests]
        return {
            name: torch.cat([x[first:] for x, first in zip(of_requests, rows, strict=True)]).to(device)
            for name, of_requests in both.items()
        }

    def locate_token(self, token: int) -> tuple[int, int]:
        """(request, index among its queries) of a token of the step."""
        for request, (queries, _) in enumerate(self.requests):
            if token < queries:
                return request, token
            token -= queries
        raise IndexError(f"the step has no token {token}")


def make_spec(**fields: Any) -> AttentionSpec:
    """A small float32 specification with some fields changed."""
    defaults: dict[str, Any] = {
        "num_heads": 4,
        "num_kv_heads": 2,
        "qk_head_dim": 64,
        "v_head_dim": 64,
        "scale": 0.125,
        "dtype": torch.float32,
        "kv_dtype": torch.float32,
        "block_size": 16,
    }
    return AttentionSpec(**(defaults | fields))


def assert_backend_matches(
    cls: type[AttentionBackend],
    spec: AttentionSpec,
    requests: Requests,
    *,
    num_decodes: int | None = None,
    lse: bool = False,
    fill_unused_with_nan: bool = False,
    seed: int = 0,
) -> None:
    """Raise unless ``cls`` solves a random problem as float64 does. SkipTest where it does not support ``spec``."""
    problem = AttentionProblem.random(
        spec,
        requests,
        num_decodes=num_decodes,
        seed=seed,
        table_seed=seed,
        fill_unused_with_nan=fill_unused_with_nan,
    )
    assert_matches(problem, *solve_with(cls, problem, lse))


def assert_matches(problem: AttentionProblem, out: Tensor, lse_out: Tensor | None = None) -> None:
    """Raise unless ``out`` and ``lse_out`` are within ``TOLERANCE`` of the reference.

    The message names the spec, the request with its lengths, the query and the head of the largest error.
    """
    expected_out, expected_lse = compute_reference(problem)
    _assert_close(problem, "output", out, expected_out)
    if lse_out is not None:
        _assert_close(problem, "log-sum-exp", lse_out, expected_lse)


def solve_with(
    cls: type[AttentionBackend], problem: AttentionProblem, lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(out, log-sum-exp or None) of a new backend, on the CPU."""
    device = require_device(cls, problem.spec)
    backend = make_backend(cls, problem.spec, device, problem.decode_query_len)
    backend.prepare_metadata(problem.make_batch(device))
    return run_layer(backend, 0, problem, device, lse)


def compute_reference(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp) in float64, written out request by request."""
    spec, outs, lses, start = problem.spec, [], [], 0
    group_size = spec.num_heads // spec.num_kv_heads
    for row, (queries, length) in enumerate(problem.requests):
        q = problem.q[start : start + queries].double()
        start += queries
        k = problem.keys[row].double().repeat_interleave(group_size, 1)
        v = problem.values[row].double().repeat_interleave(group_size, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * spec.scale
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        position = torch.arange(length - queries, length).unsqueeze(1)
        key = torch.arange(length)
        is_seen = key <= position
        if spec.window is not None:
            is_seen &= key > position - spec.window
        scores = scores.masked_fill(~is_seen, float("-inf"))
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
        lses.append(scores.logsumexp(-1).T)
    return torch.cat(outs), torch.cat(lses)


def run_layer(
    backend: AttentionBackend, layer: int, problem: AttentionProblem, device: torch.device, lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(out, log-sum-exp or None) of one layer of a step whose metadata is prepared, on the CPU."""
    spec = problem.spec
    # Queries as they come from a fused projection: heads dense, tokens strided.
    fused = torch.zeros(len(problem.q), spec.num_heads + 1, spec.qk_head_dim, dtype=spec.dtype, device=device)
    q = fused[:, : spec.num_heads]
    q.copy_(problem.q)
    out = torch.empty(len(q), spec.num_heads, spec.v_head_dim, dtype=spec.dtype, device=device)
    lse_out = torch.empty(len(q), spec.num_heads, device=device) if lse else None
    backend.run(
        layer, q, problem.make_kv_cache(backend, device), out, lse_out=lse_out, **problem.step_kv(backend, device)
    )
    return out.cpu(), None if lse_out is None else lse_out.cpu()


def make_backend(
    cls: type[AttentionBackend], spec: AttentionSpec, device: torch.device, decode_query_len: int = 1
) -> AttentionBackend:
    """A new backend, ready for its first step."""
    backend = cls(spec, device, parse_options(cls, {}))
    backend.allocate_workspaces(AttentionLimits(64, _MAX_MODEL_LEN, device, decode_query_len))
    return backend


def find_device(cls: type[AttentionBackend], spec: AttentionSpec) -> torch.device | None:
    """The GPU if there is one and ``cls`` takes it, else the CPU, else None."""
    devices = [torch.device("cuda")] if torch.cuda.is_available() else []
    return next((d for d in [*devices, torch.device("cpu")] if not cls.unsupported(spec, d)), None)


def require_device(cls: type[AttentionBackend], spec: AttentionSpec) -> torch.device:
    """The same; SkipTest with the reasons where there is none."""
    device = find_device(cls, spec)
    if device is None:
        raise unittest.SkipTest("; ".join(cls.unsupported(spec, torch.device("cpu"))))
    return device


def _assert_close(problem: AttentionProblem, what: str, actual: Tensor, expected: Tensor) -> None:
    """``actual`` and ``expected`` (num_tokens, num_heads, ...)."""
    tolerance = TOLERANCE[problem.spec.dtype]
    error = (actual.double() - expected).abs()
    is_wrong = ~((actual == expected) | (error <= tolerance * (1 + expected.abs())))  # NaN is wrong
    if not is_wrong.any():
        return
    worst = int(error.nan_to_num(nan=float("inf")).masked_fill(~is_wrong, -1).argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape)]
    request, query = problem.locate_token(index[0])
    queries, length = problem.requests[request]
    raise AssertionError(
        f"{what} is {float(actual.flatten()[worst])}, expected {float(expected.flatten()[worst])}, at query {query} of "
        f"{queries} of request {request} with {length} tokens, head {index[1]}; {int(is_wrong.sum())} of "
        f"{is_wrong.numel()} elements differ by more than {tolerance}\n"
        f"requests (queries, length): {list(problem.requests)}, decodes: {problem.num_decodes}\n{problem.spec}"
    )
