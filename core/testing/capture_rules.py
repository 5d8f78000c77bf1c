"""What a CUDA graph cannot record, found where there is no GPU."""

from __future__ import annotations

import ast
import linecache
import re
import sys
import traceback
import unittest
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["CaptureRuleError", "assert_can_be_captured"]

_NUMBERS_OF_HOST = "makes a tensor of numbers of the host, as a list for an index does: a GPU would wait for it"
_READS_NUMBER = "reads a number of a tensor: the host would wait for the GPU"
_COPIES_TO_HOST = "copies a tensor to the host, which would wait for the GPU"
_SIZE_OF_VALUES = "has a result whose size depends on values"
_WRITES_BY_MASK = (
    "writes a tensor where a mask says so, for which a GPU counts the mask and the host waits: "
    "use torch.where, or masked_fill"
)
_REASONS: Mapping[str, str] = {
    "_local_scalar_dense": _READS_NUMBER,
    "allclose": _READS_NUMBER,
    "equal": _READS_NUMBER,
    "_unique2": _SIZE_OF_VALUES,
    "bincount": _SIZE_OF_VALUES,
    "masked_select": _SIZE_OF_VALUES,
    "nonzero": _SIZE_OF_VALUES,
    "unique_consecutive": _SIZE_OF_VALUES,
    "unique_dim": _SIZE_OF_VALUES,
}
"""By operation, why a graph cannot hold it."""
_TO_HOST = ("__array__", "cpu", "numpy", "tolist")
"""Functions that do nothing on a CPU that an operation would show."""
_WRITES = ("index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put")
_ASKS_FOR_DEVICE = re.compile(r"is_cuda|device\.type|device_type|[\"']cuda\b")


class CaptureRuleError(AssertionError):
    """An operation that a graph cannot hold."""


class CaptureRules:
    """Refuses what could not be captured on a GPU, whatever device it runs on here: functions of torch as they are
    called, and the operations that they come to."""

    def __init__(self) -> None:
        self._takes_number = False
        """The function that runs is given a number, which a GPU's kernel takes as an argument."""
        self._is_interpreted = False
        """It is Triton's interpreter that runs, which computes on the host what a kernel does."""

    @contextmanager
    def enforce(self) -> Iterator[None]:
        """While what is inside runs."""
        with _Functions(self), _Operations(self):
            yield

    def call_function(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call a function of torch, or fail with the reason."""
        name = getattr(func, "__name__", "")
        outer = self._takes_number, self._is_interpreted
        self._is_interpreted |= _is_called_by("triton.")
        if not self._is_interpreted and (
            name in _TO_HOST or (name == "to" and "cpu" in (*args[1:2], *kwargs.values()))
        ):
            raise CaptureRuleError(f"a step that is captured {_COPIES_TO_HOST}")
        self._takes_number |= _takes_number(name, args, kwargs)
        try:
            return func(*args, **kwargs)
        finally:
            self._takes_number, self._is_interpreted = outer

    def check_operation(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise ``CaptureRuleError`` for an operation that a graph cannot hold."""
        reason = None if self._is_interpreted else self._find_reason(name, args, kwargs)
        if reason is not None:
            raise CaptureRuleError(f"a step that is captured {reason}")

    def _find_reason(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
        if name == "lift_fresh":
            return None if self._takes_number and args[0].dim() == 0 else _NUMBERS_OF_HOST
        if name == "_local_scalar_dense" and self._takes_number:
            return None
        if name == "index":
            return _SIZE_OF_VALUES if _count_masks(args[1]) else None
        if name in _WRITES:
            masks, given = _count_masks(args[1]), sum(each is not None for each in args[1])
            return _WRITES_BY_MASK if masks and not (self._takes_number and given == 1) else None
        if name == "repeat_interleave":
            return _SIZE_OF_VALUES if kwargs.get("output_size") is None else None
        return _REASONS.get(name)


class _Functions(TorchFunctionMode):
    def __init__(self, rules: CaptureRules) -> None:
        super().__init__()
        self._rules = rules

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return self._rules.call_function(func, args, kwargs or {})


class _Operations(TorchDispatchMode):
    def __init__(self, rules: CaptureRules) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rules = rules

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        self._rules.check_operation(func.overloadpacket.__name__, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def assert_can_be_captured(run: Callable[[], object]) -> None:
    """Run what a plugin launches in a step. Raises ``CaptureRuleError`` where a graph cannot hold it, and ``SkipTest``
    if the code that did it asks for a device: what runs on a CPU then says nothing about a GPU."""
    rules = CaptureRules()
    try:
        with rules.enforce():
            run()
    except CaptureRuleError as error:
        if any(map(_asks_for_device, _list_files(error))):
            raise unittest.SkipTest("launches something else on a GPU, which is not looked at here") from None
        raise


def _takes_number(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a GPU would get a Python number of this call with the launch, without a copy to wait for."""
    if name == "__setitem__":
        return isinstance(args[2], int | float | np.number)
    if name in ("tensor", "as_tensor"):
        return isinstance(args[0], int | float | np.number) and kwargs.get("device") is None
    return name == "one_hot" and (*args[1:2], kwargs.get("num_classes", -1))[0] != -1  # looks at values on a CPU alone


def _count_masks(indices: Sequence[Any]) -> int:
    return sum(isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8) for each in indices)


def _is_called_by(package: str) -> bool:
    """Whether the function of torch that was called last was called in ``package``."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "") in (__name__, "torch._tensor"):
        frame = frame.f_back
    return bool(frame.f_globals.get("__name__", "").startswith(package))


def _list_files(error: BaseException) -> list[str]:
    """Those of the code that was running: the last of them broke a rule, and the others led to it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    of_others = ("torch.", "contextlib", "quire.core.testing.")
    return [f.f_code.co_filename for f in frames if not f.f_globals.get("__name__", "").startswith(of_others)]


def _asks_for_device(file: str) -> bool:
    """In ``unsupported`` it says where it runs at all, and chooses nothing."""
    lines = linecache.getlines(file)
    for node in ast.walk(ast.parse("".join(lines))):
        if isinstance(node, ast.FunctionDef) and node.name == "unsupported":
            lines[node.lineno - 1 : node.end_lineno] = [""] * len(lines[node.lineno - 1 : node.end_lineno])
    return any(map(_ASKS_FOR_DEVICE.search, lines))
