"""Tensors that say they are on a GPU, on a machine without one: what code would launch there can then be seen.

They are on the CPU, and so is what torch computes with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_any, tree_map

__all__ = ["PRETENDED_GPU", "PretendedGpu"]

PRETENDED_GPU = torch.device("cuda", 0)
_CPU = torch.device("cpu")


class PretendedGpu(TorchFunctionMode):
    """As a context manager: what is made on, or moved to, ``PRETENDED_GPU`` inside says that it is there."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Call a function of torch."""
        return _call_on_cpu(func, args, kwargs or {})


class _PretendedTensor(Tensor):
    is_cuda = True

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return PRETENDED_GPU

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return _call_on_cpu(func, args, kwargs or {})


def _call_on_cpu(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if func is Tensor.cuda:
        func, args = Tensor.to, (args[0], PRETENDED_GPU)
    arguments = (args, kwargs)
    is_on_gpu = tree_any(lambda each: isinstance(each, _PretendedTensor) or _is_gpu(each), arguments)
    is_moved_away = func is Tensor.cpu or tree_any(
        lambda each: isinstance(each, torch.device) and each == _CPU, arguments
    )
    args, kwargs = tree_map(lambda each: _CPU if _is_gpu(each) else each, arguments)
    with torch._C.DisableTorchFunctionSubclass():
        result = func(*args, **kwargs)
        if func in (Tensor.to, Tensor.cpu) and is_on_gpu and isinstance(args[0], _PretendedTensor) is is_moved_away:
            result = result.clone()  # as a move does
        return tree_map(lambda each: _place(each, not is_moved_away), result) if is_on_gpu else result


def _place(value: Any, is_on_gpu: bool) -> Any:
    if not isinstance(value, Tensor) or isinstance(value, _PretendedTensor) is is_on_gpu:
        return value  # as it is: a parameter stays one
    return value.as_subclass(_PretendedTensor if is_on_gpu else Tensor)


def _is_gpu(value: Any) -> bool:
    if isinstance(value, str):
        return value.partition(":")[0] == "cuda"
    return isinstance(value, torch.device) and value.type == "cuda"
