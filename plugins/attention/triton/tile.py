"""One tile of attention: a block of keys met by a block of query rows, with the running softmax of FlashAttention.

Rows are (token, head of the group) pairs; keys come page by page through the block table. Scores are kept in base two:
``peak`` and ``mass`` are the running maximum of ``score * log2(e)`` and the sum of the powers (Dao, 2023,
arXiv:2307.08691).
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["LN2", "LOG2E", "attend_tile", "blocks_of", "finish_rows", "scaled"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def attend_tile(
    q,  # (rows, dim_pad)
    acc,  # (rows, v_dim_pad) float32
    peak,  # (rows,) float32
    mass,  # (rows,) float32
    position,  # (rows,) of each row's query
    k_ptr,  # of this KV head
    v_ptr,
    block,  # (keys,) int32: the block of each key below ``high``
    first_key,
    low,  # keys below are seen by no row
    high,  # nor are keys from here on
    k_block: tl.constexpr,
    k_slot: tl.constexpr,
    v_block: tl.constexpr,
    v_slot: tl.constexpr,
    page: tl.constexpr,
    dim: tl.constexpr,
    dim_pad: tl.constexpr,
    v_dim: tl.constexpr,
    v_dim_pad: tl.constexpr,
    scale,
    softcap: tl.constexpr,
    window: tl.constexpr,
    masked: tl.constexpr,
    keys: tl.constexpr,
    precision: tl.constexpr,
):
    """Add keys ``first_key .. first_key + keys`` to ``(acc, peak, mass)``. Not ``masked``: every row sees them all."""
    key = first_key + tl.arange(0, keys)
    d = tl.arange(0, dim_pad)
    e = tl.arange(0, v_dim_pad)
    k_at = k_ptr + (block.to(tl.int64) * k_block + (key % page) * k_slot)[:, None] + d[None, :]
    v_at = v_ptr + (block.to(tl.int64) * v_block + (key % page) * v_slot)[:, None] + e[None, :]
    live = (key >= low) & (key < high)
    if masked:
        k = tl.load(k_at, mask=live[:, None] & (d < dim)[None, :], other=0.0)  # (keys, dim_pad)
    elif dim != dim_pad:
        k = tl.load(k_at, mask=(d < dim)[None, :], other=0.0)
    else:
        k = tl.load(k_at)
    score = scaled(tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=precision), scale, softcap)  # (rows, keys)
    if masked:
        seen = live[None, :] & (key[None, :] <= position[:, None])
        if window > 0:
            seen = seen & (key[None, :] > position[:, None] - window)
        score = tl.where(seen, score, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(score, 1))
    # A row that has seen nothing yet keeps peak = -inf; subtracting zero instead gives p = 0, not NaN.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak) if masked else new_peak
    p = tl.exp2(score - base[:, None])
    shrink = tl.exp2(peak - base)
    mass = mass * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    if masked:
        v = tl.load(v_at, mask=live[:, None] & (e < v_dim)[None, :], other=0.0)  # (keys, v_dim_pad)
    elif v_dim != v_dim_pad:
        v = tl.load(v_at, mask=(e < v_dim)[None, :], other=0.0)
    else:
        v = tl.load(v_at)
    acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc, input_precision=precision)
    return acc, new_peak, mass


@triton.jit
def blocks_of(table_ptr, first_key, high, page: tl.constexpr, keys: tl.constexpr):
    """(keys,) int32: the blocks of so many keys, 0 from ``high`` on.

    Loops carry them from one tile to the next: loads through a table entry read in the same turn are pipelined
    half as deep.
    """
    key = first_key + tl.arange(0, keys)
    return tl.load(table_ptr + key // page, mask=key < high, other=0)


@triton.jit
def scaled(score, scale, softcap: tl.constexpr):
    """Products of queries and keys as scores in base two."""
    if softcap > 0:
        # tanh(x) = 1 - 2 / (exp(2x) + 1); the power of two carries the 2 and the base.
        power = tl.exp2(score * (2.0 * scale / softcap * LOG2E))
        return (softcap * LOG2E) * (1.0 - 2.0 / (power + 1.0))
    else:
        return score * (scale * LOG2E)


@triton.jit
def finish_rows(acc, peak, mass):
    """(output, log-sum-exp in base two) of each row; a row that saw no key gives zeros and -inf."""
    seen = mass > 0
    total = tl.where(seen, mass, 1.0)
    return acc / total[:, None], tl.where(seen, peak + tl.log2(total), float("-inf"))
