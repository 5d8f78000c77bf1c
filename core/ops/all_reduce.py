"""Sums over the GPUs of a host by Quire's own kernels, through symmetric memory; NCCL sums what they do not take."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from quire.core.contracts.quant import ActivationFormat, QuantActivation
from quire.core.ops.device_profile import AllReduceLimits, DeviceProfile

__all__ = ["AllReduceKernels", "SentParts"]

_log = logging.getLogger("quire.ops")
_DTYPES = (torch.bfloat16, torch.float16)
_MAX_CALL = (1 << 15) - 1
"""Calls of which parts are sent are counted from 1 to this, and then from 1 again."""


@dataclass(frozen=True, slots=True, eq=False)
class SentParts:
    """A product of which every rank has a part of the sum, on its way to the ranks that sum it."""

    own: Tensor
    """Of the rows that this rank sums."""
    sent: list[Tensor]
    """Of the others' rows: kept until they are copied."""
    num_rows: int
    call: int
    """What the ranks count alike."""


class AllReduceKernels:
    """One rank's access to the memory of all, for sums on one stream. Fit for CUDA graphs, also where some sums of a
    step are in graphs and others are not.

    Whether a message is taken depends on its shape, dtype and strides and on those of the residual, and of
    ``multiply_and_send`` also on the calls before and on whether a graph is captured: never on values or addresses.
    Ranks run the same step, so all of that is equal on them, and every rank decides alike.
    """

    def __init__(
        self, rank: int, buffers: Tensor, layout: Any, limits: AllReduceLimits, memory: Sequence[Tensor] = ()
    ) -> None:
        """``buffers`` (ranks,) int64: the address of each rank's memory, which ``layout`` divides. ``memory``: the same
        as bytes, for copies; it is kept as long as this lives."""
        from quire.core.ops.kernels.all_reduce_launch import MAX_MARKED_ROWS, MAX_PROGRAMS

        self._rank = rank
        self._buffers = buffers
        self._layout = layout
        self._limits = limits
        self._memory = memory
        self._max_rows, self._max_marked_rows = MAX_PROGRAMS, MAX_MARKED_ROWS
        self._epochs = torch.zeros(3, MAX_PROGRAMS, dtype=torch.int32, device=buffers.device)
        self._num_sent = 0
        self._is_unfinished = False  # what was sent last: its memory is in use
        self._numbers = torch.arange(_MAX_CALL + 1, dtype=torch.int32, device=buffers.device)
        self._copy_stream = torch.cuda.Stream(buffers.device) if limits.max_sent_bytes else None

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

        layout = SymmetricLayout(size, max_bytes=limits.two_shot_bytes, max_sent_bytes=limits.max_sent_bytes)
        memory = symmetric_memory.empty(layout.total_bytes, dtype=torch.uint8, device=device)
        handle = symmetric_memory.rendezvous(memory, group or dist.group.WORLD)  # type: ignore[arg-type]
        memory.zero_()  # flags count from 0
        torch.cuda.synchronize(device)
        dist.barrier(group=group)
        addresses = torch.tensor(list(handle.buffer_ptrs), dtype=torch.int64, device=device)
        peers = [handle.get_buffer(peer, (layout.total_bytes,), torch.uint8) for peer in range(size)]
        return cls(rank, addresses, layout, limits, [*peers, memory])

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

    def multiply_and_send(self, x: Tensor, features: int, multiply: Callable[[Tensor], Tensor]) -> SentParts | None:
        """Begin the sum of ``multiply(x)`` (rows, features), a row of which depends on that of ``x`` alone, over the
        ranks: each multiplies what others sum first, which a copy engine sends while it multiplies the rest. None: do
        it another way, as of any other until ``finish_sum`` was called with what this returned, or the step has failed
        (``drop_unfinished``)."""
        rows, num_ranks = len(x), self._layout.ranks
        fits = self._limits.min_sent_bytes <= 2 * rows * features <= self._limits.max_sent_bytes
        if not fits or x.dtype not in _DTYPES or features % 8 or rows < num_ranks**2:
            return None
        if self._copy_stream is None or self._is_unfinished or torch.cuda.is_current_stream_capturing():
            return None
        self._is_unfinished = True
        self._num_sent += 1
        call = (self._num_sent - 1) % _MAX_CALL + 1
        shares = x.split(-(-rows // num_ranks))
        sent = []
        for distance in range(1, num_ranks):
            peer = (self._rank + distance) % num_ranks
            part = multiply(shares[peer]).contiguous()
            self._copy_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._copy_stream):
                self._copy_to(peer, self._layout.find_part(self._rank, peer), part)
                self._copy_to(peer, 4 * (self._layout.sent_flags + self._rank), self._numbers[call : call + 1])
            sent.append(part)
        return SentParts(multiply(shares[self._rank]).contiguous(), sent, rows, call)

    @property
    def num_sent(self) -> int:
        """How many sums were begun so: alike on all ranks, or their next ones would wait for each other for ever."""
        return self._num_sent

    def drop_unfinished(self) -> None:
        """Give up the sum that was begun and not finished, if there is one, since its step failed: no rank reads what
        was sent, and the next is numbered behind it. Before a step, on all ranks of which ``num_sent`` is equal."""
        if self._is_unfinished:
            assert self._copy_stream is not None
            torch.cuda.current_stream().wait_stream(self._copy_stream)  # the memory of what was sent is used again
            self._is_unfinished = False

    def finish_sum(
        self, parts: SentParts, residual: Tensor | None, weight: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        """``(norm(s), s)`` of the sum ``s`` of ``residual``, contiguous, and of what was sent; without ``weight`` the
        sum of that alone as ``s``."""
        from quire.core.ops.kernels.all_reduce_launch import launch_sum_sent

        assert self._copy_stream is not None
        self._is_unfinished = False
        # The next use of the memory of what was sent comes after its copy.
        torch.cuda.current_stream().wait_stream(self._copy_stream)
        memory = (self._buffers, self._epochs, self._layout, self._rank)
        return launch_sum_sent(parts.own, parts.num_rows, residual, weight, eps, parts.call, *memory)

    def _copy_to(self, peer: int, offset: int, x: Tensor) -> None:
        self._memory[peer][offset : offset + x.nbytes].copy_(x.view(-1).view(torch.uint8), non_blocking=True)

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
