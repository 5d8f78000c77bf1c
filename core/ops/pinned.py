"""Host memory that copies to and from the device run beside: page-locked, and locked before there is traffic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["copy_to_device", "copy_to_host", "reserve_pinned_memory"]

_SIZES = range(2, 21)  # 4 bytes to 1 MiB: torch keeps blocks by powers of two
_COPIES = 16


def copy_to_device(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``values``, an array or nested lists, on ``device``, without waiting for it."""
    host = torch.as_tensor(values, dtype=dtype)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def copy_to_host(tensor: Tensor) -> Tensor:
    """A copy on the host that is there once the work queued so far is done."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def reserve_pinned_memory() -> None:
    """Let torch's cache of pinned memory hold what steps need at a time. To lock more waits for the device, which under
    load is two whole steps."""
    held = [torch.empty(1 << size, dtype=torch.uint8, pin_memory=True) for size in _SIZES for _ in range(_COPIES)]
    held.clear()
