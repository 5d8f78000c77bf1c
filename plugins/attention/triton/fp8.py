"""FP8 keys and values, read as 16-bit words of two neighbouring elements of a head.

``ldmatrix`` hands 16-bit words from shared memory to tensor cores whole and transposed; single bytes it does not. The
first and the second elements of a tile's words become two tiles of float16, which holds every FP8 number: QK^T is the
sum of two products, and PV has two accumulators, interleaved at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.sdk.ops import DeviceProfile

__all__ = ["has_fp8_conversion", "load_kv_scale", "prepare_fp8_queries", "unpack_fp8_pairs"]

_QUERY_SCALE = tl.constexpr(0.0625)


def has_fp8_conversion(device: torch.device) -> bool:
    """Whether ``device`` has instructions that convert FP8. A CPU stands for a GPU that has (compiling ahead of time),
    unless it interprets."""
    if triton.knobs.runtime.interpret:
        return False
    return DeviceProfile.detect(device).has_fp8


@triton.jit
def unpack_fp8_pairs(words, is_e4m3: tl.constexpr, native_fp8: tl.constexpr):
    """(first, second) elements of int16 words as float16.

    ``native_fp8``: two words at a time, by the instructions of compute capability 8.9. Else, of e4m3, 2**-8 of the
    elements: the bits of a number whose exponent is one bit shorter, moved to where float16 has them, subnormal numbers
    included; NaN is not kept.
    """
    if native_fp8:
        # e4m3: prmt sorts the four bytes into the two words' first and second elements, cvt converts pairs.
        # e5m2 is float16 without its last byte: prmt and and put a zero byte below each element.
        return tl.inline_asm_elementwise(
            """{ .reg .b32 t; .reg .b16 first, second;
            prmt.b32 t, $2, 0, 0x3120; mov.b32 {first, second}, t;
            cvt.rn.f16x2.e4m3x2 $0, first; cvt.rn.f16x2.e4m3x2 $1, second; }"""
            if is_e4m3
            else "prmt.b32 $0, $2, 0, 0x2404; and.b32 $1, $2, 0xff00ff00;",
            "=r,=r,r",
            [words],
            (tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    if is_e4m3:
        first, second = ((words & 0x7F) << 7) | ((words & 0x80) << 8), ((words >> 1) & 0x3F80) | (words & -32768)
    else:
        first, second = words << 8, words & -256
    return first.to(tl.float16, bitcast=True), second.to(tl.float16, bitcast=True)


@triton.jit
def load_kv_scale(scale_ptr, is_e4m3: tl.constexpr, native_fp8: tl.constexpr):
    """What unpacked elements are to be multiplied by: the layer's scale, and the 2**8 that ``unpack_fp8_pairs`` leaves
    out."""
    return tl.load(scale_ptr) * (256.0 if is_e4m3 and not native_fp8 else 1.0)


@triton.jit
def prepare_fp8_queries(q, qk_scale, is_float32: tl.constexpr):
    """(queries to multiply with FP8 keys, ``qk_scale`` for their products).

    16-bit queries become float16, which holds every FP8 key; a sixteenth of a query is exact, and of a million still
    finite. The keys' own scale belongs to the scores, in float32: it may be of any size.
    """
    if not is_float32:
        q = (q * _QUERY_SCALE).to(tl.float16)
        qk_scale = qk_scale / _QUERY_SCALE
    return q, qk_scale
