"""Sums over the GPUs of a host by Quire's own kernels, through symmetric memory; NCCL sums what they do not take."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from quire.core.contracts.quant import ActivationFormat, QuantActivation
from quire.core.ops.device_profile import AllReduceLimits, DeviceProfile

__all__ = ["AllReduceKernels"]

_log = logging.getLogger("quire.ops")
_DTYPES = (torch.bfloat16, torch.float16)


class AllReduceKernels:
    """One rank's access to the memory of all, for sums on one stream. Fit for CUDA graphs, also where some sums of a
    step are in graphs and others are not. Whether a message is taken depends on its shape alone: every rank decides
    alike."""

    def __init__(self, rank: int, buffers: Tensor, layout: Any, limits: AllReduceLimits, memory: Any = None) -> None:
        """``buffers`` (ranks,) int64: the address of each rank's memory, which ``layout`` divides. ``memory`` is kept
        as long as this lives."""
        from quire.core.ops.kernels.all_reduce_launch import MAX_MARKED_ROWS, MAX_PROGRAMS

        self._rank = rank
        self._buffers = buffers
        self._layout = layout
        self._limits = limits
        self._memory = memory
        self._max_rows, self._max_marked_rows = MAX_PROGRAMS, MAX_MARKED_ROWS
        self._epochs = torch.zeros(3, MAX_PROGRAMS, dtype=torch.int32, device=buffers.device)

    @classmethod
    def open(cls, rank: int, size: int, group: Any, device: torch.device) -> AllReduceKernels | None:
        """For the ranks of ``group`` (None: the default one), all of which call this; None for all of them, and the log
        says why, where one has no access to the memory of the others or no limits are known for so many."""
        limits = DeviceProfile.detect(device).get_all_reduce_limits(size)
        opened: AllReduceKernels | None = None
        reason = f"no limits are known for {size} of this GPU" if limits is None else ""
        if limits is not None:
            try:
                opened = cls._open(rank, size, group, device, limits)
            except Exception as error:  # of torch's own, which is experimental: NCCL serves as well
                reason = " ".join(str(error).split())[:200]
        all_opened = torch.tensor([opened is not None], dtype=torch.int32, device=device)
        dist.all_reduce(all_opened, op=dist.ReduceOp.MIN, group=group)
        if not all_opened.item():
            _log.info("ranks sum by NCCL alone: %s", reason or "another rank has no access to the memory of all")
            return None
        return opened

    @classmethod
    def _open(cls, rank: int, size: int, group: Any, device: torch.device, limits: AllReduceLimits) -> AllReduceKernels:
        import torch.distributed._symmetric_memory as symmetric_memory

        from quire.core.ops.kernels.all_reduce_launch import SymmetricLayout

        layout = SymmetricLayout(size, max_bytes=limits.two_shot_bytes)
        memory = symmetric_memory.empty(layout.total_bytes, dtype=torch.uint8, device=device)
        handle = symmetric_memory.rendezvous(memory, group or dist.group.WORLD)  # type: ignore[arg-type]
        memory.zero_()  # flags count from 0
        torch.cuda.synchronize(device)
        dist.barrier(group=group)
        addresses = torch.tensor(list(handle.buffer_ptrs), dtype=torch.int64, device=device)
        return cls(rank, addresses, layout, limits, (memory, handle))

    def all_reduce(self, x: Tensor) -> Tensor | None:
        """The sum of ``x`` over the ranks, in the order of the ranks; None: leave it to NCCL."""
        from quire.core.ops.kernels import all_reduce_launch

        memory = (self._buffers, self._epochs, self._layout, self._rank)
        if x.dim() == 2 and self._takes_rows(x, self._limits.one_shot_bytes):
            return all_reduce_launch.launch_one_shot(x, *memory, marked=self._takes_marks(x))
        if x.dtype in _DTYPES and x.is_contiguous() and x.numel() % 8 == 0 and x.nbytes <= self._limits.two_shot_bytes:
            return all_reduce_launch.launch_two_shot(x, *memory)
        return None

    def all_reduce_add_norm(
        self, part: Tensor, residual: Tensor, weight: Tensor, eps: float, output_format: ActivationFormat
    ) -> tuple[Tensor | QuantActivation, Tensor] | None:
        """``(norm(s), s)`` of the sum ``s`` of ``residual`` and of ``part`` over the ranks; None where one kernel after
        the other is faster, or the message is none that they take."""
        from quire.core.ops.kernels import all_reduce_launch

        if not (self._takes_rows(part, self._limits.fused_norm_bytes) and residual.is_contiguous()):
            return None
        return all_reduce_launch.launch_one_shot_norm(
            part,
            residual,
            weight,
            eps,
            output_format,
            self._buffers,
            self._epochs,
            self._layout,
            self._rank,
            marked=self._takes_marks(part),
        )

    def _takes_marks(self, x: Tensor) -> bool:
        return x.nbytes <= self._limits.marked_bytes and len(x) <= self._max_marked_rows and x.stride(0) % 2 == 0

    def _takes_rows(self, x: Tensor, max_bytes: int) -> bool:
        rows, features = x.shape
        row_bytes = features * x.element_size()
        return (
            0 < rows <= self._max_rows
            and x.dtype in _DTYPES
            and x.stride(1) == 1
            and row_bytes % 16 == 0
            and row_bytes <= self._layout.max_row_bytes
            and rows * row_bytes <= max_bytes
        )
