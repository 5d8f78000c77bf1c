"""Scores of tokens times int4 weights on Hopper: codes are unpacked while the tensor cores multiply.

All the tokens of a program are the second operand of ``wgmma``, in shared memory; its first one are weights in
registers. A turn unpacks half a block of codes while the product of the half before it still runs, so that two products
are in flight but for the time between. What is read comes by the copy engine, ``stages`` blocks ahead.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental.gluon import jit
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language import debug_barrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime.jit import constexpr_function

__all__ = ["hopper_kernel"]


def _text(half: int, kind: str) -> gl.constexpr:
    """PTX for half the codes of two words: four pairs of numbers, less their zero points, times their scales."""
    one, magic = ("0x3F803F80", "0x43004300") if kind == "bf16x2" else ("0x3C003C00", "0x64006400")
    lines = [
        ".reg .b32 a, t, c, one, nil;",
        f"mov.b32 one, {one};",
        "mov.b32 nil, 0x80008000;",
        f"prmt.b32 a, $4, $5, {('0x5410', '0x7632')[half]};",
    ]
    for j in range(4):
        word = "a"
        if j:
            lines.append(f"shr.u32 c, a, {4 * j};")
            word = "c"
        lines.append(f"lop3.b32 t, {word}, 0x000F000F, {magic}, 0xEA;")
        lines.append(f"fma.rn.{kind} t, t, one, $6;")
        lines.append(f"fma.rn.{kind} ${j}, t, $7, nil;")
    return gl.constexpr("{\n" + "\n".join(lines) + "\n}")


_BF16, _F16 = (_text(0, "bf16x2"), _text(1, "bf16x2")), (_text(0, "f16x2"), _text(1, "f16x2"))
_BF16_0, _BF16_1, _F16_0, _F16_1 = *_BF16, *_F16


@constexpr_function
def _words_layout(tiles, warps):
    """(tiles, h, g, t, i, e): as the first operand of a product wants its codes."""
    reg = [[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 0], [0, 0, 0, 2, 0, 0]]
    reg += [[tile, 0, 0, 0, 0, 0] for tile in (4, 8, 16) if warps <= tile < tiles]
    lane = [[0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 2, 0, 0, 0], [0, 0, 4, 0, 0, 0]]
    warp = [[tile, 0, 0, 0, 0, 0] for tile in (1, 2, 4, 8) if tile < warps]
    return gl.DistributedLinearLayout(reg, lane, warp, [], [tiles, 2, 8, 4, 2, 2])


@constexpr_function
def _product_layout(warps, tokens):
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, tokens, 16])


@constexpr_function
def _store_layout(warps):
    return gl.BlockedLayout([8, 1], [16, 2], [1, warps], [0, 1])


@constexpr_function
def _pair_layout(warps):
    return gl.BlockedLayout([4, 1, 2], [32, 1, 1], [1, warps, 1], [2, 0, 1])


@jit
def _read(words, groups, tiles: gl.constexpr, warps: gl.constexpr, dtype: gl.constexpr):
    """A block's words, what to add for their zero points, and their scales."""
    at: gl.constexpr = _words_layout(tiles, warps)
    row: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, gl.SliceLayout(5, at)))
    p = words.reshape((tiles, 2, 8, 4, 2, 2)).load(at)
    m = groups.reshape((tiles, 8, 2)).load(row)
    offset: gl.constexpr = 128.0 if dtype == gl.bfloat16 else 1024.0
    n = (-offset - (m & 255).to(gl.float32)).to(dtype)
    s = (m & -256).to(gl.float32, bitcast=True).to(dtype)
    n = gl.expand_dims(gl.expand_dims(gl.expand_dims(n, 1), 3), 5)
    s = gl.expand_dims(gl.expand_dims(gl.expand_dims(s, 1), 3), 5)
    return p, n, s


