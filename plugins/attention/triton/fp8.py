"""FP8 keys and values, read as 16-bit words of two neighbouring features.

Words are what shared memory hands to tensor cores whole and transposed (``ldmatrix``); single bytes it does not. The
first and the second features of the words of a tile become two tiles of float16, which holds every FP8 number: one
product is the sum of two, and values have two sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["converts", "features_of", "queries_for", "scale_of"]

_QUERIES = tl.constexpr(0.0625)


def converts(device: torch.device) -> bool:
    """Whether ``device`` has conversions from FP8; a CPU stands for one that has, unless it interprets."""
    if triton.knobs.runtime.interpret:
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


@triton.jit
def features_of(words, e4m3: tl.constexpr, fast: tl.constexpr):
    """(first, second) features of int16 words as float16.

    ``fast``: two words at a time, by the instructions of compute capability 8.9. Else, of e4m3, 2**-8 of the features:
    the bits of a number whose exponent is one bit shorter, moved to where float16 has them, subnormal numbers
    included; NaN is not kept.
    """
    if fast:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 t; .reg .b16 first, second;
            prmt.b32 t, $2, 0, 0x3120; mov.b32 {first, second}, t;
            cvt.rn.f16x2.e4m3x2 $0, first; cvt.rn.f16x2.e4m3x2 $1, second; }"""
            if e4m3
            else "prmt.b32 $0, $2, 0, 0x2404; and.b32 $1, $2, 0xff00ff00;",
            "=r,=r,r",
            [words],
            (tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    if e4m3:
        first, second = ((words & 0x7F) << 7) | ((words & 0x80) << 8), ((words >> 1) & 0x3F80) | (words & -32768)
    else:  # float16 without its last byte
        first, second = words << 8, words & -256
    return first.to(tl.float16, bitcast=True), second.to(tl.float16, bitcast=True)


@triton.jit
def scale_of(scale_ptr, e4m3: tl.constexpr, fast: tl.constexpr):
    """What features are to be multiplied by: the layer's scale, and what ``features_of`` leaves out."""
    return tl.load(scale_ptr) * (256.0 if e4m3 and not fast else 1.0)


@triton.jit
def queries_for(q, unit, precise: tl.constexpr):
    """(queries as they meet keys of one byte, ``unit`` of their products).

    Both are float16, which holds every such key; a sixteenth of a query is exact, and of a million still finite. The
    keys' own scale belongs to the scores, in float32: it may be of any size.
    """
    if not precise:
        q = (q * _QUERIES).to(tl.float16)
        unit = unit / _QUERIES
    return q, unit
