"""Weights of 4 or 8 bits as the tensor cores want them: the order in memory, and the way from there into registers.

Words of 32 bits lie in tiles of 16 rows and ``span = 512 / bits`` inputs (1 KiB). With ``g`` a row of eight, ``i`` the
upper or lower half of the tile's rows and ``k = 4 t + 2 h + e`` one of sixteen inputs, a tile is ``[h, g, t, i, e]``,
and code ``j`` of a word belongs to row ``8 i + g`` and input ``16 j + k``. So the 16 bytes that a thread reads hold
what it has to feed to an ``m16n8k16`` product (and, four warps together, to ``wgmma``), and nothing moves between
threads. A row's scale and zero point are one word a group: the upper 24 bits of the float32 scale, and the zero point.

Two codes become a pair of numbers by one logical operation: ``0x4300 | code`` is ``128 + code`` in bfloat16, ``0x6400 |
code`` is ``1024 + code`` in float16 (after Kim et al., 2022, "Who says elephants can't run", arXiv:2211.10017).
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["build_unpack_ptx", "get_rows", "get_scales", "get_tiles", "load_groups", "store_output", "unpack_words"]


def build_unpack_ptx(bits: int, half: bool, scaled: bool) -> tl.constexpr:
    """PTX for two words: ``32 / bits`` pairs of numbers. ``half`` is float16, else bfloat16."""
    pairs = 32 // bits
    kind, one, magic = ("f16x2", "0x3C003C00", "0x64006400") if half else ("bf16x2", "0x3F803F80", "0x43004300")
    lines = [
        f".reg .b32 a<2>, t<{pairs}>, c, d, one, nil, less, more;",
        f"mov.b32 one, {one};",
        "mov.b32 nil, 0x80008000;",
        "mov.b32 less, 0xC300C300;",
        "mov.b32 more, 0x42804280;",
        f"prmt.b32 a0, ${pairs}, ${pairs + 1}, 0x5410;",
        f"prmt.b32 a1, ${pairs}, ${pairs + 1}, 0x7632;",
    ]
    for j in range(pairs):
        word, shift = f"a{j * bits // 16}", j * bits % 16
        zero = f"${pairs + 2 + j * bits // 8 * scaled}"
        if shift:
            lines.append(f"shr.u32 c, {word}, {shift};")
            word = "c"
        if bits == 4 or half:
            mask = "0x000F000F" if bits == 4 else "0x00FF00FF"
            lines.append(f"lop3.b32 t{j}, {word}, {mask}, {magic}, 0xEA;")
            lines.append(f"fma.rn.{kind} t{j}, t{j}, one, {zero};")
        else:  # 128 + the lower seven bits, and the upper one as 0 or 2
            lines.append(f"and.b32 d, {word}, 0x00800080;")
            lines.append("shl.b32 d, d, 7;")
            lines.append(f"lop3.b32 t{j}, {word}, 0x007F007F, {magic}, 0xEA;")
            lines.append(f"fma.rn.{kind} t{j}, t{j}, one, less;")
            lines.append(f"fma.rn.{kind} d, d, more, {zero};")
            lines.append(f"fma.rn.{kind} t{j}, d, one, t{j};")
        if scaled:
            lines.append(f"fma.rn.{kind} t{j}, t{j}, ${pairs + 6 + j * bits // 8}, nil;")
    lines += [f"mov.b32 ${j}, t{j};" for j in range(pairs)]
    return tl.constexpr("{\n" + "\n".join(lines) + "\n}")


def _registers(out: int, operands: int) -> tl.constexpr:
    return tl.constexpr(",".join(["=r"] * out + ["r"] * operands))


_BF16_4, _BF16_4_SCALED = build_unpack_ptx(4, False, False), build_unpack_ptx(4, False, True)
_F16_4, _F16_4_SCALED = build_unpack_ptx(4, True, False), build_unpack_ptx(4, True, True)
_BF16_8, _BF16_8_SCALED = build_unpack_ptx(8, False, False), build_unpack_ptx(8, False, True)
_F16_8, _F16_8_SCALED = build_unpack_ptx(8, True, False), build_unpack_ptx(8, True, True)
_REGISTERS_8_3, _REGISTERS_8_10 = _registers(8, 3), _registers(8, 10)
_REGISTERS_4_3, _REGISTERS_4_10 = _registers(4, 3), _registers(4, 10)


@triton.jit
def get_tiles(program, features: tl.constexpr, tiles: tl.constexpr, gated: tl.constexpr):
    """The tiles of rows a program takes, within bounds. Gated, they are pairs of a gate and its up projection."""
    tile = program * tiles + tl.arange(0, tiles)
    if gated:
        tile = tile // 2 + tile % 2 * (features // 32)
    return tl.minimum(tile, (features + 15) // 16 - 1)


@triton.jit
def get_rows(program, features: tl.constexpr, tiles: tl.constexpr, gated: tl.constexpr):
    """The layer's rows in the order of ``unpack_words``, within bounds, and whether they were in bounds."""
    row = tl.arange(0, tiles * 16)
    if gated:
        pair = (program * (tiles // 2) + row // 32) * 16
        row = pair + row // 16 % 2 * 8 + row % 8 + row // 8 % 2 * (features // 2)
    else:
        row += program * tiles * 16
    # a program beyond the last pair of tiles holds rows of another; those of gates tell by their place alone
    mask_n = (program * (tiles * 8) + tl.arange(0, tiles * 16) // 32 * 16 < features // 2) if gated else row < features
    return tl.minimum(row, features - 1), mask_n


@triton.jit
def load_groups(
    groups_ptr,  # (tiles, groups, 16) int32
    tile,
    block,  # (slice_k,)
    inputs: tl.constexpr,
    group: tl.constexpr,
    span: tl.constexpr,
):
    """Scale and zero point of the quarters of a block, each (slice_k, tiles, 16)."""
    count: tl.constexpr = (inputs + group - 1) // group
    at = tile[None, :, None] * (count * 16) + tl.arange(0, 16)[None, None, :]
    first = block[:, None, None] * span
    a = tl.load(groups_ptr + at + first // group * 16)
    if group >= span:
        out = (a, a, a, a)
    else:
        quarter: tl.constexpr = span // 4
        last: tl.constexpr = count - 1
        b = tl.load(groups_ptr + at + tl.minimum((first + quarter) // group, last) * 16)
        c = tl.load(groups_ptr + at + tl.minimum((first + 2 * quarter) // group, last) * 16)
        d = tl.load(groups_ptr + at + tl.minimum((first + 3 * quarter) // group, last) * 16)
        out = (a, b, c, d)
    return out


@triton.jit
def get_scales(m, tiles: tl.constexpr, slice_k: tl.constexpr, gated: tl.constexpr):
    """(slice_k, tiles, 16) -> float32 (slice_k, tiles * 16, 1), rows in the order of ``unpack_words``."""
    s = (m & -256).to(tl.float32, bitcast=True)
    if gated:
        s = tl.permute(tl.reshape(s, (slice_k, tiles // 2, 2, 8, 2)), (0, 1, 4, 2, 3))
    else:
        s = tl.permute(tl.reshape(s, (slice_k, tiles, 8, 2)), (0, 1, 3, 2))
    return tl.reshape(s, (slice_k, tiles * 16, 1))


@triton.jit
def unpack_words(
    words,  # (slice_k, tiles, 2, 128) int32
    groups,  # four of (slice_k, tiles, 16) int32
    bits: tl.constexpr,
    gated: tl.constexpr,
    scaled: tl.constexpr,
    native: tl.constexpr,
    dtype: tl.constexpr,
):
    """(slice_k, tiles * 16, span) of ``dtype``: codes less their zero points, times their scales if ``scaled``.

    Gated, rows are ``[pair of tiles, i, gate or up, g]``, so that a thread holds both of a pair. Not ``native``: the
    same by plain operations, for the interpreter and other types than float16 and bfloat16.
    """
    tiles: tl.constexpr = words.shape[1]
    slice_k: tl.constexpr = words.shape[0]
    p = tl.reshape(words, (slice_k, tiles, 2, 8, 4, 2, 2))
    if native:
        offset: tl.constexpr = 1024.0 if dtype == tl.float16 else (128.0 if bits == 4 else 0.0)
        n0, s0 = _constants(groups[0], offset, tiles, slice_k, dtype)
        n1, s1 = _constants(groups[1], offset, tiles, slice_k, dtype)
        n2, s2 = _constants(groups[2], offset, tiles, slice_k, dtype)
        n3, s3 = _constants(groups[3], offset, tiles, slice_k, dtype)
        c = _unpack_native(p, (n0, n1, n2, n3), (s0, s1, s2, s3), bits, scaled, dtype)
    else:
        c = _unpack_plain(p, groups, bits, scaled, dtype)
    # to (way, tile, h, g, t, i, e, bits of j), j's lowest bit last, then to (way, tile, i, g, bits of j, t, h, e)
    if bits == 4:
        w = tl.join(
            tl.join(tl.join(c[0], c[4]), tl.join(c[2], c[6])), tl.join(tl.join(c[1], c[5]), tl.join(c[3], c[7]))
        )
        if gated:
            w = tl.reshape(w, (slice_k, tiles // 2, 2, 2, 8, 4, 2, 2, 2, 2, 2))
            w = tl.permute(w, (0, 1, 6, 2, 4, 8, 9, 10, 5, 3, 7))
        else:
            w = tl.permute(w, (0, 1, 5, 3, 7, 8, 9, 4, 2, 6))
    else:
        w = tl.join(tl.join(c[0], c[2]), tl.join(c[1], c[3]))
        if gated:
            w = tl.reshape(w, (slice_k, tiles // 2, 2, 2, 8, 4, 2, 2, 2, 2))
            w = tl.permute(w, (0, 1, 6, 2, 4, 8, 9, 5, 3, 7))
        else:
            w = tl.permute(w, (0, 1, 5, 3, 7, 8, 4, 2, 6))
    return tl.reshape(w, (slice_k, tiles * 16, 512 // bits))


@triton.jit
def store_output(
    y,  # (tiles * 16, tokens) float32, rows in the order of ``unpack_words``
    program,
    offs_m,  # (tokens,)
    num_tokens,
    residual_ptr,  # (num_tokens, width): width is features, or half of them where gated
    out_ptr,
    features: tl.constexpr,
    tiles: tl.constexpr,
    gated: tl.constexpr,
    has_residual: tl.constexpr,
):
    """Activate, add and store, rounding once."""
    kept: tl.constexpr = tiles * 8 if gated else tiles * 16
    width: tl.constexpr = features // 2 if gated else features
    if gated:
        pairs = tl.permute(tl.reshape(y, (tiles, 2, 8, y.shape[1])), (0, 2, 3, 1))
        gate, up = tl.split(pairs)
        y = tl.reshape(gate / (1.0 + tl.exp(-gate)) * up, (kept, y.shape[1]))
    row = program * kept + tl.arange(0, kept)
    at = offs_m.to(tl.int64)[None, :] * width + row[:, None]
    inside = (row < width)[:, None] & (offs_m < num_tokens)[None, :]
    if has_residual:
        y += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _constants(m, offset: tl.constexpr, tiles: tl.constexpr, slice_k: tl.constexpr, dtype: tl.constexpr):
    """``-(zero point + offset)`` and the scale, to be broadcast to a block's words."""
    m = tl.reshape(m, (slice_k, tiles, 1, 8, 1, 2, 1))
    return (-offset - (m & 255).to(tl.float32)).to(dtype), (m & -256).to(tl.float32, bitcast=True).to(dtype)


@triton.jit
def _unpack_native(p, n, s, bits: tl.constexpr, scaled: tl.constexpr, dtype: tl.constexpr):
    """A tensor for each code of a word. Two words of a thread at a time, whose codes become one register."""
    operands = [p, n[0], n[1], n[2], n[3], s[0], s[1], s[2], s[3]] if scaled else [p, n[0]]
    if dtype == tl.float16:
        if bits == 4:
            c = tl.inline_asm_elementwise(
                _F16_4_SCALED if scaled else _F16_4,
                _REGISTERS_8_10 if scaled else _REGISTERS_8_3,
                operands,
                (tl.float16,) * 8,
                True,
                2,
            )
        else:
            c = tl.inline_asm_elementwise(
                _F16_8_SCALED if scaled else _F16_8,
                _REGISTERS_4_10 if scaled else _REGISTERS_4_3,
                operands,
                (tl.float16,) * 4,
                True,
                2,
            )
    else:
        if bits == 4:
            c = tl.inline_asm_elementwise(
                _BF16_4_SCALED if scaled else _BF16_4,
                _REGISTERS_8_10 if scaled else _REGISTERS_8_3,
                operands,
                (tl.bfloat16,) * 8,
                True,
                2,
            )
        else:
            c = tl.inline_asm_elementwise(
                _BF16_8_SCALED if scaled else _BF16_8,
                _REGISTERS_4_10 if scaled else _REGISTERS_4_3,
                operands,
                (tl.bfloat16,) * 4,
                True,
                2,
            )
    return c


@triton.jit
def _unpack_plain(p, groups, bits: tl.constexpr, scaled: tl.constexpr, dtype: tl.constexpr):
    """As ``_unpack_native``."""
    out = ()
    for j in tl.static_range(32 // bits):
        m = tl.reshape(groups[j * bits // 8], (p.shape[0], p.shape[1], 1, 8, 1, 2, 1))
        c = ((p >> (j * bits)) & ((1 << bits) - 1)).to(tl.float32) - (m & 255).to(tl.float32)
        if scaled:
            c *= (m & -256).to(tl.float32, bitcast=True)
        out = out + (c.to(dtype),)  # type: ignore[assignment]  # noqa: RUF005
    return out
