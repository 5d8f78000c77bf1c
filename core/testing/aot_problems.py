"""Calls of a plugin that launch its kernels: what ``quire plugins check --aot`` compiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from quire.core.contracts.attention import AttentionBackend, AttentionLimits
from quire.core.contracts.op import Operations
from quire.core.contracts.sampler import Sampler, SamplingTable
from quire.core.errors import PluginError
from quire.core.plugin.options import parse_options
from quire.core.testing.attention_problem import AttentionProblem, make_spec
from quire.core.testing.op_problem import OperationShape, make_problem

__all__ = ["AOT_KINDS", "AotProblem", "list_problems"]

AOT_KINDS = ("attention", "op", "sampler")
"""Kinds whose kernels an example problem launches."""

_CPU = torch.device("cpu")
_STEPS = {"decode": [(1, 300)] * 8, "prefill": [(150, 150), (70, 200)], "verify": [(4, 300)] * 4}
_OPERATION_SHAPE = OperationShape(1024, 2048, 8, 2, 128, 512)


@dataclass(frozen=True)
class AotProblem:
    """A call, and what it is of."""

    name: str
    run: Callable[[], Any]


def list_problems(cls: type, kind: str) -> Iterator[AotProblem]:
    """Calls in bfloat16 with sizes of Llama's. Tensors are on the CPU, and what is launched is never run."""
    if kind == "attention":
        yield from _list_attention(cls)
    elif kind == "op":
        yield from _list_operations(cls)
    elif kind == "sampler":
        yield from _list_sampling(cls)
    else:
        raise PluginError(f"--aot compiles kernels of {', '.join(AOT_KINDS)}, not of {kind}")


def _list_attention(cls: type[AttentionBackend]) -> Iterator[AotProblem]:
    spec = make_spec(
        num_heads=32, num_kv_heads=8, qk_head_dim=128, v_head_dim=128, scale=128**-0.5,
        dtype=torch.bfloat16, kv_dtype=torch.bfloat16,
    )  # fmt: skip
    for name, requests in _STEPS.items():

        def run(requests: Any = requests, num_decodes: int = 0 if name == "prefill" else len(requests)) -> None:
            problem = AttentionProblem.random(spec, requests, num_decodes=num_decodes)
            backend = cls(spec, _CPU, parse_options(cls, {}))
            backend.allocate_workspaces(AttentionLimits(64, 4096, _CPU, problem.decode_query_len))
            backend.prepare_metadata(problem.make_batch(_CPU))
            out = torch.empty(len(problem.q), spec.num_heads, spec.v_head_dim, dtype=spec.dtype)
            kv = problem.make_kv_cache(backend, _CPU)
            backend.run(0, problem.q, kv, out, **problem.step_kv(backend, _CPU))

        yield AotProblem(f"{name} step", run)


def _list_operations(cls: type[Operations]) -> Iterator[AotProblem]:
    operations = cls(_CPU, parse_options(cls, {}))
    for name in cls.list_operations():
        for variant in (False, True):
            problem = make_problem(name, 8, _OPERATION_SHAPE, torch.bfloat16, _CPU, variant=variant)
            yield AotProblem(problem.label, lambda problem=problem: problem.run(operations))  # type: ignore[misc]


def _list_sampling(cls: type[Sampler]) -> Iterator[AotProblem]:
    rows, vocab = 8, 32000
    sampler = cls(vocab, _CPU, parse_options(cls, {}))
    if not sampler.prepare_graph_sampling(rows):
        return
    columns = [torch.zeros(rows + 1, dtype=dtype) for dtype in (torch.int32, torch.float32)]
    table = SamplingTable(
        torch.zeros(rows + 1, 256, dtype=torch.int32), columns[0].clone(), columns[1].clone(), columns[0].clone(),
        columns[1].clone(), columns[1].clone(), torch.zeros(rows + 1, dtype=torch.int64),
    )  # fmt: skip
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16)
    index, tokens = torch.arange(rows), torch.zeros(rows, dtype=torch.int32)
    for greedy in (True, False):
        yield AotProblem(
            "greedy rows" if greedy else "random rows",
            lambda greedy=greedy: sampler.sample_from_table(logits, index, table, tokens, greedy=greedy),  # type: ignore[misc]
        )
