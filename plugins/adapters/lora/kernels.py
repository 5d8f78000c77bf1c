"""LoRA for many adapters in one batch, as two kernels behind a layer: shrink, ``v = A x``, and expand, ``y += B v``.

Algorithm: tokens are sorted by adapter and cut into segments of one adapter each (Punica's SGMV: Chen et al., 2023,
arXiv:2310.18547). A program of *shrink* multiplies a segment by 16 rows of A, over a part of the inputs (split-K); the
parts are float32 and are added by *expand*, in order, so that no atomics are needed and every sum has one order.
Projections that a layer fuses share their tokens and one shrink, with A concatenated. A program of *expand* multiplies
the segment's ranks by a tile of B, which lies rank by rank, and adds the result to the layer's output. With few tokens
the layer's own kernel may do that (``add_low_rank``); then *shrink* alone is launched, in front of it.

An adapter's rank is read on the device: what a slot leaves unused is neither loaded nor multiplied. The grid is fixed
by the number of tokens, so both may be captured: programs of *shrink* for empty segments exit, those of *expand* share
out the tiles of the others, each loading the next tile's B while it multiplies one. Both are started while the kernel
before still runs (PDL): segments and ranks are copied before the step, so they are read before the wait; and *shrink*
lets the kernel behind it start at once, whose weights then travel meanwhile.

An RMS norm before the layer may be folded in, as ``gemm_small_m`` does: with ``s = 1 / sqrt(mean(x^2) + eps)``,
``A (g * x * s) = s * A (g * x)``, and the squares are summed beside the products.

Shapes: ``x`` (M, K), A (slots, parts, R, K), B (slots, R, N), ``v`` (splits, M, parts, R) float32, ``out`` (M, N).
Grid: shrink ``(segments, parts * R / 16, splits)``; expand as many programs as run at a time, which share out segments
and tiles of N.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.plugins.adapters.lora.batch import MAX_FEW_TOKENS, AdapterBatch
from quire.sdk.ops import DeviceProfile, pdl_launch_dependents, pdl_wait, supports_pdl

__all__ = ["launch_lora", "launch_shrink"]

_BLOCK_R = 16
_BLOCK_N = 128
_MAX_PARTS = 3
_WARPS_PER_SM = 16
"""Of an expand: as many as its registers leave room for."""


def launch_lora(
    x: Tensor,
    out: Tensor,
    a: Tensor,
    b: Tensor,
    ranks: Tensor,
    part_sizes: tuple[int, ...],
    batch: AdapterBatch,
    norm: tuple[Tensor, float] | None = None,
) -> None:
    """Add to ``out`` (num_tokens, features) what the adapters of ``batch`` make of ``x`` (num_tokens, inputs).

    ``a`` (slots, parts, max_rank, inputs), ``b`` (slots, max_rank, features), the scaling in it, ``ranks`` (slots,
    parts) int32, 0 where an adapter leaves a part alone. ``part_sizes``: features of each part, three parts at most.
    ``norm``, weight (inputs,) and epsilon: the adapters read the RMS norm of ``x``.
    """
    shape = batch.shape
    if not shape.num_segments:
        return
    num_tokens, inputs = x.shape
    parts, max_rank = ranks.shape[1], a.shape[2]
    v, squares = launch_shrink(x, a, ranks, batch, norm, keep_squares=norm is not None)
    enable_pdl = supports_pdl(x.device)
    sizes = (*part_sizes, *(0 for _ in range(_MAX_PARTS - len(part_sizes))))
    block_n = _BLOCK_N if num_tokens <= 16 or shape.max_rows > 16 else 2 * _BLOCK_N
    tiles = sum(triton.cdiv(size, block_n) for size in part_sizes)
    num_warps = 4 if shape.max_rows * block_n <= 2048 else 8
    num_programs = _WARPS_PER_SM // num_warps * DeviceProfile.detect(x.device).num_sms
    programs = min(shape.num_segments * tiles, num_programs)
    lora_expand_kernel[(programs,)](
        v,
        squares,
        b,
        ranks,
        batch.segments,
        batch.num_live,
        batch.token_indices,
        out,
        num_tokens,
        batch.segments.stride(0),
        0.0 if norm is None else norm[1],
        size_0=sizes[0],
        size_1=sizes[1],
        size_2=sizes[2],
        inputs=inputs,
        has_norm=norm is not None,
        parts=parts,
        max_rank=max_rank,
        rows=shape.max_rows,
        block_r=_BLOCK_R,
        block_n=block_n,
        splits=v.shape[0],
        enable_pdl=enable_pdl,
        num_warps=num_warps,
        launch_pdl=enable_pdl,
    )


def launch_shrink(
    x: Tensor,
    a: Tensor,
    ranks: Tensor,
    batch: AdapterBatch,
    norm: tuple[Tensor, float] | None = None,
    *,
    keep_squares: bool = False,
) -> tuple[Tensor, Tensor]:
    """``v`` (splits, num_tokens, parts * max_rank) float32, to be summed over the splits; rows of tokens without an
    adapter, and what lies beyond an adapter's rank, are not written. With ``norm`` short of its root mean square, for
    which ``keep_squares`` returns the sums of squares (splits, num_tokens, parts). Operands as of ``launch_lora``."""
    num_tokens, inputs = x.shape
    shape = batch.shape
    assert num_tokens == shape.num_tokens, f"prepared for {shape.num_tokens} tokens, not {num_tokens}"
    _, parts, max_rank, _ = a.shape
    splits = choose_splits(num_tokens, inputs)
    v = torch.empty(splits, num_tokens, parts * max_rank, dtype=torch.float32, device=x.device)
    squares = torch.empty(splits, num_tokens, parts, dtype=torch.float32, device=x.device) if keep_squares else v
    enable_pdl = supports_pdl(x.device)
    is_short = shape.max_rows <= 16  # then a turn's operands are small, and more of them travel at a time
    block_k = min(256 if is_short else 128, max(64, triton.next_power_of_2(inputs)))
    lora_shrink_kernel[(shape.num_segments, parts * (max_rank // _BLOCK_R), splits)](
        x,
        a,
        ranks,
        batch.segments,
        batch.token_indices,
        x if norm is None else norm[0],
        v,
        squares,
        num_tokens,
        batch.segments.stride(0),
        inputs=inputs,
        has_norm=norm is not None,
        keep_squares=keep_squares,
        parts=parts,
        max_rank=max_rank,
        rows=shape.max_rows,
        block_r=_BLOCK_R,
        block_k=block_k,
        splits=splits,
        enable_pdl=enable_pdl,
        num_warps=4,
        num_stages=4 if is_short else 3,
        launch_pdl=enable_pdl,
    )
    return v, squares


def choose_splits(num_tokens: int, inputs: int) -> int:
    """Parts of the inputs of a shrink: few tokens are few programs, which must be short; many tokens have enough. What
    is added in a layer's own kernel is summed over them by each of its programs."""
    if num_tokens <= MAX_FEW_TOKENS:
        return max(1, min(8, inputs // 1024))
    most = 16 if num_tokens <= 64 else 8 if num_tokens <= 256 else 2 if num_tokens <= 1024 else 1
    return max(1, min(most, inputs // 512))


@triton.jit(do_not_specialize=["num_tokens", "segment_stride"])
def lora_shrink_kernel(
    x_ptr,  # (num_tokens, inputs)
    a_ptr,  # (slots, parts, max_rank, inputs)
    ranks_ptr,  # (slots, parts)
    segments_ptr,  # (3, segment_stride): slot, first sorted token, number of tokens
    tokens_ptr,  # (num_tokens,)
    norm_ptr,  # (inputs,)
    v_ptr,  # (splits, num_tokens, parts * max_rank) float32
    squares_ptr,  # (splits, num_tokens, parts) float32
    num_tokens,
    segment_stride,
    inputs: tl.constexpr,
    has_norm: tl.constexpr,
    keep_squares: tl.constexpr,
    parts: tl.constexpr,
    max_rank: tl.constexpr,
    rows: tl.constexpr,
    block_r: tl.constexpr,
    block_k: tl.constexpr,
    splits: tl.constexpr,
    enable_pdl: tl.constexpr,
):
    """Grid: (segments, parts * max_rank / block_r, splits)."""
    segment, split = tl.program_id(0), tl.program_id(2)
    part, first_rank = tl.program_id(1) * block_r // max_rank, tl.program_id(1) * block_r % max_rank
    slot = tl.load(segments_ptr + segment)
    start = tl.load(segments_ptr + segment_stride + segment)
    count = tl.load(segments_ptr + 2 * segment_stride + segment)
    rank = tl.load(ranks_ptr + slot * parts + part)
    offs_m = tl.arange(0, rows)
    mask_m = offs_m < count
    tokens = tl.load(tokens_ptr + start + offs_m, mask=mask_m, other=0)
    pdl_launch_dependents(enable_pdl)
    # Every program waits, the empty ones too: what waits for this kernel waits by that for those before it.
    pdl_wait(enable_pdl)
    if (count > 0) & (first_rank < rank):
        offs_r = first_rank + tl.arange(0, block_r)
        offs_k = tl.arange(0, block_k)
        split_k: tl.constexpr = (inputs + splits * block_k - 1) // (splits * block_k) * block_k
        first_k = split * split_k
        x_rows = x_ptr + tokens.to(tl.int64)[:, None] * inputs
        a_rows = a_ptr + ((slot * parts + part).to(tl.int64) * max_rank + offs_r)[None, :] * inputs
        mask_r = offs_r < rank
        acc = tl.zeros((rows, block_r), dtype=tl.float32)
        squares = tl.zeros((rows, block_k), dtype=tl.float32)  # dropped by the compiler without a norm
        for k in range(first_k, first_k + split_k, block_k):
            mask_k = k + offs_k < inputs
            x = tl.load(x_rows + (k + offs_k)[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            if has_norm:  # all but the division by the root, which ``expand`` does for the few ranks
                x_f32 = x.to(tl.float32)
                squares += x_f32 * x_f32
                g = tl.load(norm_ptr + k + offs_k, mask=mask_k, other=0.0).to(tl.float32)
                x = (x_f32 * g[None, :]).to(x.dtype)
            a = tl.load(a_rows + (k + offs_k)[:, None], mask=mask_k[:, None] & mask_r[None, :], other=0.0)
            acc = tl.dot(x.to(a.dtype), a, acc, input_precision="ieee")
        v_rows = v_ptr + (split * num_tokens + tokens).to(tl.int64)[:, None] * (parts * max_rank)
        tl.store(v_rows + part * max_rank + offs_r[None, :], acc, mask=mask_m[:, None])
        if keep_squares:  # noqa: SIM102 - decided when it is compiled, the other when it runs
            if first_rank == 0:
                of_rows = (split * num_tokens + tokens).to(tl.int64) * parts + part
                tl.store(squares_ptr + of_rows, tl.sum(squares, axis=1), mask=mask_m)


@triton.jit
def _locate(
    item,
    num_live,
    segments_ptr,
    ranks_ptr,
    segment_stride,
    size_0: tl.constexpr,
    size_1: tl.constexpr,
    size_2: tl.constexpr,
    parts: tl.constexpr,
    block_n: tl.constexpr,
):
    """A tile of a segment: its slot, first sorted token, number of tokens and part, the part's rank, where the part
    begins, and the tile's features within it and whether it has them. Tiles that share B follow each other."""
    tiles_0: tl.constexpr = (size_0 + block_n - 1) // block_n
    tiles_1: tl.constexpr = (size_1 + block_n - 1) // block_n
    segment, tile = item % num_live, item // num_live
    part = (tile >= tiles_0).to(tl.int32) + (tile >= tiles_0 + tiles_1).to(tl.int32)
    first = tl.where(part == 0, 0, tl.where(part == 1, size_0, size_0 + size_1))
    size = tl.where(part == 0, size_0, tl.where(part == 1, size_1, size_2))
    tile -= tl.where(part == 0, 0, tl.where(part == 1, tiles_0, tiles_0 + tiles_1))
    slot = tl.load(segments_ptr + segment).to(tl.int64)
    start = tl.load(segments_ptr + segment_stride + segment)
    count = tl.load(segments_ptr + 2 * segment_stride + segment)
    rank = tl.load(ranks_ptr + slot * parts + part)
    offs_n = tile * block_n + tl.arange(0, block_n)
    return slot, start, count, part, rank, first, offs_n, offs_n < size


@triton.jit(do_not_specialize=["num_tokens", "segment_stride"])
def lora_expand_kernel(
    v_ptr,  # (splits, num_tokens, parts * max_rank) float32
    squares_ptr,  # (splits, num_tokens, parts) float32
    b_ptr,  # (slots, max_rank, features)
    ranks_ptr,  # (slots, parts)
    segments_ptr,  # (3, segment_stride): slot, first sorted token, number of tokens
    num_live_ptr,  # (1,)
    tokens_ptr,  # (num_tokens,)
    out_ptr,  # (num_tokens, features)
    num_tokens,
    segment_stride,
    eps,
    size_0: tl.constexpr,
    size_1: tl.constexpr,
    size_2: tl.constexpr,
    inputs: tl.constexpr,
    has_norm: tl.constexpr,
    parts: tl.constexpr,
    max_rank: tl.constexpr,
    rows: tl.constexpr,
    block_r: tl.constexpr,
    block_n: tl.constexpr,
    splits: tl.constexpr,
    enable_pdl: tl.constexpr,
):
    """Grid: programs that share out the tiles of the segments that are not empty."""
    features: tl.constexpr = size_0 + size_1 + size_2
    tiles: tl.constexpr = (
        (size_0 + block_n - 1) // block_n + (size_1 + block_n - 1) // block_n + (size_2 + block_n - 1) // block_n
    )
    programs = tl.num_programs(0)
    num_live = tl.load(num_live_ptr)
    num_items = num_live * tiles
    held, last = tl.maximum(num_live, 1), tl.maximum(num_items - 1, 0)
    offs_m, offs_r = tl.arange(0, rows), tl.arange(0, block_r)
    # The tile's B travels while the one before is multiplied, and the first before the wait: it does not change.
    item = tl.program_id(0)
    slot, _, _, _, rank, first, offs_n, mask_n = _locate(
        tl.minimum(item, last), held, segments_ptr, ranks_ptr, segment_stride, size_0, size_1, size_2, parts, block_n
    )
    b_at = b_ptr + (slot * max_rank + offs_r)[:, None] * features + first + offs_n[None, :]
    b = tl.load(b_at, mask=(offs_r < rank)[:, None] & mask_n[None, :] & (item < num_items), other=0.0)
    pdl_wait(enable_pdl)  # also where there is nothing to add, see above
    for item in range(tl.program_id(0), num_items, programs):
        slot, start, count, part, rank, first, offs_n, mask_n = _locate(
            item, held, segments_ptr, ranks_ptr, segment_stride, size_0, size_1, size_2, parts, block_n
        )
        mask_m = offs_m < count
        tokens = tl.load(tokens_ptr + start + offs_m, mask=mask_m, other=0)
        out_at = out_ptr + tokens.to(tl.int64)[:, None] * features + first + offs_n[None, :]
        mask_out = mask_m[:, None] & mask_n[None, :] & (rank > 0)
        y = tl.load(out_at, mask=mask_out, other=0.0).to(tl.float32)
        v_at = v_ptr + tokens.to(tl.int64)[:, None] * (parts * max_rank) + part * max_rank + offs_r[None, :]
        next_item = item + programs
        next_slot, _, _, _, next_rank, next_first, next_n, next_mask = _locate(
            tl.minimum(next_item, last),
            held,
            segments_ptr,
            ranks_ptr,
            segment_stride,
            size_0,
            size_1,
            size_2,
            parts,
            block_n,
        )
        next_at = b_ptr + (next_slot * max_rank + offs_r)[:, None] * features + next_first + next_n[None, :]
        mask_next = (offs_r < next_rank)[:, None] & next_mask[None, :] & (next_item < num_items)
        b_next = tl.load(next_at, mask=mask_next, other=0.0)
        acc = tl.zeros((rows, block_n), dtype=tl.float32)
        if has_norm:
            total = tl.zeros((rows,), dtype=tl.float32)
            for split in tl.static_range(splits):
                of_rows = (split * num_tokens + tokens).to(tl.int64) * parts + part
                total += tl.load(squares_ptr + of_rows, mask=mask_m & (rank > 0), other=0.0)
            scale = tl.rsqrt(total / inputs + eps)
        for r in range(0, rank, block_r):
            if r > 0:
                b_at = b_ptr + (slot * max_rank + r + offs_r)[:, None] * features + first + offs_n[None, :]
                b = tl.load(b_at, mask=(r + offs_r < rank)[:, None] & mask_n[None, :], other=0.0)
            mask_v = mask_m[:, None] & (r + offs_r < rank)[None, :]
            v = tl.zeros((rows, block_r), dtype=tl.float32)
            for split in tl.static_range(splits):
                v += tl.load(v_at + r + split * num_tokens.to(tl.int64) * (parts * max_rank), mask=mask_v, other=0.0)
            if has_norm:
                v *= scale[:, None]
            acc = tl.dot(v.to(b.dtype), b, acc, input_precision="ieee")
        tl.store(out_at, (y + acc).to(out_ptr.dtype.element_ty), mask=mask_out)
        b = b_next
    pdl_launch_dependents(enable_pdl)