@jit
def _unpack(
    p, n, s, half: gl.constexpr, tiles: gl.constexpr, warps: gl.constexpr, tokens: gl.constexpr, dtype: gl.constexpr
):
    """Half a block of weights, (tiles * 16, 64): the first operand."""
    given = [p, n, s]
    if dtype == gl.bfloat16:
        c = gl.inline_asm_elementwise(
            _BF16_1 if half else _BF16_0, "=r,=r,=r,=r,r,r,r,r", given, (gl.bfloat16,) * 4, True, 2
        )
    else:
        c = gl.inline_asm_elementwise(
            _F16_1 if half else _F16_0, "=r,=r,=r,=r,r,r,r,r", given, (gl.float16,) * 4, True, 2
        )
    w = gl.join(gl.join(c[0], c[2]), gl.join(c[1], c[3]))  # and j's upper bit, and its lower
    w = gl.reshape(gl.permute(w, (0, 4, 2, 6, 7, 3, 1, 5)), (tiles * 16, 64))
    return gl.convert_layout(w, gl.DotOperandLayout(0, _product_layout(warps, tokens), 2), assert_trivial=True)


@jit
def _fetch(
    x_desc, words_desc, groups_desc, ready, x, words, groups, turn, first, turns, tile, token,
    stages: gl.constexpr, ratio: gl.constexpr, weights: gl.constexpr, activations: gl.constexpr,
):  # fmt: skip
    """Start to copy a turn's weights, its activations or both, if there is such a turn."""
    total: gl.constexpr = x_desc.block_type.nbytes + words_desc.block_type.nbytes + groups_desc.block_type.nbytes
    slot = turn % stages
    there = turn < turns
    block = first + turn
    bar = ready.index(slot)
    if weights:
        mbarrier.expect(bar, total, pred=there)
        tma.async_copy_global_to_shared(words_desc, [0, tile, block * 256], bar, words.index(slot), pred=there)
        tma.async_copy_global_to_shared(
            groups_desc, [0, tile, block // ratio * 16], bar, groups.index(slot), pred=there
        )
    if activations:
        tma.async_copy_global_to_shared(x_desc, [token, block * 128], bar, x.index(slot), pred=there)


@jit(do_not_specialize=["num_tokens"])
def hopper_kernel(
    x_desc,  # (num_tokens, inputs)
    words_desc,  # (tiles, blocks * 256) int32
    groups_desc,  # (tiles, groups * 16) int32
    bias_ptr,  # (features,)
    residual_ptr,  # (num_tokens, features), half of them where gated
    out_ptr,  # as residual; with splits, (splits, num_tokens, features) float32
    num_tokens,
    features: gl.constexpr,
    inputs: gl.constexpr,
    group: gl.constexpr,
    tokens: gl.constexpr,
    tiles: gl.constexpr,
    splits: gl.constexpr,
    stages: gl.constexpr,
    has_bias: gl.constexpr,
    gated: gl.constexpr,
    has_residual: gl.constexpr,
    chained: gl.constexpr,
    warps: gl.constexpr,
):
    """Grid: (num_tokens / tokens, features / 16 / tiles, splits). Gated, the first half of the tiles are gates."""
    blocks: gl.constexpr = (inputs + 127) // 128
    share: gl.constexpr = (blocks + splits - 1) // splits
    ratio: gl.constexpr = group // 128
    kinds: gl.constexpr = 2 if gated else 1
    dtype: gl.constexpr = x_desc.dtype
    acc_layout: gl.constexpr = _product_layout(warps, tokens)
    row_program = gl.program_id(1)
    split = gl.program_id(2)
    token = gl.program_id(0) * tokens
    tile = row_program * (tiles // kinds)
    first = split * share
    turns = gl.minimum(first + share, blocks) - first

    ready = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    x = gl.allocate_shared_memory(dtype, [stages, tokens, 128], x_desc.layout)
    words = gl.allocate_shared_memory(gl.int32, [stages, kinds, tiles // kinds, 256], words_desc.layout)
    groups = gl.allocate_shared_memory(gl.int32, [stages, kinds, tiles // kinds, 16], groups_desc.layout)
    for stage in gl.static_range(stages):
        mbarrier.init(ready.index(stage), count=1)
    for ahead in gl.static_range(stages - 1):
        _fetch(
            x_desc,
            words_desc,
            groups_desc,
            ready,
            x,
            words,
            groups,
            ahead,
            first,
            turns,
            tile,
            token,
            stages,
            ratio,
            True,
            False,
        )
    if chained:
        gdc_wait()
    for ahead in gl.static_range(stages - 1):
        _fetch(
            x_desc,
            words_desc,
            groups_desc,
            ready,
            x,
            words,
            groups,
            ahead,
            first,
            turns,
            tile,
            token,
            stages,
            ratio,
            False,
            True,
        )
    acc = gl.zeros((tiles * 16, tokens), gl.float32, acc_layout)
    # the first block apart: nothing is in flight yet
    mbarrier.wait(ready.index(0), 0)
    p, n, s = _read(words.index(0), groups.index(0), tiles, warps, dtype)
    low = _unpack(p, n, s, 0, tiles, warps, tokens, dtype)
    acc = warpgroup_mma(low, x.index(0).slice(0, 64, 1).permute((1, 0)), acc, is_async=True)
    _fetch(
        x_desc,
        words_desc,
        groups_desc,
        ready,
        x,
        words,
        groups,
        stages - 1,
        first,
        turns,
        tile,
        token,
        stages,
        ratio,
        True,
        True,
    )
    high = _unpack(p, n, s, 1, tiles, warps, tokens, dtype)
    acc = warpgroup_mma(high, x.index(0).slice(64, 64, 1).permute((1, 0)), acc, is_async=True)
    acc, low = warpgroup_mma_wait(1, deps=(acc, low))
    for block in range(1, turns):
        slot = block % stages
        mbarrier.wait(ready.index(slot), block // stages & 1)
        p, n, s = _read(words.index(slot), groups.index(slot), tiles, warps, dtype)
        low = _unpack(p, n, s, 0, tiles, warps, tokens, dtype)
        acc = warpgroup_mma(low, x.index(slot).slice(0, 64, 1).permute((1, 0)), acc, is_async=True)
        acc, high = warpgroup_mma_wait(1, deps=(acc, high))
        debug_barrier()
        _fetch(
            x_desc,
            words_desc,
            groups_desc,
            ready,
            x,
            words,
            groups,
            block + stages - 1,
            first,
            turns,
            tile,
            token,
            stages,
            ratio,
            True,
            True,
        )
        high = _unpack(p, n, s, 1, tiles, warps, tokens, dtype)
        acc = warpgroup_mma(high, x.index(slot).slice(64, 64, 1).permute((1, 0)), acc, is_async=True)
        acc, low = warpgroup_mma_wait(1, deps=(acc, low))
    acc = warpgroup_mma_wait(0, deps=(acc,))
    debug_barrier()
    for stage in gl.static_range(stages):
        mbarrier.invalidate(ready.index(stage))
    if chained:
        gdc_launch_dependents()
    store: gl.constexpr = _store_layout(warps)
    columns: gl.constexpr = gl.SliceLayout(0, store)
    rows: gl.constexpr = gl.SliceLayout(1, store)
    half: gl.constexpr = tiles * 8 if gated else tiles * 16
    at_token = token + gl.arange(0, tokens, columns)
    row = row_program * half + gl.arange(0, half, rows)
    width: gl.constexpr = features // 2 if gated else features
    inside = (row < width)[:, None] & (at_token < num_tokens)[None, :]
    if splits == 1:
        if gated:
            pair = gl.permute(gl.reshape(acc, (2, half, tokens)), (1, 2, 0))
            if tiles < 2 * warps:  # gates and their up projections are not one thread's
                pair = gl.convert_layout(pair, _pair_layout(warps))
            gate, upper = gl.split(pair)
            if has_bias:
                held = gl.arange(0, half, gl.SliceLayout(1, gate.type.layout))
                held = gl.minimum(row_program * half + held, width - 1)
                gate += gl.load(bias_ptr + held).to(gl.float32)[:, None]
                upper += gl.load(bias_ptr + width + held).to(gl.float32)[:, None]
            y = gl.convert_layout(gate / (1.0 + gl.exp(-gate)) * upper, store)
        else:
            y = gl.convert_layout(acc, store)
            if has_bias:
                y += gl.load(bias_ptr + gl.minimum(row, width - 1)).to(gl.float32)[:, None]
        at = at_token.to(gl.int64)[None, :] * width + row[:, None]
        if has_residual:
            y += gl.load(residual_ptr + at, mask=inside, other=0.0).to(gl.float32)
        gl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        y = gl.convert_layout(acc, store)
        out = out_ptr + split.to(gl.int64) * num_tokens * features
        every = gl.arange(0, tiles * 16, rows)
        if gated:
            each = row_program * half + every % half
            mine = each < width
            each = each + every // half * width
        else:
            each = row_program * half + every
            mine = each < features
        at = at_token.to(gl.int64)[None, :] * features + each[:, None]
        gl.store(out + at, y, mask=mine[:, None] & (at_token < num_tokens)[None, :])
