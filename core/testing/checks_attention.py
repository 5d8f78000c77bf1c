"""Conformance of attention backends: every shape, length, window and block table against float64.

A check skips what the backend says, by ``unsupported``, that it does not do. Checks run on the GPU where there is one
and the backend takes it, else on the CPU.
"""

from __future__ import annotations

import dataclasses
import unittest
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quire.core.contracts.attention import AttentionBackend, AttentionBatch, AttentionLimits, AttentionSpec, LayerKV

__all__ = ["Problem", "attend", "compare", "expected_attention", "make_spec"]

Requests = Sequence[tuple[int, int]]
"""(queries, context length with them) of each request, those with one query first."""

TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
_LIMIT = 8192


def check_unsupported_answers_with_reasons(cls: type[AttentionBackend]) -> None:
    """``unsupported`` is a list of strings, for whatever specification."""
    odd = dataclasses.replace(make_spec(), kind="mla", causal=False, sinks=True)
    for spec in (make_spec(), odd):
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            reasons = cls.unsupported(spec, torch.device(device))
            assert isinstance(reasons, list) and all(isinstance(reason, str) for reason in reasons), reasons


def check_decode(cls: type[AttentionBackend]) -> None:
    """Requests of one query, of lengths on either side of a page."""
    compare(cls, make_spec(), [(1, 1), (1, 15), (1, 16), (1, 17), (1, 50)])


def check_prefill(cls: type[AttentionBackend]) -> None:
    """Whole prompts, the shortest of one token."""
    compare(cls, make_spec(), [(1, 1), (16, 16), (37, 37)], num_decodes=0)


def check_chunks(cls: type[AttentionBackend]) -> None:
    """Chunks that continue a prompt, on and off page boundaries."""
    compare(cls, make_spec(), [(3, 20), (16, 48), (2, 33)], num_decodes=0)


def check_mixed_steps(cls: type[AttentionBackend]) -> None:
    """Decodes, one-token chunks, chunks and whole prompts in one step."""
    compare(cls, make_spec(), [(1, 33), (1, 5), (1, 20), (7, 30), (19, 19)], num_decodes=2)


def check_group_sizes(cls: type[AttentionBackend]) -> None:
    """Query heads per KV head: one, some, a number that is no power of two, all."""
    for heads, kv_heads in ((2, 2), (8, 2), (7, 1), (6, 2)):
        compare(cls, make_spec(num_heads=heads, num_kv_heads=kv_heads), [(1, 21), (9, 30)])


def check_head_dims(cls: type[AttentionBackend]) -> None:
    """Heads of 64, 96, 128 and 256 features."""
    for dim in (64, 96, 128, 256):
        compare(cls, make_spec(qk_head_dim=dim, v_head_dim=dim, num_heads=2, num_kv_heads=1), [(1, 20), (5, 18)])


def check_block_sizes(cls: type[AttentionBackend]) -> None:
    """Pages of other sizes."""
    for size in (1, 8, 32):
        compare(cls, make_spec(block_size=size), [(1, 21), (6, 35)])


def check_sliding_window(cls: type[AttentionBackend]) -> None:
    """Windows shorter than a page, longer than the context, and of one token."""
    for window in (1, 7, 20, 1000):
        spec = make_spec(kind="sliding", window=window)
        compare(cls, spec, [(1, 50), (1, 6), (24, 60), (30, 30)])


def check_softcap(cls: type[AttentionBackend]) -> None:
    """Scores bent by ``softcap * tanh(score / softcap)``."""
    compare(cls, make_spec(softcap=2.0, scale=1.0), [(1, 40), (20, 33)])


def check_log_sum_exp(cls: type[AttentionBackend]) -> None:
    """``lse_out`` is the natural logarithm of the sum of the exponentials of the scaled scores."""
    compare(cls, make_spec(), [(1, 40), (20, 33)], lse=True)
    compare(cls, make_spec(softcap=3.0), [(1, 18), (4, 9)], lse=True)


def check_long_decodes(cls: type[AttentionBackend]) -> None:
    """Lengths that a backend may split over several programs."""
    compare(cls, make_spec(), [(1, 255), (1, 700), (1, 3)], lse=True)
    compare(cls, make_spec(kind="sliding", window=300), [(1, 700)])


def check_half_precision(cls: type[AttentionBackend]) -> None:
    """The same in float16 and bfloat16."""
    done = 0
    for dtype in (torch.float16, torch.bfloat16):
        spec = make_spec(dtype=dtype, kv_dtype=dtype)
        if _device(cls, spec) is not None:
            compare(cls, spec, [(1, 33), (1, 7), (19, 40)])
            done += 1
    if not done:
        raise unittest.SkipTest("no 16-bit type is supported")


