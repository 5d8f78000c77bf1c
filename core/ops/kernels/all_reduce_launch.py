"""Launches of the sums over GPUs, and how the memory that they exchange through is laid out.

The kernels and their algorithms are in ``all_reduce_kernel``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from quire.core.contracts.quant import ActivationFormat
from quire.core.ops.kernels.all_reduce_kernel import one_shot_kernel, sum_sent_kernel, two_shot_kernel
from quire.core.ops.kernels.pdl import supports_pdl
from quire.core.ops.kernels.quantize_kernel import ACTIVATION_FORMAT_CODES, allocate_activation, get_row_warps

__all__ = [
    "MAX_MARKED_ROWS",
    "MAX_PROGRAMS",
    "SymmetricLayout",
    "launch_one_shot",
    "launch_one_shot_norm",
    "launch_sum_sent",
    "launch_two_shot",
]

MAX_PROGRAMS = 128
"""Programs of a launch: fewer than the SMs of a GPU that links to others, so that all run at once. They wait for each
other."""
MAX_MARKED_ROWS = 16
"""Of a marked one shot."""
_TILE = 2048
_PIECE_ELEMENTS = 16384
"""Of the rows that a program takes at a time of parts that were sent: 32 a thread."""
_NUM_BARRIERS = 3  # of one shot, and one after each of two shots


@dataclass(frozen=True, slots=True)
class SymmetricLayout:
    """Where things lie in the memory of each rank, in bytes from its start."""

    ranks: int
    max_row_bytes: int = 32 * 1024
    """The longest row of one shot."""
    max_bytes: int = 16 << 20
    """The longest message of two shots."""
    max_sent_bytes: int = 0
    """The longest of which ranks send parts by copies."""

    @property
    def sent_flags(self) -> int:
        """The number, among the flags, of those that say that a rank's part was sent."""
        return _NUM_BARRIERS * MAX_PROGRAMS * self.ranks

    @property
    def rows_offset(self) -> int:
        """Of the rows of one shot, two buffers; before them lie the flags, an int32 each."""
        return _round_up(4 * (self.sent_flags + self.ranks), 4096)

    @property
    def marked_offset(self) -> int:
        """Of the marked rows of one shot, two buffers."""
        return self.rows_offset + 2 * MAX_PROGRAMS * self.ranks * self.max_row_bytes

    @property
    def chunks_offset(self) -> int:
        """Of the chunks that ranks sum; behind them lie as many sums."""
        return self.marked_offset + 2 * MAX_MARKED_ROWS * self.ranks * 2 * self.max_row_bytes

    @property
    def chunk_bytes(self) -> int:
        """The most that a program of two shots takes of a rank's share: a tile, or its part of the longest message, and
        what rounding adds."""
        return max(4 * _TILE, _round_up(-(-self.max_bytes // (self.ranks * MAX_PROGRAMS)), 16) + 64)

    @property
    def share_bytes(self) -> int:
        """The most that a rank sums of parts that were sent."""
        return _round_up(-(-self.max_sent_bytes // self.ranks), 4096)

    @property
    def parts_offset(self) -> int:
        """Of what the others have sent of the rows that this rank sums."""
        return _round_up(self.chunks_offset + 2 * MAX_PROGRAMS * self.ranks * self.chunk_bytes, 4096)

    @property
    def sums_offset(self) -> int:
        """Of the others' sums."""
        return self.parts_offset + (self.ranks - 1) * self.share_bytes

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.sums_offset + (self.ranks - 1) * self.share_bytes

    def find_part(self, source: int, target: int) -> int:
        """Where, in the memory of ``target``, the part lies that ``source`` sends."""
        return self.parts_offset + (source - target - 1) % self.ranks * self.share_bytes


def launch_one_shot(
    x: Tensor,
    buffers: Tensor,
    epochs: Tensor,
    layout: SymmetricLayout,
    rank: int,
    phase: int = 0,
    *,
    marked: bool = False,
) -> Tensor:
    """The sum of ``x`` (rows, features), rows dense, over the ranks; at most ``MAX_PROGRAMS`` rows of at most
    ``max_row_bytes``, or ``marked`` at most ``MAX_MARKED_ROWS`` of an even number of features in 16 bits.

    ``buffers`` (ranks,) int64 are addresses; ``epochs`` (3, MAX_PROGRAMS) int32 count calls. ``phase`` 1 writes and 2
    reads, without waiting, so that one process can be all ranks in turn; 0 is the whole.
    """
    out = torch.empty_like(x)
    _launch_one_shot(x, None, None, 0.0, (out, out, out), 0, buffers, epochs, layout, rank, phase, marked)
    return out


def launch_one_shot_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    output_format: ActivationFormat,
    buffers: Tensor,
    epochs: Tensor,
    layout: SymmetricLayout,
    rank: int,
    phase: int = 0,
    *,
    marked: bool = False,
) -> tuple[Any, Tensor]:
    """``(norm(s), s)`` of the sum ``s`` of ``residual`` and of ``x`` over the ranks, both (rows, features), rows dense,
    as ``norm_kernel.launch_rms_norm`` gives it; otherwise as ``launch_one_shot``."""
    out, values, scale = allocate_activation(x, x.shape[1], output_format)
    stream = torch.empty_like(x)
    kind = ACTIVATION_FORMAT_CODES[output_format.kind]
    outputs = (values, scale, stream)
    _launch_one_shot(x, residual, weight, eps, outputs, kind, buffers, epochs, layout, rank, phase, marked)
    return out, stream


def launch_two_shot(
    x: Tensor, buffers: Tensor, epochs: Tensor, layout: SymmetricLayout, rank: int, phase: int = 0
) -> Tensor:
    """The sum of ``x``, contiguous, eights of numbers and at most ``max_bytes``, over the ranks; otherwise as
    ``launch_one_shot``, but that there are three phases."""
    out = torch.empty_like(x)
    num_eights = x.numel() // 8
    share = triton.cdiv(num_eights, layout.ranks)
    num_programs = min(MAX_PROGRAMS, triton.cdiv(share * 8, _TILE))
    enable_pdl = supports_pdl(x.device)
    two_shot_kernel[(num_programs,)](
        x,
        out,
        buffers,
        epochs,
        num_eights,
        share,
        triton.cdiv(share, num_programs),
        rank=rank,
        ranks=layout.ranks,
        programs=MAX_PROGRAMS,
        chunks_offset=layout.chunks_offset,
        chunk_bytes=layout.chunk_bytes,
        tile=_TILE,
        phase=phase,
        enable_pdl=enable_pdl,
        num_warps=8,
        launch_pdl=enable_pdl,
    )
    return out


def launch_sum_sent(
    part: Tensor,
    rows: int,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    call: int,
    buffers: Tensor,
    epochs: Tensor,
    layout: SymmetricLayout,
    rank: int,
    phase: int = 0,
    outputs: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``(norm(s), s)`` of the sum ``s`` of ``residual`` (rows, features) and of all ranks' parts; without ``weight``
    the sum of these alone as ``s``. ``part``, contiguous, is of the rows that this rank sums, ``ceil(rows / ranks)``
    or what is left of them; the others' lie at ``SymmetricLayout.find_part``, with ``call`` in their flags. ``phase`` 1
    sums and 2 reads the others' sums, into ``outputs``; 0 is the whole."""
    features = part.shape[1]
    share = triton.cdiv(rows, layout.ranks)
    block = triton.next_power_of_2(features)
    out, stream = outputs or (part.new_empty(rows, features), part.new_empty(rows, features))
    assert part.is_contiguous() and share * features * part.element_size() <= layout.share_bytes
    enable_pdl = supports_pdl(part.device)
    sum_sent_kernel[(min(MAX_PROGRAMS, share),)](
        part,
        part if residual is None else residual,
        part if weight is None else weight,
        out,
        stream,
        buffers,
        epochs,
        rows,
        share,
        call,
        eps,
        features=features,
        has_norm=weight is not None,
        rank=rank,
        ranks=layout.ranks,
        programs=MAX_PROGRAMS,
        sent_flags=layout.sent_flags,
        parts_offset=layout.parts_offset,
        sums_offset=layout.sums_offset,
        share_bytes=layout.share_bytes,
        piece_rows=max(1, _PIECE_ELEMENTS // block),
        block=block,
        phase=phase,
        enable_pdl=enable_pdl,
        num_warps=16,
        launch_pdl=enable_pdl,
    )
    return out, stream


def _launch_one_shot(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    outputs: tuple[Tensor, Tensor, Tensor],  # values, scale, stream
    kind: int,
    buffers: Tensor,
    epochs: Tensor,
    layout: SymmetricLayout,
    rank: int,
    phase: int,
    marked: bool,
) -> None:
    rows, features = x.shape
    assert not marked or (rows <= MAX_MARKED_ROWS and x.element_size() == 2 and features % 2 == x.stride(0) % 2 == 0)
    block = triton.next_power_of_2(features)
    enable_pdl = supports_pdl(x.device)
    one_shot_kernel[(rows,)](
        x,
        x if residual is None else residual,
        x if weight is None else weight,
        *outputs,
        buffers,
        epochs,
        x.stride(0),
        eps,
        features=features,
        has_norm=weight is not None,
        kind=kind,
        rank=rank,
        ranks=layout.ranks,
        programs=MAX_MARKED_ROWS if marked else MAX_PROGRAMS,
        rows_offset=layout.marked_offset if marked else layout.rows_offset,
        row_bytes=2 * layout.max_row_bytes if marked else layout.max_row_bytes,
        marked=marked,
        block=block,
        phase=phase,
        enable_pdl=enable_pdl,
        num_warps=get_row_warps(block),
        launch_pdl=enable_pdl,
    )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
