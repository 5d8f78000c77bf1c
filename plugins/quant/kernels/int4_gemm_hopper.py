"""Linear layers of scores of tokens with int4 weights on Hopper: codes are unpacked while the tensor cores multiply.

Algorithm: warp specialisation. One producer warp starts copies by the copy engine (TMA), ``stages`` turns ahead; one or
two consumer warp groups multiply. The tokens are the second operand of ``wgmma``, in shared memory; the weights are the
first one, in registers. A turn is a block of 128 inputs, of which a consumer unpacks one half while the product of the
half before runs: two products are in flight but for the waits, each of which names the registers that it frees.
K may be split among ``split_k`` programs, as in ``int4_gemm_medium_m``.

Shapes: ``x`` (M, K), words (N / 16, K / 128, 256) int32, ``out`` (M, N), or (M, N / 2) where gated.
Grid: ``(M / block_m, N / 16 / tiles / num_consumers, split_k)``.
Shared memory: ``stages`` turns of tokens, (block_m, 128), words and scales, and two barriers each (``ready``: filled;
``free``: read by all consumers). Registers: each consumer's accumulator, (tiles * 16, block_m) float32, and two halves
of unpacked weights.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental.gluon import jit
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime.jit import constexpr_function

__all__ = ["int4_gemm_hopper_kernel"]


def build_unpack_ptx(half: int, is_bfloat16: bool) -> gl.constexpr:
    """PTX for half the codes of two words, as in ``int4_words``: less their zero points, times their scales."""
    kind, one, magic = ("bf16x2", "0x3F803F80", "0x43004300") if is_bfloat16 else ("f16x2", "0x3C003C00", "0x64006400")
    lines = [
        ".reg .b32 a, t, c, one, nil;",
        f"mov.b32 one, {one};",
        "mov.b32 nil, 0x80008000;",
        f"prmt.b32 a, $4, $5, {('0x5410', '0x7632')[half]};",
    ]
    for j in range(4):
        if j:
            lines.append(f"shr.u32 c, a, {4 * j};")
        lines.append(f"lop3.b32 t, {'c' if j else 'a'}, 0x000F000F, {magic}, 0xEA;")
        lines.append(f"fma.rn.{kind} t, t, one, $6;")
        lines.append(f"fma.rn.{kind} ${j}, t, $7, nil;")
    return gl.constexpr("{\n" + "\n".join(lines) + "\n}")


_BF16_LOW, _BF16_HIGH, _F16_LOW, _F16_HIGH = (
    build_unpack_ptx(0, True),
    build_unpack_ptx(1, True),
    build_unpack_ptx(0, False),
    build_unpack_ptx(1, False),
)


@constexpr_function
def _words_layout(tiles, warps, paired):
    """(tiles, h, g, t, i, e): where a product's first operand wants its codes.

    ``paired``: (gate or up, tiles / 2, h, g, t, i, e), so that a thread holds both of a pair.
    """
    rank = 7 if paired else 6
    tile, h, g, t, i, e = range(rank - 6, rank)

    def one(dim, size):
        return [size if at == dim else 0 for at in range(rank)]

    tiles_apart = tiles // 2 if paired else tiles
    rows = ([one(i, 1)] if paired else []) + [one(tile, n) for n in (1, 2, 4, 8, 16) if n < tiles_apart]
    many = 2 if warps == 4 else 3
    registers = [one(e, 1), one(0, 1) if paired else one(i, 1), one(t, 2), *rows[many:]]
    lanes = [one(h, 1), one(t, 1), one(g, 1), one(g, 2), one(g, 4)]
    shape = [2, tiles_apart, 2, 8, 4, 2, 2] if paired else [tiles, 2, 8, 4, 2, 2]
    return gl.DistributedLinearLayout(registers, lanes, rows[:many], [], shape)


@constexpr_function
def _product_layout(warps, block_m):
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, block_m, 16])


@jit
def _read(words, groups, tiles: gl.constexpr, warps: gl.constexpr, paired: gl.constexpr, dtype: gl.constexpr):
    """A block's words, what to add for their zero points, and their scales."""
    at: gl.constexpr = _words_layout(tiles, warps, paired)
    if paired:
        p = words.reshape((2, tiles // 2, 2, 8, 4, 2, 2)).load(at)
        m = groups.reshape((2, tiles // 2, 8, 2)).load(gl.SliceLayout(2, gl.SliceLayout(4, gl.SliceLayout(6, at))))
    else:
        p = words.reshape((tiles, 2, 8, 4, 2, 2)).load(at)
        m = groups.reshape((tiles, 8, 2)).load(gl.SliceLayout(1, gl.SliceLayout(3, gl.SliceLayout(5, at))))
    offset: gl.constexpr = 128.0 if dtype == gl.bfloat16 else 1024.0
    h: gl.constexpr = 2 if paired else 1
    n = (-offset - (m & 255).to(gl.float32)).to(dtype)
    s = (m & -256).to(gl.float32, bitcast=True).to(dtype)
    n = gl.expand_dims(gl.expand_dims(gl.expand_dims(n, h), h + 2), h + 4)
    s = gl.expand_dims(gl.expand_dims(gl.expand_dims(s, h), h + 2), h + 4)
    return p, n, s


@jit
def _unpack(
    p, n, s, high: gl.constexpr, tiles: gl.constexpr, warps: gl.constexpr, block_m: gl.constexpr, paired: gl.constexpr,
    dtype: gl.constexpr,
):  # fmt: skip
    """The lower or upper half of a block's inputs, (tiles * 16, 64). ``paired``, rows are [tile, i, gate or up, g]."""
    operands = [p, n, s]
    registers: gl.constexpr = "=r,=r,=r,=r,r,r,r,r"
    if dtype == gl.bfloat16:
        c = gl.inline_asm_elementwise(
            _BF16_HIGH if high else _BF16_LOW, registers, operands, (gl.bfloat16,) * 4, True, 2
        )  # fmt: skip
    else:
        c = gl.inline_asm_elementwise(
            _F16_HIGH if high else _F16_LOW, registers, operands, (gl.float16,) * 4, True, 2
        )  # fmt: skip
    w = gl.join(gl.join(c[0], c[2]), gl.join(c[1], c[3]))  # and j's upper bit, and its lower
    w = gl.permute(w, (1, 5, 0, 3, 7, 8, 4, 2, 6)) if paired else gl.permute(w, (0, 4, 2, 6, 7, 3, 1, 5))
    operand: gl.constexpr = gl.DotOperandLayout(0, _product_layout(warps, block_m), 2)
    return gl.convert_layout(gl.reshape(w, (tiles * 16, 64)), operand, assert_trivial=True)


@jit
def _produce(
    x_desc, words_desc, groups_desc, ready, free, x, words, groups, first, turns, tile, token, tiles: gl.constexpr,
    num_consumers: gl.constexpr, stages: gl.constexpr, ratio: gl.constexpr, enable_pdl: gl.constexpr,
    leads: gl.constexpr,
):  # fmt: skip
    """One warp: start to copy what a turn wants, as soon as there is room. The first weights wait for no kernel."""
    for turn in range(gl.minimum(stages, turns)):
        _weights(
            words_desc,
            groups_desc,
            x_desc,
            ready,
            words,
            groups,
            first,
            turn,
            tile,
            tiles,
            num_consumers,
            stages,
            ratio,
        )
    if enable_pdl:
        gdc_wait()
        if leads:
            gdc_launch_dependents()
    for turn in range(turns):
        slot = turn % stages
        if turn >= stages:  # the parity of a barrier's phase changes with every time around
            mbarrier.wait(free.index(slot), (turn // stages & 1) ^ 1)
            _weights(
                words_desc, groups_desc, x_desc, ready, words, groups, first, turn, tile, tiles, num_consumers, stages,
                ratio,
            )  # fmt: skip
        tma.async_copy_global_to_shared(x_desc, [token, (first + turn) * 128], ready.index(slot), x.index(slot))


@jit
def _weights(
    words_desc, groups_desc, x_desc, ready, words, groups, first, turn, tile, tiles: gl.constexpr,
    num_consumers: gl.constexpr, stages: gl.constexpr, ratio: gl.constexpr,
):  # fmt: skip
    """Start to copy a turn's codes and scales."""
    slot, block = turn % stages, first + turn
    bar = ready.index(slot)
    part: gl.constexpr = words_desc.block_type.nbytes + groups_desc.block_type.nbytes
    mbarrier.expect(bar, x_desc.block_type.nbytes + num_consumers * part)
    for i in gl.static_range(num_consumers):
        at, held = tile + i * tiles, slot * num_consumers + i
        tma.async_copy_global_to_shared(words_desc, [0, at, block * 256], bar, words.index(held))
        tma.async_copy_global_to_shared(groups_desc, [0, at, block // ratio * 16], bar, groups.index(held))


@jit
def _consume(
    ready, free, x, words, groups, turns, program, split, token, num_tokens, bias_ptr, residual_ptr, out_ptr,
    me: gl.constexpr, num_consumers: gl.constexpr, stages: gl.constexpr, tiles: gl.constexpr, block_m: gl.constexpr,
    warps: gl.constexpr, features: gl.constexpr, split_k: gl.constexpr, has_bias: gl.constexpr,
    gated: gl.constexpr, has_residual: gl.constexpr, enable_pdl: gl.constexpr, leads: gl.constexpr,
):  # fmt: skip
    """Warps that multiply."""
    paired: gl.constexpr = gated and tiles == warps
    dtype: gl.constexpr = x.dtype
    acc = gl.zeros((tiles * 16, block_m), gl.float32, _product_layout(warps, block_m))
    mbarrier.wait(ready.index(0), 0)
    p, n, s = _read(words.index(me), groups.index(me), tiles, warps, paired, dtype)
    low = _unpack(p, n, s, 0, tiles, warps, block_m, paired, dtype)
    acc = warpgroup_mma(low, x.index(0).slice(0, 64, 1).permute((1, 0)), acc, is_async=True)
    high = _unpack(p, n, s, 1, tiles, warps, block_m, paired, dtype)
    acc = warpgroup_mma(high, x.index(0).slice(64, 64, 1).permute((1, 0)), acc, is_async=True)
    acc, low = warpgroup_mma_wait(1, deps=(acc, low))
    for turn in range(1, turns):
        slot = turn % stages
        mbarrier.wait(ready.index(slot), turn // stages & 1)
        held = slot * num_consumers + me
        p, n, s = _read(words.index(held), groups.index(held), tiles, warps, paired, dtype)
        low = _unpack(p, n, s, 0, tiles, warps, block_m, paired, dtype)
        acc = warpgroup_mma(low, x.index(slot).slice(0, 64, 1).permute((1, 0)), acc, is_async=True)
        acc, high = warpgroup_mma_wait(1, deps=(acc, high))
        mbarrier.arrive(free.index((turn - 1) % stages), count=1)  # both products of the turn before are done
        high = _unpack(p, n, s, 1, tiles, warps, block_m, paired, dtype)
        acc = warpgroup_mma(high, x.index(slot).slice(64, 64, 1).permute((1, 0)), acc, is_async=True)
        acc, low = warpgroup_mma_wait(1, deps=(acc, low))
    acc = warpgroup_mma_wait(0, deps=(acc,))
    if enable_pdl:  # the residual and the output may still be in use by the kernels before
        gdc_wait()
        if not leads:
            gdc_launch_dependents()
    width: gl.constexpr = features // 2 if gated else features
    kept: gl.constexpr = tiles * 8 if gated else tiles * 16
    y = acc
    if gated:
        if paired:
            pair = gl.permute(gl.reshape(acc, (tiles // 2, 2, 2, 8, block_m)), (0, 1, 3, 4, 2))
        else:
            pair = gl.permute(gl.reshape(acc, (2, kept, block_m)), (1, 2, 0))
        y, up = gl.split(pair)
        y, up = gl.reshape(y, (kept, block_m)), gl.reshape(up, (kept, block_m))
    first_row = (program * num_consumers + me) * kept
    row = gl.arange(0, kept, gl.SliceLayout(1, y.type.layout))
    column = gl.arange(0, block_m, gl.SliceLayout(0, y.type.layout))
    inside = (first_row + row < width)[:, None] & (token + column < num_tokens)[None, :]
    if split_k > 1:
        out = out_ptr + (split.to(gl.int64) * num_tokens + token) * features + first_row
        at = column[None, :] * features + row[:, None]
        gl.store(out + at, y, mask=inside)
        if gated:
            gl.store(out + width + at, up, mask=inside)
    else:
        if has_bias:
            bias = bias_ptr + gl.minimum(first_row + row, width - 1)
            y += gl.load(bias).to(gl.float32)[:, None]
            if gated:
                up += gl.load(bias + width).to(gl.float32)[:, None]
        if gated:
            y = y / (1.0 + gl.exp(-y)) * up
        first = token.to(gl.int64) * width + first_row
        at = column[None, :] * width + row[:, None]
        if has_residual:
            y += gl.load(residual_ptr + first + at, mask=inside, other=0.0).to(gl.float32)
        gl.store(out_ptr + first + at, y.to(out_ptr.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["num_tokens"])
def int4_gemm_hopper_kernel(
    x_desc,  # (num_tokens, inputs)
    words_desc,  # (kinds, tiles, blocks * 256) int32: gated, gates and up projections are two kinds
    groups_desc,  # (kinds, tiles, groups * 16) int32
    bias_ptr,  # (features,)
    residual_ptr,  # (num_tokens, features), half of them where gated
    out_ptr,  # as residual; with splits, (splits, num_tokens, features) float32
    num_tokens,
    features: gl.constexpr,
    inputs: gl.constexpr,
    group: gl.constexpr,
    block_m: gl.constexpr,
    tiles: gl.constexpr,
    num_consumers: gl.constexpr,
    warps: gl.constexpr,
    split_k: gl.constexpr,
    stages: gl.constexpr,
    has_bias: gl.constexpr,
    gated: gl.constexpr,
    has_residual: gl.constexpr,
    enable_pdl: gl.constexpr,
    leads: gl.constexpr = False,
):
    """Grid: (num_tokens / tokens, features / 16 / tiles / consumers, splits): ``tiles`` and ``warps`` are a
    consumer's. Every split has a block. ``leads``: the next kernel may start beside it."""
    blocks: gl.constexpr = (inputs + 127) // 128
    share: gl.constexpr = (blocks + split_k - 1) // split_k
    kinds: gl.constexpr = 2 if gated else 1
    apart: gl.constexpr = tiles // kinds
    token, program, split = gl.program_id(0) * block_m, gl.program_id(1), gl.program_id(2)
    first = split * share
    turns = gl.minimum(first + share, blocks) - first
    ready = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    x = gl.allocate_shared_memory(x_desc.dtype, [stages, block_m, 128], x_desc.layout)
    words = gl.allocate_shared_memory(gl.int32, [stages * num_consumers, kinds, apart, 256], words_desc.layout)
    groups = gl.allocate_shared_memory(gl.int32, [stages * num_consumers, kinds, apart, 16], groups_desc.layout)
    for stage in gl.static_range(stages):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=num_consumers)
    row = program * num_consumers * apart
    # fmt: off
    if num_consumers == 1:
        gl.warp_specialize([
            (_consume, (
                ready, free, x, words, groups, turns, program, split, token, num_tokens, bias_ptr, residual_ptr,
                out_ptr, 0, num_consumers, stages, tiles, block_m, warps, features, split_k, has_bias, gated,
                has_residual, enable_pdl, leads,
            )),
            (_produce, (
                x_desc, words_desc, groups_desc, ready, free, x, words, groups, first, turns, row, token, apart,
                num_consumers, stages, group // 128, enable_pdl, leads,
            )),
        ], [1], [24])
    else:
        gl.warp_specialize([
            (_consume, (
                ready, free, x, words, groups, turns, program, split, token, num_tokens, bias_ptr, residual_ptr,
                out_ptr, 0, num_consumers, stages, tiles, block_m, warps, features, split_k, has_bias, gated,
                has_residual, enable_pdl, leads,
            )),
            (_consume, (
                ready, free, x, words, groups, turns, program, split, token, num_tokens, bias_ptr, residual_ptr,
                out_ptr, 1, num_consumers, stages, tiles, block_m, warps, features, split_k, has_bias, gated,
                has_residual, enable_pdl, leads,
            )),
            (_produce, (
                x_desc, words_desc, groups_desc, ready, free, x, words, groups, first, turns, row, token, apart,
                num_consumers, stages, group // 128, enable_pdl, leads,
            )),
        ], [4, 1], [240, 24])
    # fmt: on
