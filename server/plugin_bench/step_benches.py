"""What runs beside attention and linear layers in a step: operations and logits processors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from quire.core.contracts.logits_processor import LogitsBatch, LogitsProcessor
from quire.core.contracts.op import Operations
from quire.core.messages import NewRequest
from quire.core.ops.implementations import TorchOperations
from quire.core.plugin.options import parse_options
from quire.core.sampling_params import SamplingParams
from quire.core.testing.op_problem import OperationProblem, OperationShape, make_problem
from quire.server.plugin_bench.cases import BenchCase, CaseRefusedError, KindBench, PreparedCase, count_copies
from quire.server.plugin_bench.timer import make_timer

__all__ = ["LogitsBench", "OperationBench"]

_LLAMA_8B = OperationShape(4096, 14336, 32, 8, 128, 128256)
_SMALL = OperationShape(256, 512, 8, 2, 64, 1024)
_EXAMPLE_PARAMS = SamplingParams(
    min_tokens=8,
    max_tokens=64,
    stop_token_ids=[2],
    logit_bias={3: -1.0},
    allowed_token_ids=[1, 3, 4, 9],
    bad_words_token_ids=[[4, 5]],
)


class OperationBench(KindBench):
    """One operation for different numbers of tokens, beside torch in float64."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._shape = _LLAMA_8B if device.type == "cuda" else _SMALL
        self._dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def list_cases(self, target: type[Operations]) -> Sequence[BenchCase]:
        """Every operation that ``target`` has."""
        tokens = (1, 32, 256, 2048) if self.device.type == "cuda" else (1, 32)
        return [BenchCase(f"{name} of {n}", (name, n)) for name in target.list_operations() for n in tokens]

    def prepare(self, target: type[Operations], case: BenchCase) -> PreparedCase:
        """Calls with so many sets of arguments that none stays in the L2 cache."""
        name, num_tokens = case.parameters
        if reasons := target.unsupported(self.device):
            raise CaseRefusedError("; ".join(reasons))
        if name not in target.list_operations():
            raise CaseRefusedError(f"has no {name}")
        operations = target(self.device, parse_options(target, {}))
        first = self._make_problem(name, num_tokens, 0)
        num_bytes = first.count_bytes()
        copies = count_copies(num_bytes, self.device)
        problems = [first, *(self._make_problem(name, num_tokens, seed) for seed in range(1, copies))]

        def launch() -> None:
            for problem in problems:
                problem.run(operations)

        error = _compare_operation(operations, first)
        timer = make_timer(launch, self.device)
        flops = 0
        if name == "lm_head":
            hidden, weight = first.arguments
            flops = 2 * hidden.numel() * len(weight)
        return PreparedCase(lambda: timer() / copies, error, num_bytes, flops)

    def _make_problem(self, name: str, num_tokens: int, seed: int) -> OperationProblem:
        return make_problem(name, num_tokens, self._shape, self._dtype, self.device, variant=True, seed=seed)


class LogitsBench(KindBench):
    """A logits processor between two graphs: 256 rows, of which each has its request."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._vocab = 151936 if device.type == "cuda" else 1024

    def list_cases(self, target: type[LogitsProcessor]) -> Sequence[BenchCase]:
        """One row and many."""
        return [BenchCase(f"apply, {n} rows", n) for n in ((1, 256) if self.device.type == "cuda" else (1, 64))]

    def prepare(self, target: type[LogitsProcessor], case: BenchCase) -> PreparedCase:
        """``apply`` on the rows of requests that the class names as its example."""
        processor, rows = target(self._vocab, self.device, parse_options(target, {})), list(range(case.parameters))
        params = target.example_params() or _EXAMPLE_PARAMS
        has_work = [
            processor.add_row(NewRequest(row, row, [5, 6, 7], 3, 0, params, seed=1, stop_token_ids=frozenset({2})))
            for row in rows
        ]
        if not any(has_work):
            raise CaseRefusedError("has nothing to do for its example request; name one in example_params()")
        token_ids = torch.full((len(rows), 64), 5, dtype=torch.int32, device=self.device)
        num_tokens = torch.full((len(rows),), 5, dtype=torch.int32, device=self.device)
        batch = LogitsBatch(rows, [5] * len(rows), token_ids, num_tokens)
        logits = torch.randn(len(rows), self._vocab, device=self.device)
        timer = make_timer(partial(processor.apply, logits, batch), self.device, capture=False)
        return PreparedCase(timer, note="launched eagerly, as in the engine; the host's work included")


def _compare_operation(operations: Operations, problem: OperationProblem) -> float:
    exact = problem.map_tensors(lambda x: x.cpu().double() if x.is_floating_point() else x.cpu())
    expected = exact.solve(TorchOperations(torch.device("cpu")))
    errors = [
        ((actual.double().cpu() - expected[name]).abs() / (1 + expected[name].abs())).max()
        for name, actual in problem.solve(operations).items()
    ]
    return float(max(errors))
