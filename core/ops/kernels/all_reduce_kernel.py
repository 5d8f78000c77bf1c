"""Sums over the GPUs of a host through memory that all of them map: one shot for small messages, two for larger ones.

Algorithm: what the ranks exchange they write into each other's memory, each program to the programs of its number, and
tell by a flag that it is there. A read over NVLink takes a trip there and back; a write takes one, and no rank waits
for it but who needs it.

- One shot: a program takes a row. It writes the row into every rank's buffer, waits for the others' rows, and adds them
  in the order of the ranks, in float32: every rank gets the same bits. The residual addition, the RMS norm and the
  quantization of ``norm_kernel`` follow in the same program.
- Two shots: each rank sums one share of the elements and writes the result to all. A rank sends 2 (N - 1) / N of the
  message in place of N - 1 of it.

A flag holds the number of the program's last call, which each program counts in memory, so that a kernel does not
depend on the host: it may stand in CUDA graphs and outside. Two buffers by turns suffice for one shot: whoever writes a
buffer again has seen the flags of the call between, which a rank sets after it has read. The phases of two shots guard
each other's buffers in the same way.

Memory of each rank, ``SymmetricLayout``: flags, rows of one shot, chunks of both shots. ``buffers`` holds the address
of every rank's. Grid: a program a row, or a chunk. Registers: a row. NVLink multicast is not used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.core.contracts.quant import ActivationFormat
from quire.core.ops.kernels.pdl import pdl_launch_dependents, pdl_wait, supports_pdl
from quire.core.ops.kernels.quantize_kernel import (
    ACTIVATION_FORMAT_CODES,
    allocate_activation,
    get_row_warps,
    quantize_and_store_row,
)

__all__ = ["MAX_PROGRAMS", "SymmetricLayout", "launch_one_shot", "launch_one_shot_norm", "launch_two_shot"]

MAX_PROGRAMS = 128
"""Programs of a launch: fewer than the SMs of a GPU that links to others, so that all run at once. They wait for each
other."""
_TILE = 2048
_NUM_BARRIERS = 3  # of one shot, and one after each of two shots


@dataclass(frozen=True, slots=True)
class SymmetricLayout:
    """Where things lie in the memory of each rank, in bytes from its start."""

    ranks: int
    max_row_bytes: int = 32 * 1024
    """The longest row of one shot."""
    max_bytes: int = 16 << 20
    """The longest message of two shots."""

    @property
    def rows_offset(self) -> int:
        """Of the rows of one shot, two buffers; before them lie the flags, an int32 each."""
        return _round_up(4 * _NUM_BARRIERS * MAX_PROGRAMS * self.ranks, 4096)

    @property
    def chunks_offset(self) -> int:
        """Of the chunks that ranks sum; behind them lie as many sums."""
        return self.rows_offset + 2 * MAX_PROGRAMS * self.ranks * self.max_row_bytes

    @property
    def chunk_bytes(self) -> int:
        """The most that a program of two shots takes of a rank's share: a tile, or its part of the longest message, and
        what rounding adds."""
        return max(4 * _TILE, _round_up(-(-self.max_bytes // (self.ranks * MAX_PROGRAMS)), 16) + 64)

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.chunks_offset + 2 * MAX_PROGRAMS * self.ranks * self.chunk_bytes


def launch_one_shot(
    x: Tensor, buffers: Tensor, epochs: Tensor, layout: SymmetricLayout, rank: int, phase: int = 0
) -> Tensor:
    """The sum of ``x`` (rows, features), rows dense, over the ranks; at most ``MAX_PROGRAMS`` rows of at most
    ``max_row_bytes``.

    ``buffers`` (ranks,) int64 are addresses; ``epochs`` (3, MAX_PROGRAMS) int32 count calls. ``phase`` 1 writes and 2
    reads, without waiting, so that one process can be all ranks in turn; 0 is the whole.
    """
    out = torch.empty_like(x)
    _launch_one_shot(x, None, None, 0.0, out, out, out, 0, buffers, epochs, layout, rank, phase)
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
) -> tuple[Any, Tensor]:
    """``(norm(s), s)`` of the sum ``s`` of ``residual`` and of ``x`` over the ranks, both (rows, features), rows dense,
    as ``norm_kernel.launch_rms_norm`` gives it; otherwise as ``launch_one_shot``."""
    out, values, scale = allocate_activation(x, x.shape[1], output_format)
    stream = torch.empty_like(x)
    kind = ACTIVATION_FORMAT_CODES[output_format.kind]
    _launch_one_shot(x, residual, weight, eps, values, scale, stream, kind, buffers, epochs, layout, rank, phase)
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


def _launch_one_shot(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    values: Tensor,
    scale: Tensor,
    stream: Tensor,
    kind: int,
    buffers: Tensor,
    epochs: Tensor,
    layout: SymmetricLayout,
    rank: int,
    phase: int,
) -> None:
    rows, features = x.shape
    block = triton.next_power_of_2(features)
    enable_pdl = supports_pdl(x.device)
    one_shot_kernel[(rows,)](
        x,
        x if residual is None else residual,
        x if weight is None else weight,
        values,
        scale,
        stream,
        buffers,
        epochs,
        x.stride(0),
        eps,
        features=features,
        has_norm=weight is not None,
        kind=kind,
        rank=rank,
        ranks=layout.ranks,
        programs=MAX_PROGRAMS,
        rows_offset=layout.rows_offset,
        row_bytes=layout.max_row_bytes,
        block=block,
        phase=phase,
        enable_pdl=enable_pdl,
        num_warps=get_row_warps(block),
        launch_pdl=enable_pdl,
    )


@triton.jit
def one_shot_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    scale_ptr,
    stream_ptr,
    buffers_ptr,
    epochs_ptr,
    x_stride,
    eps,
    features: tl.constexpr,
    has_norm: tl.constexpr,
    kind: tl.constexpr,
    rank: tl.constexpr,
    ranks: tl.constexpr,
    programs: tl.constexpr,
    rows_offset: tl.constexpr,
    row_bytes: tl.constexpr,
    block: tl.constexpr,
    phase: tl.constexpr,
    enable_pdl: tl.constexpr,
):
    """Grid (rows,)."""
    pdl_launch_dependents(enable_pdl)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, block)
    mask = offs < features
    if has_norm:  # a weight: nothing before has written it
        weight = tl.load(weight_ptr + offs, mask=mask, other=0.0)
    pdl_wait(enable_pdl)
    epoch = tl.load(epochs_ptr + row) + 1
    buffer = (epoch & 1).to(tl.int64)
    first = rows_offset + (buffer * programs + row) * ranks * row_bytes
    if phase != 2:
        x = tl.load(x_ptr + row * x_stride + offs, mask=mask, other=0.0)
        for peer in tl.static_range(ranks):
            place = _point_to(tl.load(buffers_ptr + peer) + first + rank * row_bytes, dtype)
            tl.store(place + offs, x, mask=mask)
    if phase == 0:
        _wait_for_ranks(buffers_ptr, row, epoch, 0, rank, ranks, programs)
    if phase != 1:
        own = tl.load(buffers_ptr + rank) + first
        total = tl.zeros((block,), tl.float32)
        for peer in tl.static_range(ranks):
            # .cg reads the L2 cache, into which the peers have written: the L1 may hold the call before the last.
            part_ptr = _point_to(own + peer * row_bytes, dtype)
            total += tl.load(part_ptr + offs, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
        tl.store(epochs_ptr + row, epoch)
        summed = total.to(dtype)
        if has_norm:
            summed = summed + tl.load(residual_ptr + row * features + offs, mask=mask, other=0.0)
            tl.store(stream_ptr + row * features + offs, summed, mask=mask)
            wide = summed.to(tl.float32)
            inv_rms = tl.rsqrt(tl.sum(wide * wide) / features + eps)
            normed = weight * (wide * inv_rms).to(dtype)
            quantize_and_store_row(normed, row, offs, out_ptr, scale_ptr, features, kind)
        else:
            tl.store(out_ptr + row * features + offs, summed, mask=mask)


@triton.jit(do_not_specialize=["num_eights", "share_eights", "chunk_eights"])
def two_shot_kernel(
    x_ptr,
    out_ptr,
    buffers_ptr,
    epochs_ptr,
    num_eights,
    share_eights,
    chunk_eights,
    rank: tl.constexpr,
    ranks: tl.constexpr,
    programs: tl.constexpr,
    chunks_offset: tl.constexpr,
    chunk_bytes: tl.constexpr,
    tile: tl.constexpr,
    phase: tl.constexpr,
    enable_pdl: tl.constexpr,
):
    """Grid (number of chunks,). Rank r sums elements ``r * share`` to ``(r + 1) * share``; program p takes ``chunk`` of
    every rank's share. All are counted in eights, so that 16 bytes of bfloat16 are in one mask."""
    pdl_launch_dependents(enable_pdl)
    pdl_wait(enable_pdl)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    program = tl.program_id(0)
    first = program * chunk_eights
    size = tl.minimum(chunk_eights, share_eights - first) * 8
    first *= 8
    share = share_eights * 8
    num_elements = num_eights * 8
    chunks = chunks_offset + program.to(tl.int64) * ranks * chunk_bytes
    sums = chunks + programs * ranks * chunk_bytes
    epoch = tl.load(epochs_ptr + programs + program) + 1
    own = tl.load(buffers_ptr + rank)
    if (phase == 0) | (phase == 1):
        for peer in tl.static_range(ranks):
            place = _point_to(tl.load(buffers_ptr + peer) + chunks + rank * chunk_bytes, dtype)
            for start in range(0, size, tile):
                offs = start + tl.arange(0, tile)
                index = peer * share + first + offs
                inside = (offs < size) & (index < num_elements)
                tl.store(place + offs, tl.load(x_ptr + index, mask=inside, other=0.0), mask=inside)
    if phase == 0:
        _wait_for_ranks(buffers_ptr, program, epoch, 1, rank, ranks, programs)
    if (phase == 0) | (phase == 2):
        for start in range(0, size, tile):
            offs = start + tl.arange(0, tile)
            inside = (offs < size) & (rank * share + first + offs < num_elements)
            total = tl.zeros((tile,), tl.float32)
            for peer in tl.static_range(ranks):
                part_ptr = _point_to(own + chunks + peer * chunk_bytes, dtype)
                total += tl.load(part_ptr + offs, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
            for peer in tl.static_range(ranks):
                place = _point_to(tl.load(buffers_ptr + peer) + sums + rank * chunk_bytes, dtype)
                tl.store(place + offs, total.to(dtype), mask=inside)
    if phase == 0:
        _wait_for_ranks(buffers_ptr, program, epoch, 2, rank, ranks, programs)
    if (phase == 0) | (phase == 3):
        for peer in tl.static_range(ranks):
            place = _point_to(own + sums + peer * chunk_bytes, dtype)
            for start in range(0, size, tile):
                offs = start + tl.arange(0, tile)
                index = peer * share + first + offs
                inside = (offs < size) & (index < num_elements)
                summed = tl.load(place + offs, mask=inside, other=0.0, cache_modifier=".cg")
                tl.store(out_ptr + index, summed, mask=inside)
        tl.store(epochs_ptr + programs + program, epoch)


@triton.jit
def _point_to(address, dtype: tl.constexpr):
    """A pointer to a row or chunk: all of them begin at whole lines, so that stores are 16 bytes wide."""
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def _wait_for_ranks(
    buffers_ptr,
    program,
    epoch,
    barrier: tl.constexpr,
    rank: tl.constexpr,
    ranks: tl.constexpr,
    programs: tl.constexpr,
):
    """Tell the programs of this number on all ranks that what this one wrote is there, and wait for their word."""
    flags = (barrier * programs + program) * ranks
    # The barrier orders the stores of all threads before the one atomic that publishes them, to the whole system.
    tl.debug_barrier()
    for peer in tl.static_range(ranks):
        flag_ptr = tl.load(buffers_ptr + peer).to(tl.pointer_type(tl.int32)) + flags + rank
        tl.atomic_xchg(flag_ptr, epoch, sem="release", scope="sys")
    own_ptr = tl.load(buffers_ptr + rank).to(tl.pointer_type(tl.int32)) + flags
    for peer in tl.static_range(ranks):
        # The difference is right across the counter's overflow: every two days at 25,000 sums a second.
        while tl.atomic_add(own_ptr + peer, 0, sem="acquire", scope="sys") - epoch < 0:
            pass
    tl.debug_barrier()


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
