"""The kernel for prompts on Hopper: one warp loads, two groups of four warps multiply 64 rows of a tile's 128 each.

As FlashAttention-3 does it (Shah et al., 2024, arXiv:2407.08608): pages come to shared memory through TMA, ahead of
those who read them; a group starts the product with the next keys and the one with the last values, and takes
exponentials while the tensor cores work; the groups take turns at these. Keys are taken from the last tile to the
first, so that only the first ones need masks. Programs draw tiles, longest first, until there are none.

Rows, and what the softmax carries, are as in ``prefill`` and ``tile``, but for the peak, which is not scaled here.
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

from quire.plugins.attention.triton.tile import LN2, LOG2E

__all__ = ["KEYS", "ROWS", "hopper_kernel"]

ROWS = gl.constexpr(128)
KEYS = gl.constexpr(128)
STAGES = gl.constexpr(2)


@gluon.jit(do_not_specialize=["num_decodes", "num_reqs", "table_row", "tiles"])
def hopper_kernel(
    q_ptr,  # (num_tokens, heads, dim)
    k_rows,  # (slots, dim), a page at a time
    v_rows,
    out_ptr,  # (num_tokens, heads, dim)
    lse_ptr,  # (num_tokens, heads) float32
    table_ptr,  # (num_reqs, max_blocks) int32
    seq_lens_ptr,  # (num_reqs,) int32
    start_ptr,  # (num_reqs + 1,) int32
    drawn_ptr,  # (1,) int32, 0 before and after: tiles that programs have drawn
    num_decodes,
    num_reqs,
    table_row,
    tiles,  # at most
    k_block,  # rows from one block to the next
    k_head,
    v_block,
    v_head,
    q_token: gl.constexpr,
    q_head: gl.constexpr,
    out_token: gl.constexpr,
    out_head: gl.constexpr,
    has_lse: gl.constexpr,
    heads: gl.constexpr,
    group: gl.constexpr,
    page: gl.constexpr,
    dim: gl.constexpr,
    scale: gl.constexpr,
):
    """Grid: as many programs as run at once, or as there are tiles."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    q_smem = gl.allocate_shared_memory(dtype, [2, ROWS // 2, dim], k_rows.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, KEYS, dim], k_rows.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, KEYS, dim], k_rows.layout)
    words = gl.allocate_shared_memory(gl.int32, [2 * 6, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    k_full, k_free = _barriers(STAGES, 1), _barriers(STAGES, 2)
    v_full, v_free = _barriers(STAGES, 1), _barriers(STAGES, 2)
    told, heard = _barriers(2, 1), _barriers(2, 2)
    turns = _barriers(2, 1)
    keys, values, queue = (k_smem, k_full, k_free), (v_smem, v_full, v_free), (words, told, heard)
    pointers = (q_ptr, out_ptr, lse_ptr)
    where = (seq_lens_ptr, start_ptr, num_decodes, num_reqs)
    strides = (k_block, k_head, v_block, v_head)
    gl.warp_specialize(
        [
            (_attend, (pointers, q_smem, keys, values, queue, turns, 0,
                       q_token, q_head, out_token, out_head, has_lse, heads, group, page, dim, scale)),
            (_attend, (pointers, q_smem, keys, values, queue, turns, 1,
                       q_token, q_head, out_token, out_head, has_lse, heads, group, page, dim, scale)),
            (_load, (k_rows, v_rows, table_ptr, table_row, drawn_ptr, tiles, where, strides, keys, values, queue,
                     heads // group, group, page, dim)),
        ],
        [4, 1],
        [232, 40],  # registers of a thread; the first group has what is left, 232
    )  # fmt: skip


@gluon.jit
def _barriers(count: gl.constexpr, arrivals: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(count):
        mbarrier.init(barriers.index(i), count=arrivals)
    return barriers


@gluon.jit
def _load(
    k_rows, v_rows, table_ptr, table_row, drawn_ptr, tiles, where, strides, keys, values, queue,
    kv_heads: gl.constexpr, group: gl.constexpr, page: gl.constexpr, dim: gl.constexpr,
):  # fmt: skip
    """The warp that loads: draws a tile, tells the others, brings its keys and values."""
    k_block, k_head, v_block, v_head = strides
    used = 0
    drawn = 0
    tile = _draw(drawn_ptr, tiles, where, kv_heads, group)
    _tell(queue, drawn, tile)
    while tile[6] > 0:
        following = tile
        kv_head = tile[1]
        table = table_ptr + tile[0].to(gl.int64) * table_row
        last = (tile[5] + tile[3] - 1) // page
        count = gl.cdiv(tile[6], KEYS)
        for i in range(count):
            blocks = ()
            for j in gl.static_range(KEYS // page):
                at = (count - 1 - i) * (KEYS // page) + j
                blocks = blocks + (gl.load(table + gl.minimum(at, last)),)  # type: ignore[assignment]  # noqa: RUF005
            _bring(k_rows, keys, blocks, k_block, kv_head * k_head, used, page, dim)
            _bring(v_rows, values, blocks, v_block, kv_head * v_head, used, page, dim)
            used += 1
            if i == 0:  # early, so that nobody waits for it
                drawn += 1
                following = _draw(drawn_ptr, tiles, where, kv_heads, group)
                _tell(queue, drawn, following)
        tile = following


@gluon.jit
def _bring(rows, buffers, blocks, block_rows, head_row, used, page: gl.constexpr, dim: gl.constexpr):
    """Copy the pages of a tile's keys or values to the next buffer, once it is free."""
    smem, full, free = buffers
    stage = used % STAGES
    mbarrier.wait(free.index(stage), (used // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(stage), KEYS * dim * 2)
    for j in gl.static_range(KEYS // page):
        part = smem.index(stage).slice(j * page, page, 0)
        tma.async_copy_global_to_shared(rows, [blocks[j] * block_rows + head_row, 0], full.index(stage), part)


@gluon.jit
def _draw(drawn_ptr, tiles, where, kv_heads: gl.constexpr, group: gl.constexpr):
    """The next tile with rows in it that nobody has, as from ``_tile``. Who draws last clears the counter."""
    index = gl.atomic_add(drawn_ptr, 1, sem="relaxed")
    tile = _tile(index, tiles, where, kv_heads, group)
    while (tile[6] == 0) & (index < tiles):
        index = gl.atomic_add(drawn_ptr, 1, sem="relaxed")
        tile = _tile(index, tiles, where, kv_heads, group)
    if index == tiles + gl.num_programs(0) - 1:
        gl.atomic_xchg(drawn_ptr, 0, sem="relaxed")
    return tile


@gluon.jit
def _tile(index, tiles, where, kv_heads: gl.constexpr, group: gl.constexpr):
    """(request, KV head, first token, queries, first row, tokens before, end of keys) of a tile; end 0: it has no rows.

    A prompt's last tiles have the most keys, so they go first.
    """
    seq_lens_ptr, start_ptr, num_decodes, num_reqs = where
    exists = index < tiles
    index = gl.minimum(index, tiles - 1)
    kv_head = index % kv_heads
    index = (tiles - 1 - index) // kv_heads
    base = gl.load(start_ptr + num_decodes)
    left = num_decodes
    right = num_reqs
    while right - left > 1:
        middle = (left + right) // 2
        begun = _first_tile(gl.load(start_ptr + middle), base, middle - num_decodes, group) <= index
        left = gl.where(begun, middle, left)
        right = gl.where(begun, right, middle)
    start = gl.load(start_ptr + left)
    queries = gl.load(start_ptr + left + 1) - start
    row0 = (index - _first_tile(start, base, left - num_decodes, group)) * ROWS
    context = gl.load(seq_lens_ptr + left) - queries
    high = gl.minimum(context + (row0 + ROWS - 1) // group + 1, context + queries)
    high = gl.where(exists & (row0 < queries * group), high, 0)
    return left, kv_head, start, queries, row0, context, high


@gluon.jit
def _first_tile(start, base, ordinal, group: gl.constexpr):
    """Where a request's tiles begin: room for every tile before it, whatever the rounding."""
    return (start - base) * group // ROWS + ordinal


@gluon.jit
def _tell(queue, drawn, tile):
    """Pass a tile on to the groups that multiply; one without keys ends their work."""
    words, told, heard = queue
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    slot = drawn % 2
    mbarrier.wait(heard.index(slot), (drawn // 2 & 1) ^ 1)
    for i in gl.static_range(6):
        words.index(6 * slot + i).store(gl.full([1], tile[i + 1], gl.int32, one))
    mbarrier.arrive(told.index(slot), count=1)


@gluon.jit
def _hear(queue, drawn):
    """The next tile, as from ``_tile`` without the request."""
    words, told, heard = queue
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    slot = drawn % 2
    mbarrier.wait(told.index(slot), drawn // 2 & 1)
    tile = ()
    for i in gl.static_range(6):
        tile = tile + (gl.sum(words.index(6 * slot + i).load(one), 0),)  # type: ignore[assignment]  # noqa: RUF005
    mbarrier.arrive(heard.index(slot), count=1)
    return tile


@gluon.jit
def _attend(
    pointers, q_smem, keys, values, queue, turns, side: gl.constexpr,
    q_token: gl.constexpr, q_head: gl.constexpr, out_token: gl.constexpr, out_head: gl.constexpr,
    has_lse: gl.constexpr, heads: gl.constexpr, group: gl.constexpr, page: gl.constexpr, dim: gl.constexpr,
    scale: gl.constexpr,
):  # fmt: skip
    """A group of warps that multiply: the first (``side`` 0) or the second 64 rows of each tile."""
    q_ptr, out_ptr, lse_ptr = pointers
    v_smem, v_full, v_free = values
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    half: gl.constexpr = ROWS // 2
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, dim, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // dim, dim // 8], [4, 1], [1, 0])
    mine = q_smem.index(side)
    used = 0
    drawn = 0
    tile = _hear(queue, drawn)
    q_at, real = _rows(tile, side, q_token, q_head, group, dim, wide)
    q = gl.load(q_ptr + q_at, mask=real, other=0.0)
    while tile[5] > 0:
        kv_head, start, queries, row0, context, high = tile
        mine.store(q)
        fence_async_shared()
        row = row0 + side * half + gl.arange(0, half, layout=gl.SliceLayout(1, s_layout))
        position = context + row // group
        count = gl.cdiv(high, KEYS)
        first_key = (count - 1) * KEYS
        peak = gl.full([half], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
        mass = gl.zeros([half], gl.float32, gl.SliceLayout(1, s_layout))
        acc = gl.zeros([half, dim], gl.float32, o_layout)
        s = _multiply_keys(mine, keys, turns, used, side)
        mbarrier.arrive(turns.index(1 - side), count=1)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(keys[2].index(used % STAGES), count=1)
        weight, _shrink, peak, mass = _weigh(s, peak, mass, first_key, position, scale, True)
        p = gl.convert_layout(weight.to(dtype), p_layout)
        if first_key + KEYS > context + queries:
            mbarrier.wait(v_full.index(used % STAGES), used // STAGES & 1)
            _clear(v_smem.index(used % STAGES), context + queries - first_key, page, wide)
        shared = gl.minimum((context + row0 // group + 1) // KEYS, count - 1)  # tiles that every row sees all of
        used += 1
        for _ in range(count - 1 - shared):
            first_key -= KEYS
            p, acc, peak, mass = _turn(
                mine, keys, values, turns, p, acc, peak, mass, used, first_key, position, side, scale, True
            )
            used += 1
        for _ in range(shared):
            p, acc, peak, mass = _turn(
                mine, keys, values, turns, p, acc, peak, mass, used, first_key, position, side, scale, False
            )
            used += 1
        drawn += 1
        following = _hear(queue, drawn)
        q_at, real = _rows(following, side, q_token, q_head, group, dim, wide)
        q = gl.load(q_ptr + q_at, mask=real, other=0.0)  # on their way while this tile ends
        stage = (used - 1) % STAGES
        mbarrier.wait(v_full.index(stage), (used - 1) // STAGES & 1)
        acc = warpgroup_mma(p, v_smem.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_free.index(stage), count=1)
        result = acc * (1.0 / gl.convert_layout(mass, gl.SliceLayout(1, o_layout)))[:, None]
        mine.store(result.to(dtype))
        out_at, real = _rows(tile, side, out_token, out_head, group, dim, wide)
        gl.store(out_ptr + out_at, mine.load(wide), mask=real)
        if has_lse:
            lse_at = (start + row // group).to(gl.int64) * heads + kv_head * group + row % group
            gl.store(lse_ptr + lse_at, (peak * (scale * LOG2E) + gl.log2(mass)) * LN2, mask=row // group < queries)
        tile = following


@gluon.jit
def _rows(
    tile, side: gl.constexpr, token_stride: gl.constexpr, head_stride: gl.constexpr,
    group: gl.constexpr, dim: gl.constexpr, wide: gl.constexpr,
):  # fmt: skip
    """(offsets, which rows are there) of one side of a tile of queries or results."""
    row = tile[3] + side * (ROWS // 2) + gl.arange(0, ROWS // 2, layout=gl.SliceLayout(1, wide))
    token = row // group
    feature = gl.arange(0, dim, layout=gl.SliceLayout(0, wide))
    at = (tile[1] + token).to(gl.int64) * token_stride + (tile[0] * group + row % group) * head_stride
    return at[:, None] + feature[None, :], (token < tile[2])[:, None]


@gluon.jit
def _clear(values, end, page: gl.constexpr, wide: gl.constexpr):
    """Zeros instead of the values from ``end`` on, which may be anything, NaN included. Both sides do it, since neither
    may wait for the other: they write the same."""
    slot = gl.arange(0, page, layout=gl.SliceLayout(1, wide))
    for j in gl.static_range(KEYS // page):
        if (j + 1) * page > end:
            part = values.slice(j * page, page, 0)
            part.store(gl.where((j * page + slot < end)[:, None], part.load(wide), 0.0))
    fence_async_shared()


@gluon.jit
def _multiply_keys(q_smem, keys, turns, used, side: gl.constexpr):
    """Start the product of the queries and a tile of keys, once these are there and it is this side's turn."""
    smem, full, _ = keys
    stage = used % STAGES
    mbarrier.wait(full.index(stage), used // STAGES & 1)
    mbarrier.wait(turns.index(side), (used & 1) ^ (1 - side))
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    zero = gl.zeros([ROWS // 2, KEYS], gl.float32, layout)
    return warpgroup_mma(q_smem, smem.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _turn(
    q_smem, keys, values, turns, p, acc, peak, mass, used, first_key, position,
    side: gl.constexpr, scale: gl.constexpr, masked: gl.constexpr,
):  # fmt: skip
    """Add the values of the tile before and meanwhile weigh the keys of this one."""
    v_smem, v_full, v_free = values
    s = _multiply_keys(q_smem, keys, turns, used, side)
    before = (used - 1) % STAGES
    mbarrier.wait(v_full.index(before), (used - 1) // STAGES & 1)
    acc = warpgroup_mma(p, v_smem.index(before), acc, is_async=True)
    mbarrier.arrive(turns.index(1 - side), count=1)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(keys[2].index(used % STAGES), count=1)
    weight, shrink, peak, mass = _weigh(s, peak, mass, first_key, position, scale, masked)
    # Never stored, but the assembler moves the wait below no further up than this: not above the exponentials.
    mass = gl.inline_asm_elementwise(
        "{ .reg .pred n; .reg .b32 a; mov.b32 a, $1; setp.lt.f32 n, $1, 0f00000000; @n st.shared.b32 [a], a;"
        " mov.f32 $0, $1; }",
        "=f,f", [mass], dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    mbarrier.arrive(v_free.index(before), count=1)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
    return gl.convert_layout(weight.to(p.dtype), p.type.layout), acc, peak, mass


@gluon.jit
def _weigh(s, peak, mass, first_key, position, scale: gl.constexpr, masked: gl.constexpr):
    """The running softmax: (weights, what earlier sums shrink by, peak, mass). Not ``masked``: every row sees all."""
    if masked:
        key = first_key + gl.arange(0, KEYS, layout=gl.SliceLayout(0, s.type.layout))
        s = gl.where(key[None, :] <= position[:, None], s, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(s, 1))
    base = new_peak * (scale * LOG2E)
    if masked:  # a row that has seen nothing yet: subtracting zero gives 0, not NaN
        base = gl.where(new_peak == float("-inf"), 0.0, base)
    weight = gl.exp2(s * (scale * LOG2E) - base[:, None])
    shrink = gl.exp2(peak * (scale * LOG2E) - base)
    return weight, shrink, new_peak, mass * shrink + gl.sum(weight, 1)
