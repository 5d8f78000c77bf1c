"""What replaces an operation must give what it gives in torch, and must be fit for a CUDA graph."""

from __future__ import annotations

import importlib.util
import unittest
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from quire.core.contracts.op import Operations
from quire.core.ops.implementations import TorchOperations
from quire.core.plugin.options import parse_options
from quire.core.testing.capture_rules import assert_can_be_captured
from quire.core.testing.op_problem import ActivationKind, OperationProblem, OperationShape, make_problem

__all__ = [
    "check_arguments_are_left_alone",
    "check_captured_is_eager",
    "check_has_an_operation",
    "check_quantized_results_are_those_of_torch",
    "check_results_are_those_of_torch",
    "check_the_cache_is_written_at_its_slots_alone",
]

_TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Relative to one plus the value: operations that round once to the dtype, in another order of summation."""
_TOKENS = (1, 19)
_QUANTIZED: tuple[ActivationKind, ...] = ("int8_token", "fp8_token", "fp8_tensor", "fp8_group")
_WIDE = OperationShape(hidden=256, intermediate=128)
"""Groups of a quantized activation have 128 features."""


def check_has_an_operation(cls: type[Operations]) -> None:
    """At least one method of the contract's operations is overridden."""
    assert cls.list_operations(), "overrides no operation; write rms_norm, for example"


def check_results_are_those_of_torch(cls: type[Operations]) -> None:
    """Every operation that it has, for one token and many, against torch in float64."""
    operations, device = _make(cls)
    for problem in _list_problems(cls, device):
        dtype = _get_dtype(problem)
        expected = _solve_exactly(problem)
        for name, actual in problem.solve(operations).items():
            wanted = expected[name]
            assert actual.shape == wanted.shape, (
                f"{problem.label}: the {name} is {tuple(actual.shape)}, not {tuple(wanted.shape)}"
            )
            assert actual.dtype == dtype, f"{problem.label}: the {name} is of {actual.dtype}, not {dtype}"
            error = ((actual.double().cpu() - wanted).abs() / (1 + wanted.abs())).max().item()
            assert error <= _TOLERANCES[dtype], f"{problem.label}: the {name} is off by {error:.2g}"  # NaN fails


def check_quantized_results_are_those_of_torch(cls: type[Operations]) -> None:
    """The norm and the activation emit 8 bits where the layer behind them takes those: within one step of torch's."""
    operations, device = _make(cls)
    names = [name for name in ("rms_norm", "silu_and_mul") if name in cls.list_operations()]
    if not names:
        raise unittest.SkipTest("has neither the norm nor the activation")
    for name in names:
        for kind in _QUANTIZED[:1] if _is_interpreted(device) else _QUANTIZED:
            problem = make_problem(name, 5, _WIDE, torch.float32, device, output_format=kind)
            actual, expected = problem.solve(operations), problem.solve(TorchOperations(device))
            assert actual.keys() == expected.keys(), f"{problem.label}: gave {', '.join(actual)}"
            key = next(each for each in actual if each.endswith("quantized"))
            scale = key.replace("quantized", "its scale")
            assert actual[key].dtype == expected[key].dtype, f"{problem.label}: values are of {actual[key].dtype}"
            assert actual[scale].shape == expected[scale].shape, f"{problem.label}: scale is {actual[scale].shape}"
            torch.testing.assert_close(actual[scale], expected[scale], rtol=1e-4, atol=0)
            step = 1.0 if kind == "int8_token" else 32.0  # of e4m3 below its largest number
            worst = (actual[key].float() - expected[key].float()).abs().max().item()
            assert worst <= step, f"{problem.label}: values differ by {worst:g}"


def check_the_cache_is_written_at_its_slots_alone(cls: type[Operations]) -> None:
    """The rotary embedding writes keys and values to ``slot_mapping``, leaves the rest of the cache, and writes nothing
    where there is no cache."""
    if "rope_and_cache" not in cls.list_operations():
        raise unittest.SkipTest("has no rope_and_cache")
    operations, device = _make(cls)
    problem = make_problem("rope_and_cache", 9, OperationShape(), torch.float32, device)
    cache, slots = problem.arguments[5], problem.arguments[6]
    results = problem.solve(operations)
    for name, before in (("cache of keys", cache.k), ("cache of values", cache.v)):
        written = (results[name] != before).any(-1).any(1).flatten()  # (blocks * block_size,)
        expected = torch.zeros_like(written)
        expected[slots] = True
        assert torch.equal(written, expected), f"{problem.label}: the {name} changed at other slots than its own"
    arguments = (*problem.arguments[:5], None, slots)
    OperationProblem("rope_and_cache", "without a cache", arguments, problem.keywords).solve(operations)


