"""Attention of prompts on Hopper: as ``prefill``, with warps that load and warps that multiply.

Two groups of four warps have 64 query rows each; one warp brings pages of keys and values to shared memory through
TMA, ahead of both. A group starts the product with the next keys and the one with the last values before it weighs,
and the groups take turns at the tensor cores, so that these work while exponentials are taken (Shah et al., 2024,
arXiv:2407.08608). Tiles of keys are taken from the last to the first: only the first ones need masks.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from quire.core.contracts.attention import AttentionBatch, AttentionSpec, LayerKV

__all__ = ["hopper_kernel", "hopper_prefill"]


def hopper_prefill(
    spec: AttentionSpec,
    batch: AttentionBatch,
    q: Tensor,
    kv: LayerKV,
    out: Tensor,
    lse_out: Tensor | None,
    **options: Any,
) -> None:
    """Attend for the requests after the decodes. Tensors as in ``AttentionBackend.run``."""
    options = {"keys": 128, "stages": 2, "pingpong": True, "hold": True, "packed": True, "processors": 132, "registers": 232, "spare": 40} | options
    spare, processors, drawn = options.pop("spare"), options.pop("processors"), options.pop("drawn")
    requests = batch.num_reqs - batch.num_decodes
    tokens = batch.num_tokens - batch.num_decodes * batch.decode_query_len
    group = spec.num_heads // spec.num_kv_heads
    tiles = spec.num_kv_heads * (tokens * group // 128 + requests)
    page, dim = spec.block_size, spec.qk_head_dim
    hopper_kernel[(min(tiles, processors),)](
        q,
        rows_of(kv.k),
        rows_of(kv.v),
        out,
        out if lse_out is None else lse_out,
        batch.block_table,
        batch.seq_lens,
        batch.query_start_loc,
        drawn,
        batch.num_decodes,
        batch.num_reqs,
        batch.block_table.stride(0),
        tiles,
        q_token=q.stride(0),
        q_head=q.stride(1),
        k_block=kv.k.stride(0) // kv.k.stride(2),
        k_head=kv.k.stride(1) // kv.k.stride(2),
        v_block=kv.v.stride(0) // kv.v.stride(2),
        v_head=kv.v.stride(1) // kv.v.stride(2),
        out_token=out.stride(0),
        out_head=out.stride(1),
        has_lse=lse_out is not None,
        heads=spec.num_heads,
        kv_heads=spec.num_kv_heads,
        group=group,
        page=page,
        dim=dim,
        scale=spec.scale * 1.4426950408889634,
        spare=spare,
        num_warps=4,
        maxnreg=168,
        **options,
    )


def rows_of(cache: Tensor) -> TensorDescriptor:
    """Slots of a cache as rows: (blocks * heads * slots and what lies between, dim), in boxes of a page."""
    blocks, _, page, dim = cache.shape
    row = cache.stride(2)
    count = (blocks - 1) * (cache.stride(0) // row) + cache.shape[1] * page
    layout = gl.NVMMASharedLayout(128, element_bitwidth=16, rank=2)
    return TensorDescriptor(cache, [count, dim], [row, 1], [page, dim], layout)


@gluon.jit
def _first_tile(start, base, ordinal, group: gl.constexpr):
    """Where a request's tiles begin: room for every tile before it, whatever the rounding."""
    return (start - base) * group // 128 + ordinal


