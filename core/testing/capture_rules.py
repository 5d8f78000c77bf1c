"""What a CUDA graph cannot record, found where there is no GPU."""

from __future__ import annotations

import inspect
import sys
import unittest
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["CaptureRuleError", "assert_can_be_captured"]

_REASONS: Mapping[str, str] = {
    "lift_fresh": "makes a tensor of numbers of the host, as a list for an index does: a GPU would wait for it",
    "_local_scalar_dense": "reads a number of a tensor: the host would wait for the GPU",
    "nonzero": "has a result whose size depends on values",
    "masked_select": "has a result whose size depends on values",
}
"""By operation, why a graph cannot hold it."""


class CaptureRuleError(AssertionError):
    """An operation that a graph cannot hold."""


class CaptureRules(TorchDispatchMode):
    """Refuses operations that could not be captured on a GPU, whatever device they run on here."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation, or fail with its reason."""
        name = func.overloadpacket.__name__
        reason = _REASONS.get(name)
        if name == "index" and any(isinstance(each, Tensor) and each.dtype == torch.bool for each in args[1]):
            reason = _REASONS["nonzero"]
        if reason is not None:
            raise CaptureRuleError(f"a step that is captured {reason}")
        run: Callable[..., Any] = func
        return run(*args, **(kwargs or {}))


def assert_can_be_captured(run: Callable[[], object], module: str) -> None:
    """Run what a plugin of ``module`` launches in a step. Raises ``CaptureRuleError`` where a graph cannot hold it, and
    ``SkipTest`` if the module asks whether a tensor ``is_cuda``: what runs on a CPU then says nothing about it."""
    try:
        with CaptureRules():  # type: ignore[no-untyped-call]
            run()
    except CaptureRuleError:
        if "is_cuda" in inspect.getsource(sys.modules[module]):
            raise unittest.SkipTest("launches something else on a GPU, which is not looked at here") from None
        raise
