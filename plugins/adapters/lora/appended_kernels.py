"""LoRA's second product where the layer's own product did the first: ``y += B v`` of a ``v`` that lies behind ``y``.

A of the slots is stored behind the rows of the layer's weight, so one launch gives ``y`` and, in the columns behind it,
what every slot's A makes of every token. These kernels read both and add the product of B and the token's own slot's
``v``; what other slots made of the token is not looked at. Tokens stay in the order of the step: a tile of them has a
list of the slots that its tokens have, and multiplies those slots' B, 64 ranks at a time, by ``v`` with zeros where a
token has another slot. So B is read once a tile, and nothing is sorted or gathered.

What a layer's result goes through anyway is done here: the gated activation function, the residual, the RMS norm
behind it (a program has a row then, and reads its token's B whole). The result is dense.

Shapes: ``wide`` (M, features + slots * parts * R), B (slots, R, features), ``out`` (M, features), half of them gated.
Grid: (tiles of features, tiles of tokens); with the norm (M,).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.plugins.adapters.lora.batch import AdapterBatch
from quire.sdk import ActivationFormat
from quire.sdk.ops import (
    ACTIVATION_FORMAT_CODES,
    allocate_activation,
    pdl_launch_dependents,
    pdl_wait,
    quantize_and_store_row,
    supports_pdl,
)

__all__ = [
    "launch_add_appended",
    "launch_add_appended_and_norm",
    "load_slot_b",
    "locate_tile",
    "multiply_slots",
]

_MAX_PARTS = 3
_MAX_BLOCK_K = 64
"""Ranks that are multiplied at a time: of several slots."""
_BLOCK_N, _MIXED_BLOCK_N = 64, 128
"""Features of a tile; the second where tiles are mixed, and there are more tokens than"""
_MAX_NARROW_TOKENS = 32


def launch_add_appended(
    wide: Tensor,
    b: Tensor,
    ranks: Tensor,
    part_sizes: tuple[int, ...],
    batch: AdapterBatch,
    *,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """The layer's output (num_tokens, features) with what adapters add, as a tensor of its own.

    ``wide`` (num_tokens, features and more, rows strided): the layer's product and behind it ``v``, (slots, parts,
    max_rank) of each token. ``b`` (slots, max_rank, features), ``ranks`` (slots, parts). ``gated``: of two parts of one
    size, ``silu(first) * second``. ``residual`` (num_tokens, features) is added.
    """
    num_tokens, features = len(wide), sum(part_sizes)
    tiles = batch.tiles
    width = features // 2 if gated else features
    out = wide.new_empty(num_tokens, width)
    sizes = (*part_sizes, *(0 for _ in range(_MAX_PARTS - len(part_sizes))))
    max_rank = b.shape[1]
    block_r = min(_MAX_BLOCK_K, triton.next_power_of_2(max_rank))
    block_n = _MIXED_BLOCK_N if tiles.is_mixed and num_tokens > _MAX_NARROW_TOKENS else _BLOCK_N
    num_tiles = sum(triton.cdiv(size, block_n) for size in (part_sizes[:1] if gated else part_sizes))
    enable_pdl = supports_pdl(wide.device)
    add_appended_kernel[(num_tiles, triton.cdiv(num_tokens, tiles.rows))](
        wide,
        b,
        ranks,
        tiles.token_slots,
        tiles.lists,
        wide if residual is None else residual,
        out,
        num_tokens,
        wide.stride(0),
        size_0=sizes[0],
        size_1=sizes[1],
        size_2=sizes[2],
        parts=len(part_sizes),
        max_rank=max_rank,
        rows=tiles.rows,
        list_width=tiles.lists.shape[1],
        block_n=block_n,
        block_r=block_r,
        group=min(_MAX_BLOCK_K // block_r, triton.next_power_of_2(tiles.num_slots)),
        gated=gated,
        has_residual=residual is not None,
        enable_pdl=enable_pdl,
        num_warps=4,
        launch_pdl=enable_pdl,
    )
    return out


def launch_add_appended_and_norm(
    wide: Tensor,
    b: Tensor,
    ranks: Tensor,
    batch: AdapterBatch,
    residual: Tensor,
    norm: tuple[Tensor, float],
    output_format: ActivationFormat,
) -> tuple[Any, Tensor]:
    """``(norm(s), s)`` of ``s = wide's product + B v + residual`` for a layer of one part; the first in
    ``output_format``."""
    num_tokens, features = residual.shape
    out, values, scale = allocate_activation(wide, features, output_format)
    stream = torch.empty_like(residual)
    block, max_rank = triton.next_power_of_2(features), b.shape[1]
    num_warps = min(16, max(1, block // 256))
    enable_pdl = supports_pdl(wide.device)
    add_appended_and_norm_kernel[(num_tokens,)](
        wide,
        b,
        ranks,
        batch.tiles.token_slots,
        residual,
        norm[0],
        values,
        scale,
        stream,
        wide.stride(0),
        norm[1],
        features=features,
        max_rank=max_rank,
        block=block,
        block_r=max(1, min(16, 16 * 256 * num_warps // block)),
        kind=ACTIVATION_FORMAT_CODES[output_format.kind],
        enable_pdl=enable_pdl,
        num_warps=num_warps,
        launch_pdl=enable_pdl,
    )
    return out, stream


@triton.jit
def locate_tile(tile, size_0: tl.constexpr, size_1: tl.constexpr, size_2: tl.constexpr, block_n: tl.constexpr):
    """Of a tile of features: the part that it is of, the features, and which of them there are."""
    tiles_0: tl.constexpr = (size_0 + block_n - 1) // block_n
    tiles_1: tl.constexpr = (size_1 + block_n - 1) // block_n
    part = (tile >= tiles_0).to(tl.int32) + (tile >= tiles_0 + tiles_1).to(tl.int32)
    first = tl.where(part == 0, 0, tl.where(part == 1, size_0, size_0 + size_1))
    size = tl.where(part == 0, size_0, tl.where(part == 1, size_1, size_2))
    offs_n = tile - tl.where(part == 0, 0, tl.where(part == 1, tiles_0, tiles_0 + tiles_1))
    offs_n = offs_n * block_n + tl.arange(0, block_n)
    return part, first + offs_n, offs_n < size


@triton.jit
def load_slot_b(
    first,
    r,
    list_at,
    b_ptr,
    ranks_ptr,
    columns,
    mask_n,
    part,
    list_width: tl.constexpr,
    features: tl.constexpr,
    parts: tl.constexpr,
    max_rank: tl.constexpr,
    block_r: tl.constexpr,
    group: tl.constexpr,
):
    """The ranks ``r ...`` of the listed slots ``first ...``: each one's slot, and B (group * block_r, block_n)."""
    offs_k = tl.arange(0, group * block_r)
    index, rank = first + offs_k // block_r, r + offs_k % block_r
    slot = tl.load(list_at + 1 + index, mask=index + 1 < list_width, other=-2)
    mask = slot >= 0
    held = tl.maximum(slot, 0).to(tl.int64)
    if max_rank > 16:  # else all of it is one load, and zero beyond the rank
        mask &= rank < tl.load(ranks_ptr + held * parts + part, mask=mask, other=0)
    rows = (held * max_rank + rank)[:, None] * features
    return slot, tl.load(b_ptr + rows + columns[None, :], mask=mask[:, None] & mask_n[None, :], other=0.0)


