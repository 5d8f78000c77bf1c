"""Sums over the GPUs of a host through memory that all of them map: one shot for small messages, two for larger ones.

Algorithm: what the ranks exchange they write into each other's memory, each program to the programs of its number, and
tell by a flag that it is there. A read over NVLink takes a trip there and back; a write takes one, and no rank waits
for it but who needs it.

- One shot: a program takes a row. It writes the row into every other rank's buffer, waits for theirs, and adds them in
  the order of the ranks, in float32: every rank gets the same bits. The residual addition, the RMS norm and the
  quantization of ``norm_kernel`` follow in the same program.
- Marked one shot, for few rows: every 8 bytes hold 4 of the row and the number of the call, which is their flag, as in
  NCCL's LL protocol. So no write waits for those before it, and twice the bytes cross the link.
- Two shots: each rank sums one share of the elements and writes the result to all. A rank sends 2 (N - 1) / N of the
  message in place of N - 1 of it.
- The second of two shots of rows, for long messages, of which copy engines were the first: a rank sums its share of the
  rows, adds the residual, and writes to all what it then norms, as they do.

A flag holds the number of the program's last call, which each program counts in memory, so that a kernel does not
depend on the host: it may stand in CUDA graphs and outside. Two buffers by turns suffice for one shot: whoever writes a
buffer again has seen the flags of the call between, which a rank sets after it has read. The phases of two shots guard
each other's buffers in the same way.

Memory of each rank, ``all_reduce_launch.SymmetricLayout``: flags, rows of one shot, marked rows, chunks of both shots,
parts that were sent and their sums.
``buffers`` holds the address of every rank's. Grid: a program a row, or a chunk. Registers: a row. NVLink multicast is
not used.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.core.ops.kernels.pdl import pdl_launch_dependents, pdl_wait
from quire.core.ops.kernels.quantize_kernel import quantize_and_store_row

__all__ = ["one_shot_kernel", "sum_sent_kernel", "two_shot_kernel"]


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
    marked: tl.constexpr,
    block: tl.constexpr,
    phase: tl.constexpr,
    enable_pdl: tl.constexpr,
):
    """Grid (rows,)."""
    pdl_launch_dependents(enable_pdl)
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, block)
    mask = offs < features
    # Neither weights nor addresses are written by a kernel before.
    if has_norm:
        weight = tl.load(weight_ptr + offs, mask=mask, other=0.0)
    own = tl.load(buffers_ptr + rank)
    pdl_wait(enable_pdl)
    epoch = tl.load(epochs_ptr + row) + 1
    buffer = (epoch & 1).to(tl.int64)
    first = rows_offset + (buffer * programs + row) * ranks * row_bytes
    if has_norm and phase != 1:  # on its way while the ranks wait
        residual = tl.load(residual_ptr + row * features + offs, mask=mask, other=0.0)
    if marked:
        total = _exchange_marked(
            x_ptr + row * x_stride, buffers_ptr, own, first, epoch, features, rank, ranks, row_bytes, block, phase
        )
    else:
        total = _exchange_flagged(
            x_ptr + row * x_stride, buffers_ptr, own, first, row, epoch, features, rank, ranks, programs, row_bytes,
            block, phase,
        )  # fmt: skip
    if phase != 1:
        tl.store(epochs_ptr + row, epoch)
        summed = total.to(x_ptr.dtype.element_ty)
        if has_norm:
            summed = summed + residual
            tl.store(stream_ptr + row * features + offs, summed, mask=mask)
            wide = summed.to(tl.float32)
            inv_rms = tl.rsqrt(tl.sum(wide * wide) / features + eps)
            normed = weight * (wide * inv_rms).to(x_ptr.dtype.element_ty)
            quantize_and_store_row(normed, row, offs, out_ptr, scale_ptr, features, kind)
        else:
            tl.store(out_ptr + row * features + offs, summed, mask=mask)


@triton.jit
def _exchange_flagged(
    x_row, buffers_ptr, own, first, row, epoch, features: tl.constexpr, rank: tl.constexpr, ranks: tl.constexpr,
    programs: tl.constexpr, row_bytes: tl.constexpr, block: tl.constexpr, phase: tl.constexpr,
):  # fmt: skip
    """The sum of a row in float32, (block,). A flag says that the row is there."""
    dtype: tl.constexpr = x_row.dtype.element_ty
    offs = tl.arange(0, block)
    mask = offs < features
    x = tl.load(x_row + offs, mask=mask, other=0.0)
    total = tl.zeros((block,), tl.float32)
    if phase != 2:
        for peer in tl.static_range(ranks):
            if peer != rank:
                place = _point_to(tl.load(buffers_ptr + peer) + first + rank * row_bytes, dtype)
                tl.store(place + offs, x, mask=mask)
    if phase == 0:
        _wait_for_ranks(buffers_ptr, row, epoch, 0, rank, ranks, programs)
    if phase != 1:
        for peer in tl.static_range(ranks):
            if peer == rank:
                total += x.to(tl.float32)
            else:
                # .cg reads the L2 cache, where the peers have written: the L1 may hold the call before the last.
                part_ptr = _point_to(own + first + peer * row_bytes, dtype)
                total += tl.load(part_ptr + offs, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    return total


@triton.jit
def _exchange_marked(
    x_row, buffers_ptr, own, first, epoch, features: tl.constexpr, rank: tl.constexpr, ranks: tl.constexpr,
    row_bytes: tl.constexpr, block: tl.constexpr, phase: tl.constexpr,
):  # fmt: skip
    """As ``_exchange_flagged``; each two numbers of 16 bits stand beside the number of the call."""
    dtype: tl.constexpr = x_row.dtype.element_ty
    pairs = tl.arange(0, block // 2)
    mask = pairs < features // 2
    x = tl.load(x_row.to(tl.pointer_type(tl.int32)) + pairs, mask=mask, other=0)
    low, high = tl.zeros((block // 2,), tl.float32), tl.zeros((block // 2,), tl.float32)
    if phase != 2:
        marked = (epoch.to(tl.int64) << 32) | (x.to(tl.int64) & 0xFFFFFFFF)
        for peer in tl.static_range(ranks):
            if peer != rank:
                place = _point_to(tl.load(buffers_ptr + peer) + first + rank * row_bytes, tl.int64)
                tl.store(place + pairs, marked, mask=mask)
    if phase != 1:
        for peer in tl.static_range(ranks):
            part = x
            if peer != rank:
                part_ptr = _point_to(own + first + peer * row_bytes, tl.int64)
                received = tl.load(part_ptr + pairs, mask=mask, other=0, volatile=True)
                while tl.max(tl.where(mask, (received >> 32).to(tl.int32) != epoch, False).to(tl.int32), axis=0) > 0:
                    received = tl.load(part_ptr + pairs, mask=mask, other=0, volatile=True)
                part = received.to(tl.int32)
            low += (part & 0xFFFF).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
            high += ((part >> 16) & 0xFFFF).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return tl.reshape(tl.join(low, high), (block,))


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


@triton.jit(do_not_specialize=["rows", "share", "call"])
def sum_sent_kernel(
    part_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    stream_ptr,
    buffers_ptr,
    epochs_ptr,
    rows,
    share,
    call,
    eps,
    features: tl.constexpr,
    has_norm: tl.constexpr,
    rank: tl.constexpr,
    ranks: tl.constexpr,
    programs: tl.constexpr,
    sent_flags: tl.constexpr,
    parts_offset: tl.constexpr,
    sums_offset: tl.constexpr,
    share_bytes: tl.constexpr,
    piece_rows: tl.constexpr,
    block: tl.constexpr,
    phase: tl.constexpr,
    enable_pdl: tl.constexpr,
):
    """Grid (number of programs,). Rank r sums rows ``r * share`` to ``(r + 1) * share``; program p takes each
    ``num_programs``-th of every rank's share, from its p-th on, ``piece_rows`` at a time. It sums a piece and sends it
    before it waits for the same piece of the others' sums, one behind, which it norms as well.

    A flag of each rank says that its part of ``call`` is there. Copies of the next call begin when this kernel has
    ended, and so when all have read theirs; sums of the next are written when its parts have come, and so when the
    kernel has ended there."""
    pdl_launch_dependents(enable_pdl)
    dtype: tl.constexpr = part_ptr.dtype.element_ty
    offs = tl.arange(0, block)
    weight = tl.load(weight_ptr + offs, mask=offs < features, other=0.0)
    own = tl.load(buffers_ptr + rank)
    pdl_wait(enable_pdl)
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    num_pieces = tl.cdiv(tl.cdiv(share, num_programs), piece_rows)
    counted = tl.load(epochs_ptr + programs + program)
    if phase == 0:
        sent_ptr = own.to(tl.pointer_type(tl.int32)) + sent_flags
        for peer in tl.static_range(ranks):
            if peer != rank:
                while tl.atomic_add(sent_ptr + peer, 0, sem="acquire", scope="sys") != call:
                    pass
        tl.debug_barrier()
    for turn in range(num_pieces + 1):
        if (phase != 2) & (turn < num_pieces):
            index = ((turn * piece_rows + tl.arange(0, piece_rows)) * num_programs + program).to(tl.int64)
            row = rank * share + index
            mask = ((index < share) & (row < rows))[:, None] & (offs < features)[None, :]
            places = index[:, None] * features + offs[None, :]
            total = tl.zeros((piece_rows, block), tl.float32)
            for peer in tl.static_range(ranks):
                if peer == rank:
                    total += tl.load(part_ptr + places, mask=mask, other=0.0).to(tl.float32)
                else:
                    from_peer = _point_to(own + parts_offset + (peer - rank - 1 + ranks) % ranks * share_bytes, dtype)
                    total += tl.load(from_peer + places, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
            summed = total.to(dtype)
            if has_norm:
                summed += tl.load(residual_ptr + row[:, None] * features + offs[None, :], mask=mask, other=0.0)
            for peer in tl.static_range(ranks):
                if peer != rank:
                    peer_sums = tl.load(buffers_ptr + peer) + sums_offset
                    to_peer = _point_to(peer_sums + (rank - peer - 1 + ranks) % ranks * share_bytes, dtype)
                    tl.store(to_peer + places, summed, mask=mask)
            _store_normed(summed, weight, row, offs, mask, out_ptr, stream_ptr, eps, features, has_norm)
            if phase == 0:
                _signal(buffers_ptr, program, counted + turn + 1, 2, rank, ranks, programs)
        if (phase != 1) & (turn >= 1):
            if phase == 0:
                _wait(buffers_ptr, program, counted + turn, 2, rank, ranks, programs)
            index = (((turn - 1) * piece_rows + tl.arange(0, piece_rows)) * num_programs + program).to(tl.int64)
            places = index[:, None] * features + offs[None, :]
            for peer in tl.static_range(ranks):
                if peer != rank:
                    row = peer * share + index
                    mask = ((index < share) & (row < rows))[:, None] & (offs < features)[None, :]
                    sums = _point_to(own + sums_offset + (peer - rank - 1 + ranks) % ranks * share_bytes, dtype)
                    summed = tl.load(sums + places, mask=mask, other=0.0, cache_modifier=".cg")
                    _store_normed(summed, weight, row, offs, mask, out_ptr, stream_ptr, eps, features, has_norm)
    if phase != 1:
        tl.store(epochs_ptr + programs + program, counted + num_pieces)


@triton.jit
def _store_normed(
    summed, weight, row, offs, mask, out_ptr, stream_ptr, eps, features: tl.constexpr, has_norm: tl.constexpr
):
    """Rows of the stream, (rows, block), and their norms."""
    places = row[:, None] * features + offs[None, :]
    tl.store(stream_ptr + places, summed, mask=mask)
    if has_norm:
        wide = summed.to(tl.float32)
        inv_rms = tl.rsqrt(tl.sum(wide * wide, 1) / features + eps)
        tl.store(out_ptr + places, weight[None, :] * (wide * inv_rms[:, None]).to(summed.dtype), mask=mask)


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
    _signal(buffers_ptr, program, epoch, barrier, rank, ranks, programs)
    _wait(buffers_ptr, program, epoch, barrier, rank, ranks, programs)


@triton.jit
def _signal(
    buffers_ptr, program, epoch, barrier: tl.constexpr, rank: tl.constexpr, ranks: tl.constexpr, programs: tl.constexpr
):
    """Tell them."""
    flags = (barrier * programs + program) * ranks
    # The barrier orders the stores of all threads before the one atomic that publishes them, to the whole system.
    tl.debug_barrier()
    for peer in tl.static_range(ranks):
        if peer != rank:
            flag_ptr = tl.load(buffers_ptr + peer).to(tl.pointer_type(tl.int32)) + flags + rank
            tl.atomic_xchg(flag_ptr, epoch, sem="release", scope="sys")


@triton.jit
def _wait(
    buffers_ptr, program, epoch, barrier: tl.constexpr, rank: tl.constexpr, ranks: tl.constexpr, programs: tl.constexpr
):
    """Wait until all have told as much."""
    flags = (barrier * programs + program) * ranks
    own_ptr = tl.load(buffers_ptr + rank).to(tl.pointer_type(tl.int32)) + flags
    for peer in tl.static_range(ranks):
        if peer != rank:
            # The difference is right across the counter's overflow: every two days at 25,000 sums a second.
            while tl.atomic_add(own_ptr + peer, 0, sem="acquire", scope="sys") - epoch < 0:
                pass
    tl.debug_barrier()
