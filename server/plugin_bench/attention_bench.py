"""Attention backends: decode steps, prompts and mixed steps beside float64."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quire.core.contracts.attention import AttentionBackend, AttentionSpec, GraphKey, GraphKind
from quire.core.plugin.options import parse_options
from quire.core.testing.attention_problem import AttentionProblem, compute_reference, make_backend, run_layer
from quire.server.plugin_bench.attention_step import POOL_BYTES, MemoryPool
from quire.server.plugin_bench.cases import BenchCase, CaseRefusedError, KindBench, PreparedCase
from quire.server.plugin_bench.timer import make_timer

__all__ = ["AttentionBench", "StepShape", "make_spec"]

_POOL_BYTES_CPU = 8 << 20
_ERROR_REQUESTS, _ERROR_TOKENS = 4, 600
"""The oracle solves as many requests, of at most as many tokens."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """Queries and context length of each request of a step, decodes first."""

    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]

    @property
    def is_decode(self) -> bool:
        """Whether every request has one query."""
        return max(self.query_lens) == 1

    def count_pairs(self) -> int:
        """Pairs of a query and a key that it sees."""
        both = zip(self.query_lens, self.seq_lens, strict=True)
        return sum(query * (length - query) + query * (query + 1) // 2 for query, length in both)


class AttentionBench(KindBench):
    """Microseconds of one layer, of many that lie in a pool as the engine's do."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        on_gpu = device.type == "cuda"
        self.spec = make_spec() if on_gpu else make_spec(4, 2, 64, torch.float32)
        free = torch.cuda.mem_get_info(device)[0] if on_gpu else _POOL_BYTES_CPU
        self.pool = MemoryPool(min(POOL_BYTES, free // 2) if on_gpu else free, device, self.spec.dtype)

    def list_cases(self, target: type) -> Sequence[BenchCase]:
        """Decodes at three sizes of batch, a prompt, a chunk, and decodes beside a chunk."""
        if self.device.type != "cuda":
            shapes = {"decode 2 x 40": _decode(2, 40), "prefill 1 x 20": StepShape((20,), (20,))}
            return [BenchCase(name, shape) for name, shape in shapes.items()]
        shapes = {f"decode {n} x {length}": _decode(n, length) for n in (1, 32, 256) for length in (1024, 4096)}
        shapes["prefill 1 x 2048"] = StepShape((2048,), (2048,))
        shapes["chunk 1 x 2048 of 8192"] = StepShape((2048,), (8192,))
        shapes["mixed 64 x 1024 + 1 x 1024"] = StepShape((*[1] * 64, 1024), (*[1024] * 64, 1024))
        return [BenchCase(name, shape) for name, shape in shapes.items()]

    def prepare(self, target: type[AttentionBackend], case: BenchCase) -> PreparedCase:
        """A step of ``case.parameters``, a ``StepShape``."""
        if reasons := target.unsupported(self.spec, self.device):
            raise CaseRefusedError("; ".join(reasons))
        shape: StepShape = case.parameters
        kind: GraphKind = "decode" if shape.is_decode else "mixed"
        is_captured = self.device.type == "cuda" and kind in target.graph_support
        key = GraphKey(kind, sum(shape.query_lens), len(shape.seq_lens)) if is_captured else None
        step = self.pool.make_step(
            self.spec,
            shape.query_lens,
            shape.seq_lens,
            lambda spec, device: target(spec, device, parse_options(target, {})),
            key=key,
        )
        timer = make_timer(step.run, self.device, capture=is_captured)
        spec, num_tokens = self.spec, sum(shape.query_lens)
        read = sum(shape.seq_lens) * spec.num_kv_heads * spec.kv_dtype.itemsize
        written = num_tokens * spec.num_heads * spec.dtype.itemsize
        return PreparedCase(
            lambda: timer() / step.num_layers,
            error=self._compute_error(target, shape),
            num_bytes=2 * spec.qk_head_dim * (read + written),
            num_flops=4 * shape.count_pairs() * spec.num_heads * spec.qk_head_dim,
            note="" if is_captured or self.device.type != "cuda" else "launched eagerly: it cannot be captured",
        )

    def _compute_error(self, target: type[AttentionBackend], shape: StepShape) -> float:
        """Of some of the requests, cut to a length that float64 solves at once."""
        pairs = sorted(zip(shape.query_lens, shape.seq_lens, strict=True), key=lambda pair: pair[0] != 1)
        kept = [*itertools.islice(pairs, _ERROR_REQUESTS - 1), pairs[-1]]
        requests = [(min(query, _ERROR_TOKENS // 4), min(length, _ERROR_TOKENS)) for query, length in kept]
        problem = AttentionProblem.random(self.spec, requests)
        backend = make_backend(target, self.spec, self.device, problem.decode_query_len)
        backend.prepare_metadata(problem.make_batch(self.device))
        out, _ = run_layer(backend, 0, problem, self.device)
        expected, _ = compute_reference(problem)
        return float(((out.double() - expected).abs() / (1 + expected.abs())).max())


def make_spec(
    num_heads: int = 32,
    num_kv_heads: int = 8,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    kv_dtype: torch.dtype | None = None,
) -> AttentionSpec:
    """Full attention, by default of Llama 3.1 8B, over blocks of 16, whose keys are of ``kv_dtype`` or of ``dtype``."""
    return AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        qk_head_dim=head_dim,
        v_head_dim=head_dim,
        scale=head_dim**-0.5,
        dtype=dtype,
        kv_dtype=kv_dtype or dtype,
        block_size=16,
    )


def _decode(num_reqs: int, length: int) -> StepShape:
    return StepShape((1,) * num_reqs, (length,) * num_reqs)
