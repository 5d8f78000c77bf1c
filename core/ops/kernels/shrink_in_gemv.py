"""``shrink_in_product`` for kernels that multiply one token, without tensor cores: a program multiplies rows of A.

Shapes: ``x`` (K,), A (slots, parts, R, K), ``words`` (splits, parts * R) int64, B (slots, R, N).
Registers: a part of a row of A and the next one.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from quire.core.ops.kernels.linear_epilogue import Epilogue, find_part
from quire.core.ops.kernels.pdl import pdl_launch_dependents, pdl_wait
from quire.core.ops.kernels.shrink_in_product import (
    mark_words,
    pack_shrink_operands,
    receive_words,
)

__all__ = ["add_token_shrink", "find_adapter", "receive_rows", "shrink_rows"]

_VECTOR = tl.constexpr(8)
_ROWS = 1
"""Of A that a program multiplies at a time, where it multiplies no more than a token."""
_THREAD_INPUTS = 16
"""Numbers of A that a thread loads at once."""
_MAX_SPLITS = 8
_TOKEN_PROGRAMS = 16
"""That shrink for one token: as many as start with the others of an 8B model's layers on 132 SMs."""


def add_token_shrink(options: dict[str, Any], inputs: int, num_warps: int, epilogue: Epilogue) -> int:
    """As ``add_shrink``, of a kernel that multiplies one token, by ``num_warps`` warps."""
    term = epilogue.get("adapters")
    if term is None or term.shrink is None:
        return 0
    ranks = term.b.shape[1] * len(term.part_sizes)
    chunk: int = max(_THREAD_INPUTS * 32 * num_warps // _ROWS, triton.cdiv(inputs, _MAX_SPLITS))
    splits: int = triton.cdiv(inputs, chunk)
    split_inputs = triton.cdiv(triton.cdiv(inputs, splits), 8) * 8
    programs: int = min(_TOKEN_PROGRAMS, ranks // _ROWS * splits)
    options |= pack_shrink_operands(term.shrink, splits * ranks)
    options["in_launch"] = (programs, splits, split_inputs, _ROWS, term.shrink.max_polls)
    return programs


@triton.jit
def shrink_rows(
    x_ptr,  # (inputs,)
    norm_ptr,  # (inputs,)
    words_ptr,  # (splits, parts * max_rank)
    a_ptr,  # (slots, parts, max_rank, inputs)
    ranks_ptr,  # (slots, parts)
    slots_ptr,  # (1,)
    number_ptr,
    inputs: tl.constexpr,
    has_norm: tl.constexpr,
    enable_pdl: tl.constexpr,
    low_rank: tl.constexpr,
    in_launch: tl.constexpr,
):
    """A few rows of A at a time by a part of the token's inputs, which the programs share out; with a norm times its
    gains, and short of its root."""
    parts: tl.constexpr = low_rank[0]
    max_rank: tl.constexpr = low_rank[1]
    programs: tl.constexpr = in_launch[0]
    splits: tl.constexpr = in_launch[1]
    split_inputs: tl.constexpr = in_launch[2]
    rows: tl.constexpr = in_launch[3]
    vectors: tl.constexpr = triton.next_power_of_2((split_inputs + 7) // 8)
    num_items: tl.constexpr = parts * max_rank // rows * splits
    slot = tl.load(slots_ptr)
    inside = tl.arange(0, vectors)[:, None] * _VECTOR + tl.arange(0, _VECTOR)[None, :]
    item = tl.program_id(0)
    a = _load_rows(item, slot, inside, a_ptr, ranks_ptr, inputs, low_rank, in_launch)
    pdl_launch_dependents(enable_pdl)
    pdl_wait(enable_pdl)
    launch = tl.load(number_ptr, volatile=True)
    for item in range(tl.program_id(0), num_items, programs):
        offs_k = item % splits * split_inputs + inside
        mask_k = (inside < split_inputs) & (offs_k < inputs)
        x = tl.load(x_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        if has_norm:
            x *= tl.load(norm_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        a_next = _load_rows(item + programs, slot, inside, a_ptr, ranks_ptr, inputs, low_rank, in_launch)
        v = tl.sum(tl.sum(a.to(tl.float32) * x[None, :, :], axis=2), axis=1)
        row = item // splits * rows
        rank = _load_rank(row // max_rank, slot, ranks_ptr, parts)
        words_at = words_ptr + item % splits * (parts * max_rank) + row + tl.arange(0, rows)
        tl.store(words_at, mark_words(v, launch), mask=row % max_rank + tl.arange(0, rows) < rank)
        a = a_next


@triton.jit
def _load_rows(
    item, slot, inside, a_ptr, ranks_ptr, inputs: tl.constexpr, low_rank: tl.constexpr, in_launch: tl.constexpr
):
    """An item's rows of A, (rows, vectors, 8); zeros beyond the last item and beyond the adapter's rank."""
    parts: tl.constexpr = low_rank[0]
    max_rank: tl.constexpr = low_rank[1]
    splits: tl.constexpr = in_launch[1]
    split_inputs: tl.constexpr = in_launch[2]
    rows: tl.constexpr = in_launch[3]
    row = item // splits * rows
    rank = _load_rank(row // max_rank, slot, ranks_ptr, parts)
    offs_k = item % splits * split_inputs + inside
    mask = (inside < split_inputs) & (offs_k < inputs)
    offs_r = tl.arange(0, rows)
    held = tl.maximum(slot, 0).to(tl.int64) * (parts * max_rank)
    a_at = a_ptr + (held + row + offs_r)[:, None, None] * inputs + offs_k[None, :, :]
    return tl.load(a_at, mask=(row % max_rank + offs_r < rank)[:, None, None] & mask[None, :, :], other=0.0)


@triton.jit
def _load_rank(part, slot, ranks_ptr, parts: tl.constexpr):
    return tl.load(ranks_ptr + tl.maximum(slot, 0) * parts + part, mask=(slot >= 0) & (part < parts), other=0)


@triton.jit
def find_adapter(offs_n, slots_ptr, ranks_ptr, b_ptr, features: tl.constexpr, low_rank: tl.constexpr):
    """For one token and features ``offs_n``: the part of each, every part's rank (0 without an adapter), and the
    features' ranks of B, (block_n, block_r). None of it changes during a step: to be called before the wait for the
    kernels before."""
    parts: tl.constexpr = low_rank[0]
    max_rank: tl.constexpr = low_rank[1]
    offs_r = tl.arange(0, triton.next_power_of_2(max_rank))
    offs_p = tl.arange(0, triton.next_power_of_2(parts))
    slot = tl.load(slots_ptr)
    held = tl.maximum(slot, 0).to(tl.int64)
    part = find_part(offs_n, low_rank)
    ranks = tl.load(ranks_ptr + held * parts + offs_p, mask=(slot >= 0) & (offs_p < parts), other=0)
    rank = tl.load(ranks_ptr + held * parts + part, mask=(slot >= 0) & (part >= 0), other=0)
    b_at = b_ptr + (held * max_rank + offs_r)[None, :] * features + offs_n[:, None]
    return part, ranks, tl.load(b_at, mask=offs_r[None, :] < rank[:, None], other=0.0)


@triton.jit
def receive_rows(
    part,  # (block_n,), as ``find_adapter`` returned them
    ranks,  # (parts,)
    b,  # (block_n, block_r)
    words_ptr,  # (splits, parts * max_rank)
    number_ptr,
    low_rank: tl.constexpr,
    in_launch: tl.constexpr,
):
    """Wait for the token's v: ``B v``, (block_n,) float32."""
    parts: tl.constexpr = low_rank[0]
    max_rank: tl.constexpr = low_rank[1]
    splits: tl.constexpr = in_launch[1]
    max_polls: tl.constexpr = in_launch[4]
    offs_r = tl.arange(0, b.shape[1])
    offs_p = tl.arange(0, ranks.shape[0])
    offs_s = tl.arange(0, triton.next_power_of_2(splits))
    present = (offs_s < splits)[:, None, None] & (offs_p < parts)[None, :, None] & (offs_r < max_rank)[None, None, :]
    mask = present & (offs_r[None, :] < ranks[:, None])[None, :, :]
    at = (offs_p * max_rank)[:, None] + offs_r[None, :]
    words_at = words_ptr + offs_s[:, None, None] * (parts * max_rank) + at[None, :, :]
    launch = tl.load(number_ptr, volatile=True)
    words = tl.load(words_at, mask=present, other=0, volatile=True)
    v = tl.sum(receive_words(words, words_at, present, mask, launch, max_polls), axis=0)  # (parts, block_r)
    term = tl.zeros((b.shape[0],), dtype=tl.float32)
    for index in tl.static_range(parts):
        v_of_part = tl.sum(tl.where((offs_p == index)[:, None], v, 0.0), axis=0)
        term = tl.where(part == index, tl.sum(v_of_part[None, :] * b.to(tl.float32), axis=1), term)
    return term
