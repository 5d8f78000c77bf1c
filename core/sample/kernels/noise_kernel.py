"""The noise of ``quire.core.sample.noise`` inside a kernel: the same bits, the logarithms by approximation.

Only the first word of Philox is needed, of counters whose last two words are zero, so the products that are not read
are left out: 17 multiplications instead of 40. Each is one 32 x 32 -> 64 bit product, of which both halves are used.
The noise of a whole vocabulary is what a pass of random sampling spends its instructions on.

``fast`` is a constant of the kernel: inline PTX on a GPU, and Triton's own operations in the interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["device_exp", "device_gumbel", "device_log", "device_philox"]

_ROUND_A = tl.constexpr(0xD2511F53)
_ROUND_B = tl.constexpr(0xCD9E8D57)
_KEY_A = tl.constexpr(0x9E3779B9)
_KEY_B = tl.constexpr(0xBB67AE85)


@triton.jit
def _product(x, y: tl.constexpr, fast: tl.constexpr):
    """High and low words of the product of uint32 ``x`` and a constant. The compiler would multiply twice."""
    if fast:
        high, low = tl.inline_asm_elementwise(
            "{ .reg .u64 p; mul.wide.u32 p, $2, $3; mov.b64 {$1, $0}, p; }",
            "=r,=r,r,r",  # one wide product whose halves are two registers
            [x, tl.full((), y, tl.uint32)],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
    else:
        wide = x.to(tl.uint64) * y
        high, low = (wide >> 32).to(tl.uint32), wide.to(tl.uint32)
    return high, low


@triton.jit
def device_philox(seed, position, token, fast: tl.constexpr):
    """First word of Philox-4x32-10: ``seed`` int64 and ``position`` scalars, ``token`` a tensor. Returns uint32."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    c0 = token.to(tl.uint32)
    c1 = (token * 0).to(tl.uint32) + position.to(tl.uint32)
    c2 = (token * 0).to(tl.uint32)
    c3 = c2
    for _ in tl.static_range(10):
        a_high, a_low = _product(c0, _ROUND_A, fast)
        b_high, b_low = _product(c2, _ROUND_B, fast)
        c0 = b_high ^ c1 ^ k0
        c1 = b_low
        c2 = a_high ^ c3 ^ k1
        c3 = a_low
        k0 = tl.add(k0, _KEY_A, sanitize_overflow=False)
        k1 = tl.add(k1, _KEY_B, sanitize_overflow=False)
    return c0


@triton.jit
def device_exp(x, fast: tl.constexpr):
    """Exponential of float32; ``fast`` is two instructions, within 2**-21 of it, and 0 below 2**-126."""
    if fast:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * 1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp(x)


@triton.jit
def device_log(x, fast: tl.constexpr):
    """Natural logarithm of positive normal float32; ``fast`` is two instructions, with an absolute error of 2e-7."""
    if fast:
        two = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )  # fmt: skip
        return two * 0.6931471805599453
    else:
        return tl.log(x)


@triton.jit
def device_gumbel(seed, position, token, fast: tl.constexpr):
    """``-log(-log(1 - u))``, float32, as ``quire.core.sample.noise.gumbel``; within 1e-5 of it where ``fast``."""
    # (bits + 0.5) * 2**-32 as one multiply-add: never 0, so the outer logarithm is finite.
    u = device_philox(seed, position, token, fast).to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    u = tl.minimum(u, 0.99999994)  # 1 - 2**-24: float32 rounds the highest bits up to 1
    # -log(1 - u). Near u = 0, where the largest noise comes from, 1 - u would lose u's digits: the series keeps them.
    series = u * (1.0 + u * (0.5 + u * (0.33333334 + u * 0.25)))
    exponential = tl.where(u < 0.03125, series, -device_log(1.0 - u, fast))
    return -device_log(exponential, fast)