@gluon.jit
def _tile(index, total, where, kv_heads: gl.constexpr, group: gl.constexpr):
    """(request, KV head, start, queries, first row, context, end of keys) of a tile; end 0: there is none.

    A prompt's last tiles have the most keys, so they go first.
    """
    start_ptr, seq_lens_ptr, num_decodes, num_reqs = where
    some = index < total
    index = gl.minimum(index, total - 1)
    kv_head = index % kv_heads
    index = (total - 1 - index) // kv_heads
    base = gl.load(start_ptr + num_decodes)
    left = num_decodes
    right = num_reqs
    while right - left > 1:
        middle = (left + right) // 2
        begins = _first_tile(gl.load(start_ptr + middle), base, middle - num_decodes, group) <= index
        left = gl.where(begins, middle, left)
        right = gl.where(begins, right, middle)
    start = gl.load(start_ptr + left)
    queries = gl.load(start_ptr + left + 1) - start
    row0 = (index - _first_tile(start, base, left - num_decodes, group)) * 128
    context = gl.load(seq_lens_ptr + left) - queries
    high = gl.minimum(context + (row0 + 127) // group + 1, context + queries)
    high = gl.where(some & (row0 < queries * group), high, 0)
    return left, kv_head, start, queries, row0, context, high


@gluon.jit
def _bring(
    k_rows,
    v_rows,
    table_ptr,
    table_row,
    drawn_ptr,
    where,
    buffers,
    barriers,
    total,
    kv_heads: gl.constexpr,
    group: gl.constexpr,
    page: gl.constexpr,
    dim: gl.constexpr,
    keys: gl.constexpr,
    stages: gl.constexpr,
    k_block,
    k_head,
    v_block,
    v_head,
):
    """The warp that loads. It draws the program's next tile and passes it on; who draws last clears the counter."""
    k_buffers, v_buffers, _, tickets = buffers
    k_full, v_full, k_free, v_free, _, told, heard = barriers
    filled = 0
    given = 0
    request, kv_head, start, queries, row0, context, high = _draw(drawn_ptr, total, where, kv_heads, group)
    _tell(tickets, told, heard, given, kv_head, start, queries, row0, context, high)
    while high > 0:
        after = request, kv_head, start, queries, row0, context, high
        row = table_ptr + request.to(gl.int64) * table_row
        last = (context + queries - 1) // page
        tiles = gl.cdiv(high, keys)
        for i in range(tiles):
            first = (tiles - 1 - i) * (keys // page)
            stage = filled % stages
            phase = filled // stages & 1
            blocks = ()
            for j in gl.static_range(keys // page):
                blocks = blocks + (gl.load(row + gl.minimum(first + j, last)),)
            mbarrier.wait(k_free.index(stage), phase ^ 1)
            mbarrier.expect(k_full.index(stage), keys * dim * 2)
            for j in gl.static_range(keys // page):
                tma.async_copy_global_to_shared(
                    k_rows,
                    [blocks[j] * k_block + kv_head * k_head, 0],
                    k_full.index(stage),
                    k_buffers.index(stage).slice(j * page, page, 0),
                )
            mbarrier.wait(v_free.index(stage), phase ^ 1)
            mbarrier.expect(v_full.index(stage), keys * dim * 2)
            for j in gl.static_range(keys // page):
                tma.async_copy_global_to_shared(
                    v_rows,
                    [blocks[j] * v_block + kv_head * v_head, 0],
                    v_full.index(stage),
                    v_buffers.index(stage).slice(j * page, page, 0),
                )
            filled += 1
            if i == 0:
                given += 1
                after = _draw(drawn_ptr, total, where, kv_heads, group)
                _tell(tickets, told, heard, given, after[1], after[2], after[3], after[4], after[5], after[6])
        request, kv_head, start, queries, row0, context, high = after


@gluon.jit
def _draw(drawn_ptr, total, where, kv_heads: gl.constexpr, group: gl.constexpr):
    """The next tile that nobody has, as from ``_tile``. Who draws last clears the counter."""
    index = gl.atomic_add(drawn_ptr, 1, sem="relaxed")
    request, kv_head, start, queries, row0, context, high = _tile(index, total, where, kv_heads, group)
    while (high == 0) & (index < total):
        index = gl.atomic_add(drawn_ptr, 1, sem="relaxed")
        request, kv_head, start, queries, row0, context, high = _tile(index, total, where, kv_heads, group)
    if index == total + gl.num_programs(0) - 1:
        gl.atomic_xchg(drawn_ptr, 0, sem="relaxed")
    return request, kv_head, start, queries, row0, context, high


@gluon.jit
def _tell(tickets, told, heard, given, kv_head, start, queries, row0, context, high):
    """Pass a tile on to the groups that multiply; one without keys ends their work."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    slot = given % 2
    mbarrier.wait(heard.index(slot), (given // 2 & 1) ^ 1)
    tickets.index(6 * slot).store(gl.full([1], kv_head, gl.int32, one))
    tickets.index(6 * slot + 1).store(gl.full([1], start, gl.int32, one))
    tickets.index(6 * slot + 2).store(gl.full([1], queries, gl.int32, one))
    tickets.index(6 * slot + 3).store(gl.full([1], row0, gl.int32, one))
    tickets.index(6 * slot + 4).store(gl.full([1], context, gl.int32, one))
    tickets.index(6 * slot + 5).store(gl.full([1], high, gl.int32, one))
    mbarrier.arrive(told.index(slot), count=1)


@gluon.jit
def _hear(tickets, told, heard, given):
    """(KV head, start, queries, first row, context, end of keys) of the next tile."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    slot = given % 2
    mbarrier.wait(told.index(slot), given // 2 & 1)
    kv_head = gl.sum(tickets.index(6 * slot).load(one), 0)
    start = gl.sum(tickets.index(6 * slot + 1).load(one), 0)
    queries = gl.sum(tickets.index(6 * slot + 2).load(one), 0)
    row0 = gl.sum(tickets.index(6 * slot + 3).load(one), 0)
    context = gl.sum(tickets.index(6 * slot + 4).load(one), 0)
    high = gl.sum(tickets.index(6 * slot + 5).load(one), 0)
    mbarrier.arrive(heard.index(slot), count=1)
    return kv_head, start, queries, row0, context, high


@gluon.jit
def _queries(
    q_ptr, kv_head, start, queries, row0, q_token: gl.constexpr, q_head: gl.constexpr, group: gl.constexpr,
    dim: gl.constexpr, wide: gl.constexpr,
):  # fmt: skip
    """(64, dim) from ``row0`` on."""
    row = row0 + gl.arange(0, 64, layout=gl.SliceLayout(1, wide))
    token = row // group
    d = gl.arange(0, dim, layout=gl.SliceLayout(0, wide))
    q_at = (start + token).to(gl.int64) * q_token + (kv_head * group + row % group) * q_head
    return gl.load(q_ptr + q_at[:, None] + d[None, :], mask=(token < queries)[:, None], other=0.0)


@gluon.jit
def _weigh(s, peak, mass, first_key, position, scale: gl.constexpr, masked: gl.constexpr, keys: gl.constexpr):
    """The running softmax: (weights, what earlier sums shrink by, peak, mass); the peak is of unscaled products."""
    if masked:
        key = first_key + gl.arange(0, keys, layout=gl.SliceLayout(0, s.type.layout))
        s = gl.where(key[None, :] <= position[:, None], s, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(s, 1))
    base = new_peak * scale
    if masked:
        base = gl.where(new_peak == float("-inf"), 0.0, base)
    p = gl.exp2(s * scale - base[:, None])
    shrink = gl.exp2(peak * scale - base)
    return p, shrink, new_peak, mass * shrink + gl.sum(p, 1)


@gluon.jit
def _start_product(
    q, buffers, barriers, used, group_index: gl.constexpr, keys: gl.constexpr, stages: gl.constexpr,
    pingpong: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Start the product of queries and the keys of a tile, when these are there and it is this group's turn."""
    k_full = barriers[0]
    order = barriers[4]
    stage = used % stages
    mbarrier.wait(k_full.index(stage), used // stages & 1)
    if pingpong:
        mbarrier.wait(order.index(group_index), (used & 1) ^ (1 - group_index))
    zero = gl.zeros([64, keys], gl.float32, layout)
    return warpgroup_mma(q, buffers[0].index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _turn(
    q, p, acc, peak, mass, buffers, barriers, used, first_key, position, masked: gl.constexpr,
    scale: gl.constexpr, group_index: gl.constexpr, keys: gl.constexpr, stages: gl.constexpr,
    pingpong: gl.constexpr, hold: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Add the values of the tile before, weigh the keys of this one."""
    s = _start_product(q, buffers, barriers, used, group_index, keys, stages, pingpong, layout)
    before = (used - 1) % stages
    mbarrier.wait(barriers[1].index(before), (used - 1) // stages & 1)
    acc = warpgroup_mma(p, buffers[1].index(before), acc, is_async=True)
    if pingpong:
        mbarrier.arrive(barriers[4].index(1 - group_index), count=1)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(barriers[2].index(used % stages), count=1)
    weight, shrink, peak, mass = _weigh(s, peak, mass, first_key, position, scale, masked, keys)
    if hold:
        # Never taken, but keeps the assembler from moving the wait below up, before the exponentials.
        mass = gl.inline_asm_elementwise(
            "{ .reg .pred n; .reg .b32 a; mov.b32 a, $1; setp.lt.f32 n, $1, 0f00000000; @n st.shared.b32 [a], a; mov.f32 $0, $1; }",
            "=f,f", [mass], dtype=gl.float32, is_pure=False, pack=1,
        )  # fmt: skip
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    mbarrier.arrive(barriers[3].index(before), count=1)
    acc = acc * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout)), 1)
    p = gl.convert_layout(weight.to(p.dtype), p.type.layout)
    return p, acc, peak, mass


@gluon.jit
def _attend(
    q_ptr,
    out_ptr,
    lse_ptr,
    buffers,
    barriers,
    group_index: gl.constexpr,
    q_token: gl.constexpr,
    q_head: gl.constexpr,
    out_token: gl.constexpr,
    out_head: gl.constexpr,
    has_lse: gl.constexpr,
    heads: gl.constexpr,
    group: gl.constexpr,
    page: gl.constexpr,
    dim: gl.constexpr,
    keys: gl.constexpr,
    stages: gl.constexpr,
    scale: gl.constexpr,
    pingpong: gl.constexpr,
    hold: gl.constexpr,
    packed: gl.constexpr,
):
    """A group of warps that multiply: 64 of a tile's 128 rows."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    chunks: gl.constexpr = dim // 8
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, keys, 16])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, dim, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [32 // chunks, chunks], [4, 1], [1, 0])
    q_smem = buffers[2].index(group_index)
    tickets = buffers[3]
    used = 0
    heard = 0
    kv_head, start, queries, row0, context, high = _hear(tickets, barriers[5], barriers[6], heard)
    q = _queries(
        q_ptr, kv_head, start, queries, row0 + group_index * 64, q_token, q_head, group, dim, wide
    )
    while high > 0:
        q_smem.store(q)
        fence_async_shared()
        position = context + (row0 + group_index * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, s_layout))) // group
        tiles = gl.cdiv(high, keys)
        first_key = (tiles - 1) * keys
        peak = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
        mass = gl.zeros([64], gl.float32, gl.SliceLayout(1, s_layout))
        acc = gl.zeros([64, dim], gl.float32, layout)
        s = _start_product(q_smem, buffers, barriers, used, group_index, keys, stages, pingpong, s_layout)
        if pingpong:
            mbarrier.arrive(barriers[4].index(1 - group_index), count=1)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(barriers[2].index(used % stages), count=1)
        weight, shrink, peak, mass = _weigh(s, peak, mass, first_key, position, scale, True, keys)
        p = gl.convert_layout(weight.to(dtype), p_layout)
        # Slots behind the request's end may hold anything, NaN included.
        if first_key + keys > context + queries:
            stage = used % stages
            mbarrier.wait(barriers[1].index(stage), used // stages & 1)
            slot = gl.arange(0, page, layout=gl.SliceLayout(1, wide))
            for j in gl.static_range(keys // page):
                if first_key + (j + 1) * page > context + queries:
                    part = buffers[1].index(stage).slice(j * page, page, 0)
                    value = part.load(wide)
                    real = first_key + j * page + slot < context + queries
                    part.store(gl.where(real[:, None], value, 0.0))
            fence_async_shared()
        # Keys below ``shared`` are seen by every row.
        shared = (context + row0 // group + 1) // keys
        used += 1
        for i in range(tiles - 1 - gl.minimum(shared, tiles - 1)):
            first_key -= keys
            p, acc, peak, mass = _turn(
                q_smem, p, acc, peak, mass, buffers, barriers, used, first_key, position, True,
                scale, group_index, keys, stages, pingpong, hold, s_layout,
            )  # fmt: skip
            used += 1
        for i in range(gl.minimum(shared, tiles - 1)):
            p, acc, peak, mass = _turn(
                q_smem, p, acc, peak, mass, buffers, barriers, used, first_key, position, False,
                scale, group_index, keys, stages, pingpong, hold, s_layout,
            )  # fmt: skip
            used += 1
        # The next tile's queries are on their way while this tile ends.
        heard += 1
        after = _hear(tickets, barriers[5], barriers[6], heard)
        q = _queries(
            q_ptr, after[0], after[1], after[2], after[3] + group_index * 64, q_token, q_head, group, dim, wide
        )
        stage = (used - 1) % stages
        mbarrier.wait(barriers[1].index(stage), (used - 1) // stages & 1)
        acc = warpgroup_mma(p, buffers[1].index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(barriers[3].index(stage), count=1)
        total_mass = gl.convert_layout(mass, gl.SliceLayout(1, layout))
        result = (acc * (1.0 / total_mass)[:, None]).to(dtype)
        row = row0 + group_index * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
        token = row // group
        head = kv_head * group + row % group
        if has_lse:
            lse = gl.convert_layout(peak, gl.SliceLayout(1, layout)) * scale + gl.log2(total_mass)
            lse_at = (start + token).to(gl.int64) * heads + head
            gl.store(lse_ptr + lse_at, lse * 0.6931471805599453, mask=token < queries)
        if packed:
            q_smem.store(result)
            row = row0 + group_index * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, wide))
            token = row // group
            head = kv_head * group + row % group
            e = gl.arange(0, dim, layout=gl.SliceLayout(0, wide))
            out_at = (start + token).to(gl.int64) * out_token + head * out_head
            gl.store(out_ptr + out_at[:, None] + e[None, :], q_smem.load(wide), mask=(token < queries)[:, None])
        else:
            e = gl.arange(0, dim, layout=gl.SliceLayout(0, layout))
            out_at = (start + token).to(gl.int64) * out_token + head * out_head
            gl.store(out_ptr + out_at[:, None] + e[None, :], result, mask=(token < queries)[:, None])
        kv_head, start, queries, row0, context, high = after


@gluon.jit(do_not_specialize=["num_decodes", "num_reqs", "table_row", "total"])
def hopper_kernel(
    q_ptr,  # (num_tokens, heads, dim)
    k_rows,  # (slots of the pool, dim), a page at a time
    v_rows,
    out_ptr,  # (num_tokens, heads, dim)
    lse_ptr,  # (num_tokens, heads) float32
    table_ptr,  # (num_reqs, max_blocks) int32
    seq_lens_ptr,  # (num_reqs,) int32
    start_ptr,  # (num_reqs + 1,) int32
    drawn_ptr,  # (1,) int32, 0: tiles that programs have drawn
    num_decodes,
    num_reqs,
    table_row,
    total,
    q_token: gl.constexpr,
    q_head: gl.constexpr,
    k_block,
    k_head,
    v_block,
    v_head,
    out_token: gl.constexpr,
    out_head: gl.constexpr,
    has_lse: gl.constexpr,
    heads: gl.constexpr,
    kv_heads: gl.constexpr,
    group: gl.constexpr,
    page: gl.constexpr,
    dim: gl.constexpr,
    scale: gl.constexpr,
    keys: gl.constexpr,
    stages: gl.constexpr,
    pingpong: gl.constexpr,
    hold: gl.constexpr,
    packed: gl.constexpr,
    registers: gl.constexpr,
    spare: gl.constexpr,
):
    """Grid: as many programs as multiprocessors, each with every so many-th tile, or one a tile."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    shared: gl.constexpr = k_rows.layout
    q_buffers = gl.allocate_shared_memory(dtype, [2, 64, dim], shared)
    k_buffers = gl.allocate_shared_memory(dtype, [stages, keys, dim], shared)
    v_buffers = gl.allocate_shared_memory(dtype, [stages, keys, dim], shared)
    k_full = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    order = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(stages):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)
    tickets = gl.allocate_shared_memory(gl.int32, [12, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    told = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    heard = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(order.index(i), count=1)
        mbarrier.init(told.index(i), count=1)
        mbarrier.init(heard.index(i), count=2)
    barriers = (k_full, v_full, k_free, v_free, order, told, heard)
    buffers = (k_buffers, v_buffers, q_buffers, tickets)
    where = (start_ptr, seq_lens_ptr, num_decodes, num_reqs)
    gl.warp_specialize(
        [
            (
                _attend,
                (
                    q_ptr, out_ptr, lse_ptr, buffers, barriers, 0, q_token, q_head,
                    out_token, out_head, has_lse, heads, group, page, dim, keys, stages, scale, pingpong, hold, packed,
                ),
            ),
            (
                _attend,
                (
                    q_ptr, out_ptr, lse_ptr, buffers, barriers, 1, q_token, q_head,
                    out_token, out_head, has_lse, heads, group, page, dim, keys, stages, scale, pingpong, hold, packed,
                ),
            ),
            (
                _bring,
                (
                    k_rows, v_rows, table_ptr, table_row, drawn_ptr, where, buffers, barriers, total, kv_heads, group, page,
                    dim, keys, stages, k_block, k_head, v_block, v_head,
                ),
            ),
        ],
        [4, 1],
        [registers, spare],
    )  # fmt: skip
