"""What runs beside attention in a step: operations, linear methods, samplers and logits processors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quire.core.contracts.logits_processor import LogitsBatch, LogitsProcessor
from quire.core.contracts.op import Operations
from quire.core.contracts.quant import LayerInfo, LinearMethod, QuantizationLoader, StoredWeight
from quire.core.contracts.sampler import Sampler, SamplingBatch, SamplingTable
from quire.core.messages import NewRequest
from quire.core.ops.implementations import TorchOperations
from quire.core.plugin.options import parse_options
from quire.core.sampling_params import SamplingParams
from quire.core.testing.op_problem import OperationProblem, OperationShape, make_problem
from quire.server.plugin_bench.cases import BenchCase, CaseRefusedError, KindBench, PreparedCase
from quire.server.plugin_bench.timer import L2_BYTES, make_timer

__all__ = ["LinearBench", "LogitsBench", "OperationBench", "SamplerBench"]

_MAX_COPIES = 64
_LLAMA_8B = OperationShape(4096, 14336, 32, 8, 128, 128256)
_SMALL = OperationShape(256, 512, 8, 2, 64, 1024)
_EXAMPLE_PARAMS = SamplingParams(
    min_tokens=8, max_tokens=64, stop_token_ids=[2], logit_bias={3: -1.0}, bad_words_token_ids=[[4, 5]]
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
        copies = _count_copies(num_bytes, self.device)
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


class LinearBench(KindBench):
    """A linear method of a quantization: a layer's product for different numbers of tokens."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def list_cases(self, target: type[QuantizationLoader]) -> Sequence[BenchCase]:
        """Layers of Llama 3.1 8B, or a small one on a CPU."""
        if self.device.type != "cuda":
            return [BenchCase(f"256x256, {n} tokens", (256, 256, n)) for n in (1, 16)]
        layers = {"o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
        return [
            BenchCase(f"{name} {features}x{inputs}, {n} tokens", (features, inputs, n))
            for name, (features, inputs) in layers.items()
            for n in (1, 16, 256)
        ]

    def prepare(self, target: type[QuantizationLoader], case: BenchCase) -> PreparedCase:
        """As many copies of the layer as do not fit into the L2 cache."""
        features, inputs, num_tokens = case.parameters
        stored = _store_weights(target, features, inputs, self.device)
        one_layer = self._load(target, stored, features, inputs)
        num_bytes = sum(p.numel() * p.element_size() for p in one_layer.module.parameters())
        copies = _count_copies(num_bytes, self.device)
        layers = [one_layer, *(self._load(target, stored, features, inputs) for _ in range(copies - 1))]
        x = torch.randn(num_tokens, inputs, generator=torch.Generator().manual_seed(1)).to(self.device, self._dtype)

        def launch() -> None:
            for layer in layers:
                layer.method.apply(layer.module, x)

        actual = one_layer.method.apply(one_layer.module, x).double()
        expected = x.double() @ stored.weight.to(self.device).double().T
        timer = make_timer(launch, self.device)
        return PreparedCase(
            lambda: timer() / copies,
            error=float((actual - expected).norm() / expected.norm()),
            num_bytes=num_bytes + (x.numel() + num_tokens * features) * x.element_size(),
            num_flops=2 * num_tokens * features * inputs,
            note="error: of the norm, of the weights as they are stored",
        )

    def _load(self, target: type[QuantizationLoader], stored: StoredWeight, features: int, inputs: int) -> _LoadedLayer:
        config = {} if "weight" in stored.tensors and len(stored.tensors) == 1 else target.example_config()
        info = LayerInfo(
            "layer", "linear", inputs, features, ("layer",), (features,), (features,), inputs, "column", self._dtype,
            False,
        )  # fmt: skip
        method = target(config, parse_options(target, {})).get_linear_method(info)
        layer = nn.Module()
        with torch.no_grad():
            method.create_weights(layer, info, self.device)
            for name, tensor in stored.tensors.items():
                method.load_tensor(layer, info, 0, name, tensor, 0, 1)
            method.process_weights_after_loading(layer)
        return _LoadedLayer(layer, method)


@dataclass(frozen=True)
class _LoadedLayer:
    module: nn.Module
    method: LinearMethod


class SamplerBench(KindBench):
    """A sampler over whole vocabularies, beside the argmax."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._vocab = 151936 if device.type == "cuda" else 1024

    def list_cases(self, target: type[Sampler]) -> Sequence[BenchCase]:
        """Greedy rows, and rows with temperature, top-k and top-p."""
        kinds = {"greedy": (0.0, 0, 1.0), "T 0.8": (0.8, 0, 1.0), "T 0.6, top_k 20, top_p 0.95": (0.6, 20, 0.95)}
        rows = (1, 32, 256) if self.device.type == "cuda" else (4,)
        return [BenchCase(f"{n} rows, {name}", (n, kinds[name])) for n in rows for name in kinds]

    def prepare(self, target: type[Sampler], case: BenchCase) -> PreparedCase:
        """Into the request table where it can, else as it is called between graphs."""
        rows, (temperature, top_k, top_p) = case.parameters
        sampler = target(self._vocab, self.device, parse_options(target, {}))
        in_graph = sampler.prepare_graph_sampling(rows) and self.device.type == "cuda"
        copies = _count_copies(rows * self._vocab * 2, self.device)
        dtype = torch.bfloat16 if in_graph else torch.float32
        sets = [(torch.randn(rows, self._vocab, device=self.device) * 3).to(dtype) for _ in range(copies)]
        table = _make_table(rows, temperature, top_k, top_p, self.device)
        index = torch.arange(rows, device=self.device)
        tokens = torch.zeros(rows, dtype=torch.int32, device=self.device)
        batch = SamplingBatch(
            table.temperature[:rows], table.top_k[:rows], table.top_p[:rows], table.min_p[:rows], table.seed[:rows],
            table.num_tokens[:rows].long(), temperature > 0, top_k > 0, top_p < 1, False,
        )  # fmt: skip

        def launch() -> None:
            for logits in sets:
                if in_graph:
                    sampler.sample_from_table(logits, index, table, tokens, greedy=temperature == 0)
                else:
                    tokens.copy_(sampler.sample(logits.clone(), batch))

        timer = make_timer(launch, self.device, capture=in_graph)
        error = None
        if temperature == 0:
            error = float((sampler.sample(sets[0].float(), batch).long() != sets[0].argmax(-1)).float().mean())
        note = "" if in_graph else "launched eagerly, logits in float32 copied before"
        return PreparedCase(lambda: timer() / copies, error, rows * self._vocab * dtype.itemsize, note=note)


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


def _count_copies(num_bytes: int, device: torch.device) -> int:
    return max(1, min(_MAX_COPIES, -(-L2_BYTES // max(1, num_bytes)))) if device.type == "cuda" else 2


def _compare_operation(operations: Operations, problem: OperationProblem) -> float:
    exact = problem.map_tensors(lambda x: x.cpu().double() if x.is_floating_point() else x.cpu())
    expected = exact.solve(TorchOperations(torch.device("cpu")))
    errors = [
        ((actual.double().cpu() - expected[name]).abs() / (1 + expected[name].abs())).max()
        for name, actual in problem.solve(operations).items()
    ]
    return float(max(errors))


def _store_weights(target: type[QuantizationLoader], features: int, inputs: int, device: torch.device) -> StoredWeight:
    """As ``example_tensors`` stores them, or plain ones for a loader that reads those."""
    stored = target.example_tensors(features, inputs)
    if stored is not None:
        if reasons := target.unsupported(target.example_config(), device):
            raise CaseRefusedError("; ".join(reasons))
        return stored
    if reasons := target.unsupported({}, device):
        raise CaseRefusedError("; ".join(reasons))
    weight = torch.randn(features, inputs, generator=torch.Generator().manual_seed(2)) / inputs**0.5
    return StoredWeight({"weight": weight}, weight)


def _make_table(rows: int, temperature: float, top_k: int, top_p: float, device: torch.device) -> SamplingTable:
    def column(value: Any, dtype: torch.dtype) -> Tensor:
        return torch.full((rows + 1,), value, dtype=dtype, device=device)

    seeds = torch.arange(rows + 1, device=device) * 7919
    return SamplingTable(
        column(0, torch.int32)[:, None].repeat(1, 4096), column(100, torch.int32), column(temperature, torch.float32),
        column(top_k, torch.int32), column(top_p, torch.float32), column(0, torch.float32), seeds,
    )  # fmt: skip
