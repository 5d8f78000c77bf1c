"""Copies between host and device that nothing waits for, through pinned (page-locked) memory.

Torch keeps a cache of pinned memory. A tensor takes a block of it and gives it back when it dies; the block is used
again once the copies that were queued with it are done, which torch knows by events. So a block is never overwritten
under a copy in flight, and a step pins nothing as long as the cache holds enough blocks of each size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["copy_to_device", "copy_to_host", "reserve_pinned_memory"]

_SIZE_EXPONENTS = range(2, 21)  # 4 bytes to 1 MiB: torch keeps blocks by powers of two
_BLOCKS_PER_SIZE = 16  # of two steps in flight, each with several copies


def copy_to_device(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``values``, an array or nested lists, on ``device``: copied behind the work queued on the current stream,
    without waiting."""
    host = torch.as_tensor(values, dtype=dtype)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def copy_to_host(tensor: Tensor) -> Tensor:
    """A copy on the host. Its values are there once the work queued so far on the current stream is done: the caller
    waits for that by an event; a tensor of a CPU is returned as it is."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def reserve_pinned_memory() -> None:
    """Fill torch's cache of pinned memory with what steps need at a time. To pin more waits for the device, which under
    load is two whole steps."""
    blocks = [
        torch.empty(1 << exponent, dtype=torch.uint8, pin_memory=True)
        for exponent in _SIZE_EXPONENTS
        for _ in range(_BLOCKS_PER_SIZE)
    ]
    blocks.clear()  # back into the cache, all at once