def check_arguments_are_left_alone(cls: type[Operations]) -> None:
    """No operation but the rotary embedding, which may overwrite ``q`` and ``k``, changes what it is given."""
    operations, device = _make(cls)
    for name in cls.list_operations():
        problem = make_problem(name, 3, OperationShape(), torch.float32, device, variant=True)
        given = [x for x in problem.arguments if isinstance(x, Tensor)]
        kept = given[2:] if problem.operation == "rope_and_cache" else given
        before = [x.clone() for x in kept]
        problem.run(operations)
        assert all(map(torch.equal, before, kept)), f"{problem.label}: an argument was overwritten"


def check_captured_is_eager(cls: type[Operations]) -> None:
    """In a CUDA graph that is launched again with other values, the results are those of the values. On a CPU:
    operations call nothing that a graph cannot hold; where the code asks for a device, that says nothing."""
    operations, device = _make(cls)
    if device.type != "cuda":
        for name in cls.list_operations():
            problem = make_problem(name, 9, OperationShape(), torch.float32, device, variant=True)
            assert_can_be_captured(partial(problem.run, operations))
        return
    from quire.core.worker.cuda_graphs.capture import GraphCapturer

    for name in cls.list_operations():
        problems = [
            make_problem(name, 9, OperationShape(), torch.bfloat16, device, variant=True, seed=seed) for seed in (0, 1)
        ]
        expected = problems[1].solve(operations)
        static = problems[0].map_tensors(torch.clone)
        results: list[object] = []
        static.run(operations)  # loads kernels, which cannot happen in a capture

        def launch(problem: OperationProblem = static, results: list[object] = results) -> None:
            results.append(problem.run(operations))

        graph = GraphCapturer().capture_graph(launch).graph
        for held, value in zip(_list_tensors(static), _list_tensors(problems[1]), strict=True):
            held.copy_(value)
        graph.replay()
        first = results[-1] if isinstance(results[-1], Tensor) else results[-1][0]  # type: ignore[index]
        wanted = expected.get("result", expected.get("first result"))
        assert wanted is not None and torch.equal(first, wanted), f"{problems[1].label}: a graph gives other numbers"


def _is_interpreted(device: torch.device) -> bool:
    """Whether kernels run in Triton's interpreter, which rounds to 8-bit floats wrongly."""
    if device.type != "cpu" or importlib.util.find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def _make(cls: type[Operations]) -> tuple[Operations, torch.device]:
    for device in (torch.device("cuda"), torch.device("cpu")):
        available = device.type == "cpu" or torch.cuda.is_available()
        if available and not cls.unsupported(device):
            return cls(device, parse_options(cls, {})), device
    raise unittest.SkipTest(f"cannot run here: {'; '.join(cls.unsupported(torch.device('cpu')))}")


def _list_problems(cls: type[Operations], device: torch.device) -> Iterator[OperationProblem]:
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32, torch.float16)
    for name in cls.list_operations():
        for seed, num_tokens in enumerate(_TOKENS):
            for variant in (False, True):
                dtype = dtypes[(seed + variant) % 2]
                yield make_problem(name, num_tokens, OperationShape(), dtype, device, variant=variant, seed=seed)


def _solve_exactly(problem: OperationProblem) -> dict[str, Tensor]:
    """By torch in float64, on the CPU."""
    exact = problem.map_tensors(lambda x: x.cpu().double() if x.is_floating_point() else x.cpu())
    return exact.solve(TorchOperations(torch.device("cpu")))


def _get_dtype(problem: OperationProblem) -> torch.dtype:
    floating = (x for x in problem.arguments if isinstance(x, Tensor) and x.is_floating_point())
    dtype: torch.dtype = next(floating).dtype
    return dtype


def _list_tensors(problem: OperationProblem) -> list[Tensor]:
    tensors: list[Tensor] = []
    for each in (*problem.arguments, *problem.keywords.values()):
        parts = (each.k, each.v) if hasattr(each, "k_scale") else (each,)
        tensors += [part for part in parts if isinstance(part, Tensor)]
    return tensors
