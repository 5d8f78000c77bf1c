"""Calls of a plugin that launch its kernels: what ``quire plugins check --aot`` compiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from quire.core.contracts.attention import AttentionBackend, AttentionLimits
from quire.core.contracts.op import Operations
from quire.core.contracts.quant import QuantizationLoader
from quire.core.contracts.sampler import Sampler, SamplingTable
from quire.core.errors import PluginError
from quire.core.plugin.options import parse_options
from quire.core.testing.attention_problem import AttentionProblem, make_spec
from quire.core.testing.op_problem import OperationShape, make_problem
from quire.core.testing.pretended_gpu import PRETENDED_GPU, PretendedGpu
from quire.core.testing.quant_problem import StoredLayer

__all__ = ["AOT_KINDS", "AotProblem", "list_problems"]

AOT_KINDS = ("attention", "op", "quant", "sampler")
"""Kinds whose kernels an example problem launches."""

_GPU = PRETENDED_GPU
_STEPS = {"decode": [(1, 300)] * 8, "prefill": [(150, 150), (70, 200)], "verify": [(4, 300)] * 4}
_OUTPUTS, _INPUTS, _TOKENS = 1024, 1024, (1, 16, 64)
_OPERATION_SHAPE = OperationShape(1024, 2048, 8, 2, 128, 512)


@dataclass(frozen=True)
class AotProblem:
    """A call, and what it is of."""

    name: str
    launch: Callable[[], Any]

    def run(self) -> None:
        """Call it as if there were a GPU."""
        with PretendedGpu():
            self.launch()


def list_problems(cls: type, kind: str) -> Iterator[AotProblem]:
    """Calls in bfloat16 with sizes of Llama's. Tensors on the CPU say that they are on a GPU; what is launched is
    never run."""
    if kind == "attention":
        yield from _list_attention(cls)
    elif kind == "op":
        yield from _list_operations(cls)
    elif kind == "quant":
        yield from _list_products(cls)
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
            q = problem.q.to(_GPU)
            backend = cls(spec, _GPU, parse_options(cls, {}))
            backend.allocate_workspaces(AttentionLimits(64, 4096, _GPU, problem.decode_query_len))
            backend.prepare_metadata(problem.make_batch(_GPU))
            out = torch.empty(len(q), spec.num_heads, spec.v_head_dim, dtype=spec.dtype, device=_GPU)
            kv = problem.make_kv_cache(backend, _GPU)
            backend.run(0, q, kv, out, **problem.step_kv(backend, _GPU))

        yield AotProblem(f"{name} step", run)


def _list_operations(cls: type[Operations]) -> Iterator[AotProblem]:
    for name in cls.list_operations():
        for variant in (False, True):

            def run(name: str = name, variant: bool = variant) -> None:
                problem = make_problem(name, 8, _OPERATION_SHAPE, torch.bfloat16, _GPU, variant=variant)
                problem.run(cls(_GPU, parse_options(cls, {})))

            yield AotProblem(f"{name}{', variant' * variant}", run)


def _list_products(cls: type[QuantizationLoader]) -> Iterator[AotProblem]:
    example = StoredLayer.make_example(cls, _OUTPUTS, _INPUTS)
    if reasons := cls.unsupported(example.config, _GPU):
        raise PluginError(f"{cls.__qualname__}: {reasons[0]}")
    for num_tokens in _TOKENS:

        def run(num_tokens: int = num_tokens) -> None:
            x = torch.zeros(num_tokens, _INPUTS, dtype=torch.bfloat16, device=_GPU)
            example.load(torch.bfloat16, _GPU).apply(x)

        yield AotProblem(f"{num_tokens} token{'s' * (num_tokens > 1)}", run)


def _list_sampling(cls: type[Sampler]) -> Iterator[AotProblem]:
    rows, vocab = 8, 32000
    for greedy in (True, False):

        def run(greedy: bool = greedy) -> None:
            sampler = cls(vocab, _GPU, parse_options(cls, {}))
            if not sampler.prepare_graph_sampling(rows):
                return
            counts, values = (torch.zeros(rows + 1, dtype=dtype, device=_GPU) for dtype in (torch.int32, torch.float32))
            table = SamplingTable(
                torch.zeros(rows + 1, 256, dtype=torch.int32, device=_GPU), counts, values, counts.clone(),
                values.clone(), values.clone(), torch.zeros(rows + 1, dtype=torch.int64, device=_GPU),
            )  # fmt: skip
            logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device=_GPU)
            index, tokens = torch.arange(rows, device=_GPU), torch.zeros(rows, dtype=torch.int32, device=_GPU)
            sampler.sample_from_table(logits, index, table, tokens, greedy=greedy)

        yield AotProblem("greedy rows" if greedy else "random rows", run)
