"""Paged prefill on Hopper, in Gluon: warp-specialised FlashAttention-3 over query tiles of prompts' chunks.

As FlashAttention-3 does it (Shah et al., 2024, arXiv:2407.08608), with pages of the KV cache in place of dense K and V:

1. A program has one producer warp and two consumer warpgroups. A query tile is 128 GQA-packed rows of one request and
   one KV head, numbered as in ``prefill``; each consumer has 64 of them. The grid is persistent: producers claim tiles,
   longest first (``hopper_tile_scheduler``).
2. The producer copies K and V pages through TMA into a ring of ``STAGES`` buffers each, guarded by ``full`` and
   ``empty`` mbarriers.
3. A consumer issues S = Q K^T of the next key tile together with O += P V of the last one (wgmma, asynchronous), and
   computes the softmax of the next while the second product runs. The consumers take turns at issuing (ping-pong), so
   that one computes exponentials while the tensor cores work for the other.
4. Key tiles are taken from the last to the first, so that the masked ones, on the diagonal, come first.

Grid: as many programs as SMs, or as query tiles if those are fewer.
Memory traffic: K and V of a request once for each of its query tiles and KV heads, mostly from the L2 cache; Q and the
output once. Bound by the tensor cores: 4 * head_dim operations a row and key.

The running softmax is that of ``online_softmax``, but for ``row_max``, which is kept unscaled here: scaling is a part
of the fused multiply-add before exp2.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from quire.plugins.attention.triton.hopper_tile_scheduler import BLOCK_M, claim_tile, publish_tile, receive_tile
from quire.plugins.attention.triton.online_softmax import LN2, LOG2E

__all__ = ["BLOCK_N", "hopper_prefill_kernel"]

BLOCK_N = gl.constexpr(128)
"""Keys of a tile."""
STAGES = gl.constexpr(2)
"""Buffers for K tiles, and for V tiles."""


@gluon.jit(do_not_specialize=["num_decodes", "num_reqs", "table_stride", "num_tiles"])
def hopper_prefill_kernel(
    q_ptr,  # (num_tokens, num_heads, head_dim)
    k_desc,  # (slots, head_dim), a page at a time
    v_desc,
    out_ptr,  # (num_tokens, num_heads, head_dim)
    lse_ptr,  # (num_tokens, num_heads) float32
    block_table_ptr,  # (num_reqs, max_blocks) int32
    seq_lens_ptr,  # (num_reqs,) int32
    query_start_ptr,  # (num_reqs + 1,) int32
    tile_counter_ptr,  # (1,) int32, 0 before and after: tiles that programs have claimed
    num_decodes,
    num_reqs,
    table_stride,
    num_tiles,  # at most: some of them have no rows
    k_stride_block,  # in rows of k_desc
    k_stride_head,
    v_stride_block,
    v_stride_head,
    q_stride_token: gl.constexpr,
    q_stride_head: gl.constexpr,
    out_stride_token: gl.constexpr,
    out_stride_head: gl.constexpr,
    has_lse: gl.constexpr,
    num_heads: gl.constexpr,
    group_size: gl.constexpr,
    block_size: gl.constexpr,
    head_dim: gl.constexpr,
    softmax_scale: gl.constexpr,
):
    """Grid: (SMs or query tiles, whichever are fewer,). Allocates shared memory and starts the warpgroups."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    q_smem = gl.allocate_shared_memory(dtype, [2, BLOCK_M // 2, head_dim], k_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, head_dim], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, head_dim], k_desc.layout)
    tile_smem = gl.allocate_shared_memory(gl.int32, [2 * 6, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    # A buffer is full when its TMA copies have arrived, and empty when both consumers have read it.
    k_full, k_empty = _allocate_barriers(STAGES, 1), _allocate_barriers(STAGES, 2)
    v_full, v_empty = _allocate_barriers(STAGES, 1), _allocate_barriers(STAGES, 2)
    tile_full, tile_empty = _allocate_barriers(2, 1), _allocate_barriers(2, 2)
    turns = _allocate_barriers(2, 1)  # ping-pong: one for each consumer, at which the other arrives
    keys, values, tile_queue = (k_smem, k_full, k_empty), (v_smem, v_full, v_empty), (tile_smem, tile_full, tile_empty)
    pointers = (q_ptr, out_ptr, lse_ptr)
    batch = (seq_lens_ptr, query_start_ptr, num_decodes, num_reqs)
    kv_strides = (k_stride_block, k_stride_head, v_stride_block, v_stride_head)
    gl.warp_specialize(
        [
            (_run_consumer, (pointers, q_smem, keys, values, tile_queue, turns, 0, q_stride_token, q_stride_head,
                             out_stride_token, out_stride_head, has_lse, num_heads, group_size, block_size, head_dim,
                             softmax_scale)),
            (_run_consumer, (pointers, q_smem, keys, values, tile_queue, turns, 1, q_stride_token, q_stride_head,
                             out_stride_token, out_stride_head, has_lse, num_heads, group_size, block_size, head_dim,
                             softmax_scale)),
            (_run_producer, (k_desc, v_desc, block_table_ptr, table_stride, tile_counter_ptr, num_tiles, batch,
                             kv_strides, keys, values, tile_queue, num_heads // group_size, group_size, block_size,
                             head_dim)),
        ],
        [4, 1],  # warps of the second consumer and of the producer
        [232, 40],  # registers of a thread of theirs; the first consumer has what is left, 232
    )  # fmt: skip


@gluon.jit
def _allocate_barriers(count: gl.constexpr, arrivals: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(count):
        mbarrier.init(barriers.index(i), count=arrivals)
    return barriers


@gluon.jit
def _run_producer(
    k_desc, v_desc, block_table_ptr, table_stride, tile_counter_ptr, num_tiles, batch, kv_strides, keys, values,
    tile_queue, num_kv_heads: gl.constexpr, group_size: gl.constexpr, block_size: gl.constexpr,
    head_dim: gl.constexpr,
):  # fmt: skip
    """The producer warp: claims a query tile, publishes it to the consumers, copies its keys and values."""
    k_stride_block, k_stride_head, v_stride_block, v_stride_head = kv_strides
    kv_iter = 0  # key tiles so far, of all query tiles: its position in the ring of buffers
    tile_iter = 0
    tile = claim_tile(tile_counter_ptr, num_tiles, batch, num_kv_heads, group_size)
    publish_tile(tile_queue, tile_iter, tile)
    while tile[6] > 0:  # kv_end; see hopper_tile_scheduler
        next_tile = tile
        kv_head = tile[1]
        table_ptr = block_table_ptr + tile[0].to(gl.int64) * table_stride
        last_block = (tile[5] + tile[3] - 1) // block_size
        num_kv_tiles = gl.cdiv(tile[6], BLOCK_N)
        for i in range(num_kv_tiles):
            blocks = ()
            for j in gl.static_range(BLOCK_N // block_size):
                entry = (num_kv_tiles - 1 - i) * (BLOCK_N // block_size) + j
                # Pages beyond the request's last repeat it: finite or not, the masks see to them.
                blocks = blocks + (gl.load(table_ptr + gl.minimum(entry, last_block)),)  # type: ignore[assignment]  # noqa: RUF005
            _copy_pages(k_desc, keys, blocks, k_stride_block, kv_head * k_stride_head, kv_iter, block_size, head_dim)
            _copy_pages(v_desc, values, blocks, v_stride_block, kv_head * v_stride_head, kv_iter, block_size, head_dim)
            kv_iter += 1
            if i == 0:  # the next tile is claimed early, so that consumers need not wait for it
                tile_iter += 1
                next_tile = claim_tile(tile_counter_ptr, num_tiles, batch, num_kv_heads, group_size)
                publish_tile(tile_queue, tile_iter, next_tile)
        tile = next_tile


@gluon.jit
def _copy_pages(
    desc, buffers, blocks, stride_block, head_row, kv_iter, block_size: gl.constexpr, head_dim: gl.constexpr
):
    """Copy the pages of a tile's keys or values to the next buffer, once it is empty."""
    smem, full, empty = buffers
    stage = kv_iter % STAGES
    # The parity of the phase: it alternates every time the ring comes round; the first round waits for nothing.
    mbarrier.wait(empty.index(stage), (kv_iter // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(stage), BLOCK_N * head_dim * 2)
    for j in gl.static_range(BLOCK_N // block_size):
        page_smem = smem.index(stage).slice(j * block_size, block_size, 0)
        tma.async_copy_global_to_shared(desc, [blocks[j] * stride_block + head_row, 0], full.index(stage), page_smem)


@gluon.jit
def _run_consumer(
    pointers, q_smem, keys, values, tile_queue, turns, consumer: gl.constexpr, q_stride_token: gl.constexpr,
    q_stride_head: gl.constexpr, out_stride_token: gl.constexpr, out_stride_head: gl.constexpr, has_lse: gl.constexpr,
    num_heads: gl.constexpr, group_size: gl.constexpr, block_size: gl.constexpr, head_dim: gl.constexpr,
    softmax_scale: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup: the first (``consumer`` 0) or the second 64 rows of each query tile."""
    q_ptr, out_ptr, lse_ptr = pointers
    v_smem, v_full, v_empty = values
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    half: gl.constexpr = BLOCK_M // 2
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, head_dim, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)  # P stays in registers, as wgmma's first operand
    io_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // head_dim, head_dim // 8], [4, 1], [1, 0])
    my_q_smem = q_smem.index(consumer)
    kv_iter = 0
    tile_iter = 0
    tile = receive_tile(tile_queue, tile_iter)
    q_offs, q_mask = _get_row_offsets(tile, consumer, q_stride_token, q_stride_head, group_size, head_dim, io_layout)
    q = gl.load(q_ptr + q_offs, mask=q_mask, other=0.0)
    while tile[5] > 0:
        kv_head, query_start, query_len, row_start, context_len, kv_end = tile
        my_q_smem.store(q)
        fence_async_shared()  # wgmma reads shared memory through the asynchronous proxy
        row = row_start + consumer * half + gl.arange(0, half, layout=gl.SliceLayout(1, s_layout))
        position = context_len + row // group_size
        num_kv_tiles = gl.cdiv(kv_end, BLOCK_N)
        first_key = (num_kv_tiles - 1) * BLOCK_N
        row_max = gl.full([half], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
        row_sum = gl.zeros([half], gl.float32, gl.SliceLayout(1, s_layout))
        acc = gl.zeros([half, head_dim], gl.float32, o_layout)
        # Prologue: the last key tile has no product with values of a tile before it to overlap with.
        s = _issue_qk(my_q_smem, keys, turns, kv_iter, consumer)
        mbarrier.arrive(turns.index(1 - consumer), count=1)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(keys[2].index(kv_iter % STAGES), count=1)
        p, _alpha, row_max, row_sum = _update_softmax(s, row_max, row_sum, first_key, position, softmax_scale, True)
        p = gl.convert_layout(p.to(dtype), p_layout)
        if first_key + BLOCK_N > context_len + query_len:
            mbarrier.wait(v_full.index(kv_iter % STAGES), kv_iter // STAGES & 1)
            valid_keys = context_len + query_len - first_key
            _zero_values_beyond(v_smem.index(kv_iter % STAGES), valid_keys, block_size, io_layout)
        # Tiles of which every row sees all keys; the masked ones, after the prologue's, come first.
        num_unmasked = gl.minimum((context_len + row_start // group_size + 1) // BLOCK_N, num_kv_tiles - 1)
        kv_iter += 1
        for _ in range(num_kv_tiles - 1 - num_unmasked):
            first_key -= BLOCK_N
            p, acc, row_max, row_sum = _attend_kv_tile(
                my_q_smem, keys, values, turns, p, acc, row_max, row_sum, kv_iter, first_key, position, consumer,
                softmax_scale, True,
            )  # fmt: skip
            kv_iter += 1
        for _ in range(num_unmasked):
            first_key -= BLOCK_N
            p, acc, row_max, row_sum = _attend_kv_tile(
                my_q_smem, keys, values, turns, p, acc, row_max, row_sum, kv_iter, first_key, position, consumer,
                softmax_scale, False,
            )  # fmt: skip
            kv_iter += 1
        # Epilogue: the next query tile's q is under way while this one's last product with values runs.
        tile_iter += 1
        next_tile = receive_tile(tile_queue, tile_iter)
        q_offs, q_mask = _get_row_offsets(
            next_tile, consumer, q_stride_token, q_stride_head, group_size, head_dim, io_layout
        )
        q = gl.load(q_ptr + q_offs, mask=q_mask, other=0.0)
        stage = (kv_iter - 1) % STAGES
        mbarrier.wait(v_full.index(stage), (kv_iter - 1) // STAGES & 1)
        acc = warpgroup_mma(p, v_smem.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index(stage), count=1)
        result = acc * (1.0 / gl.convert_layout(row_sum, gl.SliceLayout(1, o_layout)))[:, None]
        # Through q's shared memory, which is free now, from the layout of wgmma to one that stores whole rows.
        my_q_smem.store(result.to(dtype))
        out_offs, out_mask = _get_row_offsets(
            tile, consumer, out_stride_token, out_stride_head, group_size, head_dim, io_layout
        )
        gl.store(out_ptr + out_offs, my_q_smem.load(io_layout), mask=out_mask)
        if has_lse:
            token = query_start + row // group_size
            lse_ptrs = lse_ptr + (token.to(gl.int64) * num_heads + kv_head * group_size + row % group_size)
            lse = (row_max * (softmax_scale * LOG2E) + gl.log2(row_sum)) * LN2
            gl.store(lse_ptrs, lse, mask=row // group_size < query_len)
        tile = next_tile


@gluon.jit
def _get_row_offsets(
    tile, consumer: gl.constexpr, stride_token: gl.constexpr, stride_head: gl.constexpr, group_size: gl.constexpr,
    head_dim: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """(offsets (64, head_dim), mask (64, 1)) of one consumer's rows of a tile, in the queries or the output."""
    row = tile[3] + consumer * (BLOCK_M // 2) + gl.arange(0, BLOCK_M // 2, layout=gl.SliceLayout(1, layout))
    token = row // group_size
    offs_d = gl.arange(0, head_dim, layout=gl.SliceLayout(0, layout))
    row_offs = (tile[1] + token).to(gl.int64) * stride_token + (tile[0] * group_size + row % group_size) * stride_head
    return row_offs[:, None] + offs_d[None, :], (token < tile[2])[:, None]


@gluon.jit
def _zero_values_beyond(values, num_keys, block_size: gl.constexpr, layout: gl.constexpr):
    """Zero the values of a tile from ``num_keys`` on: they may be anything, and a weight of 0 times NaN is NaN. Both
    consumers do it, since neither may wait for the other: they write the same."""
    slot = gl.arange(0, block_size, layout=gl.SliceLayout(1, layout))
    for j in gl.static_range(BLOCK_N // block_size):
        if (j + 1) * block_size > num_keys:
            page = values.slice(j * block_size, block_size, 0)
            page.store(gl.where((j * block_size + slot < num_keys)[:, None], page.load(layout), 0.0))
    fence_async_shared()


@gluon.jit
def _issue_qk(q_smem, keys, turns, kv_iter, consumer: gl.constexpr):
    """Issue S = Q K^T of a key tile, once it is there and it is this consumer's turn."""
    smem, full, _ = keys
    stage = kv_iter % STAGES
    mbarrier.wait(full.index(stage), kv_iter // STAGES & 1)
    mbarrier.wait(turns.index(consumer), (kv_iter & 1) ^ (1 - consumer))
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    zero = gl.zeros([BLOCK_M // 2, BLOCK_N], gl.float32, layout)
    return warpgroup_mma(q_smem, smem.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _attend_kv_tile(
    q_smem, keys, values, turns, p, acc, row_max, row_sum, kv_iter, first_key, position, consumer: gl.constexpr,
    softmax_scale: gl.constexpr, is_masked: gl.constexpr,
):  # fmt: skip
    """The products with this tile's keys and the last tile's values, and the softmax of this tile meanwhile."""
    v_smem, v_full, v_empty = values
    s = _issue_qk(q_smem, keys, turns, kv_iter, consumer)
    last_stage = (kv_iter - 1) % STAGES
    mbarrier.wait(v_full.index(last_stage), (kv_iter - 1) // STAGES & 1)
    acc = warpgroup_mma(p, v_smem.index(last_stage), acc, is_async=True)
    mbarrier.arrive(turns.index(1 - consumer), count=1)
    s = warpgroup_mma_wait(1, deps=[s])  # S is done, O may still run
    mbarrier.arrive(keys[2].index(kv_iter % STAGES), count=1)
    weight, alpha, row_max, row_sum = _update_softmax(
        s, row_max, row_sum, first_key, position, softmax_scale, is_masked
    )
    # Never stored, but the assembler moves the wait below no further up than this: not above the exponentials.
    row_sum = gl.inline_asm_elementwise(
        "{ .reg .pred n; .reg .b32 a; mov.b32 a, $1; setp.lt.f32 n, $1, 0f00000000; @n st.shared.b32 [a], a;"
        " mov.f32 $0, $1; }",
        "=f,f",
        [row_sum],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    mbarrier.arrive(v_empty.index(last_stage), count=1)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
    return gl.convert_layout(weight.to(p.dtype), p.type.layout), acc, row_max, row_sum


@gluon.jit
def _update_softmax(s, row_max, row_sum, first_key, position, softmax_scale: gl.constexpr, is_masked: gl.constexpr):
    """(P, alpha, row_max, row_sum): the tile's weights, and what earlier results shrink by."""
    if is_masked:
        key = first_key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, s.type.layout))
        s = gl.where(key[None, :] <= position[:, None], s, float("-inf"))
    new_max = gl.maximum(row_max, gl.max(s, 1))
    safe_max = new_max * (softmax_scale * LOG2E)
    if is_masked:  # a row that has seen nothing yet: subtracting zero gives 0, not NaN
        safe_max = gl.where(new_max == float("-inf"), 0.0, safe_max)
    weight = gl.exp2(s * (softmax_scale * LOG2E) - safe_max[:, None])
    alpha = gl.exp2(row_max * (softmax_scale * LOG2E) - safe_max)
    return weight, alpha, new_max, row_sum * alpha + gl.sum(weight, 1)