@triton.jit
def _load_v(v_rows, slots, part, r, parts: tl.constexpr, max_rank: tl.constexpr, block_r: tl.constexpr):
    """What each token's own slot made of it, the ranks ``r ...``: (rows, block_r)."""
    offs_r = r + tl.arange(0, block_r)
    at = ((slots * parts + part) * max_rank)[:, None] + offs_r[None, :]
    return tl.load(v_rows[:, None] + at, mask=(slots >= 0)[:, None] & (offs_r < max_rank)[None, :], other=0.0)


@triton.jit
def multiply_slots(y, v, b, slots, slot_of_rank, block_r: tl.constexpr, group: tl.constexpr):
    """``y`` and the product of B and ``v``, which is zero where a token has another slot."""
    wide = tl.reshape(tl.broadcast_to(v[:, None, :], (v.shape[0], group, block_r)), (v.shape[0], group * block_r))
    wide = tl.where(slots[:, None] == slot_of_rank[None, :], wide, 0.0)
    return tl.dot(wide, b, y, input_precision="ieee")


@triton.jit(do_not_specialize=["num_tokens"])
def add_appended_kernel(
    wide_ptr,  # (num_tokens, features, and slots * parts * max_rank or more), rows strided
    b_ptr,  # (slots, max_rank, features)
    ranks_ptr,  # (slots, parts)
    token_slots_ptr,  # (num_tokens,): -1 without an adapter
    lists_ptr,  # (tiles of tokens, list_width): how many slots a tile's tokens have, and which
    residual_ptr,  # (num_tokens, features)
    out_ptr,  # (num_tokens, features), half of them where gated
    num_tokens,
    wide_stride,
    size_0: tl.constexpr,
    size_1: tl.constexpr,
    size_2: tl.constexpr,
    parts: tl.constexpr,
    max_rank: tl.constexpr,
    rows: tl.constexpr,
    list_width: tl.constexpr,
    block_n: tl.constexpr,
    block_r: tl.constexpr,
    group: tl.constexpr,
    gated: tl.constexpr,
    has_residual: tl.constexpr,
    enable_pdl: tl.constexpr,
):
    """Grid: (tiles of features, tiles of tokens)."""
    features: tl.constexpr = size_0 + size_1 + size_2
    width: tl.constexpr = size_0 if gated else features
    part, columns, mask_n = locate_tile(tl.program_id(0), size_0, size_1, size_2, block_n)
    offs_m = tl.program_id(1) * rows + tl.arange(0, rows)
    mask_m = offs_m < num_tokens
    # What no kernel of the step writes is read before the wait, while the product still runs.
    slots = tl.load(token_slots_ptr + offs_m, mask=mask_m, other=-1)
    list_at = lists_ptr + tl.program_id(1) * list_width
    count = tl.load(list_at)
    first_slot, first_b = load_slot_b(
        0, 0, list_at, b_ptr, ranks_ptr, columns, mask_n, part, list_width, features, parts, max_rank, block_r, group
    )
    first_slot_up, first_b_up = first_slot, first_b
    if gated:
        first_slot_up, first_b_up = load_slot_b(
            0,
            0,
            list_at,
            b_ptr,
            ranks_ptr,
            columns + width,
            mask_n,
            1,
            list_width,
            features,
            parts,
            max_rank,
            block_r,
            group,
        )
    pdl_launch_dependents(enable_pdl)
    pdl_wait(enable_pdl)
    row = offs_m.to(tl.int64)
    wide_rows = wide_ptr + row * wide_stride
    mask = mask_m[:, None] & mask_n[None, :]
    y = tl.load(wide_rows[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if gated:
        up = tl.load(wide_rows[:, None] + (columns + width)[None, :], mask=mask, other=0.0).to(tl.float32)
    if has_residual:
        residual = tl.load(residual_ptr + row[:, None] * features + columns[None, :], mask=mask, other=0.0)
    v_rows = wide_rows + features
    for r in tl.static_range(0, max_rank, block_r):
        v = _load_v(v_rows, slots, part, r, parts, max_rank, block_r)
        if gated:
            v_up = _load_v(v_rows, slots, 1, r, parts, max_rank, block_r)
        if r == 0:
            y = multiply_slots(y, v, first_b, slots, first_slot, block_r, group)
            if gated:
                up = multiply_slots(up, v_up, first_b_up, slots, first_slot_up, block_r, group)
        for first in tl.range(group if r == 0 else 0, count, group, num_stages=4):
            slot, b = load_slot_b(
                first, r, list_at, b_ptr, ranks_ptr, columns, mask_n, part,
                list_width, features, parts, max_rank, block_r, group,
            )  # fmt: skip
            if gated:
                slot_up, b_up = load_slot_b(
                    first, r, list_at, b_ptr, ranks_ptr, columns + width, mask_n, 1,
                    list_width, features, parts, max_rank, block_r, group,
                )  # fmt: skip
                up = multiply_slots(up, v_up, b_up, slots, slot_up, block_r, group)
            y = multiply_slots(y, v, b, slots, slot, block_r, group)
    if gated:
        y = y / (1.0 + tl.exp(-y)) * up
    if has_residual:
        y += residual.to(tl.float32)
    tl.store(out_ptr + row[:, None] * width + columns[None, :], y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_appended_and_norm_kernel(
    wide_ptr,  # (num_tokens, features, and slots * max_rank or more), rows strided
    b_ptr,  # (slots, max_rank, features)
    ranks_ptr,  # (slots,)
    token_slots_ptr,  # (num_tokens,)
    residual_ptr,  # (num_tokens, features)
    norm_ptr,  # (features,)
    out_ptr,  # as ``quantize_and_store_row``
    scale_ptr,
    stream_ptr,  # (num_tokens, features)
    wide_stride,
    eps,
    features: tl.constexpr,
    max_rank: tl.constexpr,
    block: tl.constexpr,
    block_r: tl.constexpr,
    kind: tl.constexpr,
    enable_pdl: tl.constexpr,
):
    """Grid: (num_tokens,)."""
    row = tl.program_id(0).to(tl.int64)
    offs, offs_r = tl.arange(0, block), tl.arange(0, block_r)
    mask = offs < features
    slot = tl.load(token_slots_ptr + row)
    held = tl.maximum(slot, 0).to(tl.int64)
    rank = tl.load(ranks_ptr + held, mask=slot >= 0, other=0)
    b_at = b_ptr + (held * max_rank + offs_r)[:, None] * features + offs[None, :]
    b = tl.load(b_at, mask=(offs_r < rank)[:, None] & mask[None, :], other=0.0)
    weight = tl.load(norm_ptr + offs, mask=mask, other=0.0)
    pdl_launch_dependents(enable_pdl)
    pdl_wait(enable_pdl)
    x = tl.load(wide_ptr + row * wide_stride + offs, mask=mask, other=0.0).to(tl.float32)
    x += tl.load(residual_ptr + row * features + offs, mask=mask, other=0.0).to(tl.float32)
    v_at = wide_ptr + row * wide_stride + features + held * max_rank + offs_r
    v = tl.load(v_at, mask=offs_r < rank, other=0.0)
    x += tl.sum(v.to(tl.float32)[:, None] * b.to(tl.float32), axis=0)
    for r in range(block_r, rank, block_r):
        mask_r = r + offs_r < rank
        b = tl.load(b_at + r * features, mask=mask_r[:, None] & mask[None, :], other=0.0)
        v = tl.load(v_at + r, mask=mask_r, other=0.0)
        x += tl.sum(v.to(tl.float32)[:, None] * b.to(tl.float32), axis=0)
    stream = x.to(stream_ptr.dtype.element_ty)
    tl.store(stream_ptr + row * features + offs, stream, mask=mask)
    x = stream.to(tl.float32)
    inv_rms = tl.rsqrt(tl.sum(x * x) / features + eps)
    quantize_and_store_row(weight * (x * inv_rms).to(weight.dtype), row, offs, out_ptr, scale_ptr, features, kind)