def check_unused_slots_do_not_leak(cls: type[AttentionBackend]) -> None:
    """NaN in every slot that no request owns, block 0 included, changes nothing."""
    compare(cls, make_spec(), [(1, 18), (1, 40), (9, 21)], poison=True)
    compare(cls, make_spec(kind="sliding", window=5), [(1, 40), (9, 41)], poison=True)


def check_block_table_does_not_matter(cls: type[AttentionBackend]) -> None:
    """The same tokens in other blocks give the same bits."""
    spec = make_spec()
    first = attend(cls, spec, Problem.random(spec, [(1, 40), (9, 21)], table_seed=1))
    second = attend(cls, spec, Problem.random(spec, [(1, 40), (9, 21)], table_seed=2))
    assert torch.equal(first[0], second[0]), "the result depends on which blocks hold a request"


def check_one_plan_serves_every_layer_and_the_next_replaces_it(cls: type[AttentionBackend]) -> None:
    """``plan`` once, ``run`` for each layer; then another step."""
    spec = make_spec()
    device = _needed_device(cls, spec)
    backend = _prepared(cls, spec, device)
    for seed, requests in enumerate(([(1, 30), (4, 12)], [(8, 24)], [(1, 2), (1, 3)])):
        problems = [Problem.random(spec, requests, seed=seed * 7 + layer) for layer in range(2)]
        backend.plan(problems[0].batch(device))
        for layer, problem in enumerate(problems):
            _assert_close(_run(backend, layer, problem, device)[0], expected_attention(spec, problem)[0], spec.dtype)


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

        if num_decodes is None:
            num_decodes = sum(queries == 1 for queries, _ in requests)
        width = max(-(-length // spec.block_size) for _, length in requests)
        order = torch.randperm(len(requests) * width, generator=torch.Generator().manual_seed(table_seed))
        return cls(
            spec=spec,
            requests=requests,
            num_decodes=num_decodes,
            q=normal(sum(queries for queries, _ in requests), spec.num_heads, spec.qk_head_dim),
            keys=[normal(length, spec.num_kv_heads, spec.qk_head_dim) for _, length in requests],
            values=[normal(length, spec.num_kv_heads, spec.v_head_dim) for _, length in requests],
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
        )

    def cache(self, backend: AttentionBackend, device: torch.device) -> LayerKV:
        """Every request's keys and values in their blocks, one layer of two in a pool of that layout."""
        layout, size = backend.kv_layout(), self.spec.block_size
        raw = torch.zeros(int(self.table.max()) + 1, 2 * layout.bytes_per_block, dtype=torch.uint8)
        kv = layout.view(raw[:, layout.bytes_per_block :])
        if self.poison:
            kv.k.fill_(float("nan"))
            kv.v.fill_(float("nan"))
        for row, (queries, length) in enumerate(self.requests):
            window = self.spec.window
            first = 0 if window is None or not self.poison else max(0, length - queries - window + 1)
            position = torch.arange(first, length)
            block, offset = self.table[row].long()[position // size], position % size
            kv.k.transpose(1, 2)[block, offset] = self.keys[row][first:].to(kv.k.dtype)
            kv.v.transpose(1, 2)[block, offset] = self.values[row][first:].to(kv.v.dtype)
        return layout.view(raw.to(device)[:, layout.bytes_per_block :])


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
    _assert_close(out, expected, spec.dtype)
    if lse_out is not None:
        _assert_close(lse_out, expected_lse, spec.dtype)


def attend(
    cls: type[AttentionBackend], spec: AttentionSpec, problem: Problem, lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(out, log-sum-exp or None) of a new backend, on the CPU."""
    device = _needed_device(cls, spec)
    backend = _prepared(cls, spec, device)
    backend.plan(problem.batch(device))
    return _run(backend, 0, problem, device, lse)


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


def _run(
    backend: AttentionBackend, layer: int, problem: Problem, device: torch.device, lse: bool = False
) -> tuple[Tensor, Tensor | None]:
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


def _prepared(cls: type[AttentionBackend], spec: AttentionSpec, device: torch.device) -> AttentionBackend:
    backend = cls(spec, device)
    backend.prepare(AttentionLimits(max_num_reqs=64, max_num_tokens=_LIMIT, max_model_len=_LIMIT, device=device))
    return backend


def _device(cls: type[AttentionBackend], spec: AttentionSpec) -> torch.device | None:
    devices = [torch.device("cuda")] if torch.cuda.is_available() else []
    return next((d for d in [*devices, torch.device("cpu")] if not cls.unsupported(spec, d)), None)


def _needed_device(cls: type[AttentionBackend], spec: AttentionSpec) -> torch.device:
    device = _device(cls, spec)
    if device is None:
        raise unittest.SkipTest("; ".join(cls.unsupported(spec, torch.device("cpu"))))
    return device


def _assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(got.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
