"""LoRA's two products in one kernel behind a layer's own, where that leaves partial sums: ``y = sum of them + B v``.

The layer's kernel lets this one start as soon as its own programs run. The first programs multiply A meanwhile, beside
it, and hand ``v`` to the others by marked words (``shrink_in_product``); those wait for the layer's kernel, add up its
partial sums, which some kernel has to do, and add the product of B and ``v``. So A costs no time of its own and no
launch comes in between. Tokens stay in the order of the step: a tile of them has a list of the slots that its tokens
have, as in ``appended_kernels``. Bias, gated activation and residual follow.

The inputs of the first product are cut into as many parts as keep its programs busy, since the layer's kernel has the
memory's bandwidth and every load takes long. The program of a segment's last part waits for the others, adds all in
order, and hands the sum on: it waits for programs before it alone, and the others for nothing.

Shapes: ``x`` (M, K), ``partial`` (splits, M, features), A (slots, parts, R, K), B (slots, R, features), ``out``
(M, features), half of them gated.
Grid: the programs that multiply A, then tiles of features, for each tile of tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quire.plugins.adapters.lora.appended_kernels import load_slot_b, locate_tile, multiply_slots
from quire.plugins.adapters.lora.batch import AdapterBatch
from quire.sdk import LowRankTerm
from quire.sdk.ops import DeviceProfile, mark_words, pdl_launch_dependents, pdl_wait, receive_words, supports_pdl

__all__ = ["launch_add_to_partial"]

_MAX_PARTS = 3
_MAX_ROWS = 32
"""Tokens of a tile."""
_BLOCK_N = 64
"""Features of a tile."""
_BLOCK_R = 16
_MAX_GROUP = 8
"""Slots whose B a program multiplies at a time; half as many where it does so by parts of their ranks."""
_BLOCK_K = 128
_MAX_SPLITS = 16
"""Parts into which the inputs are cut at most."""


def launch_add_to_partial(
    x: Tensor,
    partial: Tensor,
    bias: Tensor | None,
    term: LowRankTerm,
    batch: AdapterBatch,
    *,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """The layer's output (num_tokens, features) with what adapters add.

    ``x`` (num_tokens, inputs) dense, ``partial`` (splits, num_tokens, features), ``term`` whose ``shrink`` this kernel
    does. ``gated``: of two parts of one size, ``silu(first) * second``. ``residual`` (num_tokens, features) is added.
    """
    shrink, tiles = term.shrink, batch.tiles
    assert shrink is not None
    num_partials, num_tokens, features = partial.shape
    inputs, parts, max_rank = x.shape[1], len(term.part_sizes), term.b.shape[1]
    width = features // 2 if gated else features
    out = x.new_empty(num_tokens, width)
    sizes = (*term.part_sizes, *(0 for _ in range(_MAX_PARTS - parts)))
    num_tiles = sum(triton.cdiv(size, _BLOCK_N) for size in (term.part_sizes[:1] if gated else term.part_sizes))
    splits = min(_MAX_SPLITS, triton.next_power_of_2(triton.cdiv(inputs, 4 * _BLOCK_K)))
    rows = min(_MAX_ROWS, tiles.rows)
    num_sms = DeviceProfile.detect(x.device).num_sms
    programs = max(1, 2 * num_sms // _MAX_SPLITS) * _MAX_SPLITS  # so that those of a segment's parts run at a time
    assert (splits + 1) * num_tokens * parts * max_rank <= shrink.words.numel()
    enable_pdl = supports_pdl(x.device)
    add_to_partial_kernel[(programs + num_tiles * triton.cdiv(num_tokens, rows),)](
        x,
        partial,
        x if bias is None else bias,
        x if residual is None else residual,
        out,
        shrink.words,
        shrink.a,
        term.b,
        term.ranks,
        shrink.segments,
        shrink.num_live,
        shrink.token_indices,
        shrink.number,
        tiles.token_slots,
        tiles.lists,
        num_tokens,
        inputs=inputs,
        num_partials=num_partials,
        size_0=sizes[0],
        size_1=sizes[1],
        size_2=sizes[2],
        low_rank=(parts, max_rank),
        in_launch=(programs, splits, _BLOCK_K, shrink.segments.stride(0), shrink.max_polls),
        rows=rows,
        listed_rows=tiles.rows,
        list_width=tiles.lists.shape[1],
        block_n=_BLOCK_N,
        block_r=_BLOCK_R,
        group=min((_MAX_GROUP if max_rank <= _BLOCK_R else _MAX_GROUP // 2), triton.next_power_of_2(tiles.num_slots)),
        has_bias=bias is not None,
        gated=gated,
        has_residual=residual is not None,
        enable_pdl=enable_pdl,
        num_warps=4,
        launch_pdl=enable_pdl,
    )
    return out


@triton.jit(do_not_specialize=["num_tokens"])
def add_to_partial_kernel(
    x_ptr,  # (num_tokens, inputs)
    partial_ptr,  # (num_partials, num_tokens, features)
    bias_ptr,  # (features,)
    residual_ptr,  # (num_tokens, features), half of them where gated
    out_ptr,  # as residual
    words_ptr,  # (1 + splits, num_tokens, parts * max_rank) int64: v, and the parts that it is the sum of
    a_ptr,  # (slots, parts, max_rank, inputs)
    b_ptr,  # (slots, max_rank, features)
    ranks_ptr,  # (slots, parts)
    segments_ptr,  # (3, segment_stride): slot, first sorted token, number of tokens, 16 at most
    num_live_ptr,  # (1,)
    tokens_ptr,  # (num_tokens,)
    number_ptr,  # (1,)
    token_slots_ptr,  # (num_tokens,): -1 without an adapter
    lists_ptr,  # (tiles of tokens, list_width): how many slots a tile's tokens have, and which
    num_tokens,
    inputs: tl.constexpr,
    num_partials: tl.constexpr,
    size_0: tl.constexpr,
    size_1: tl.constexpr,
    size_2: tl.constexpr,
    low_rank: tl.constexpr,
    in_launch: tl.constexpr,
    rows: tl.constexpr,
    listed_rows: tl.constexpr,
    list_width: tl.constexpr,
    block_n: tl.constexpr,
    block_r: tl.constexpr,
    group: tl.constexpr,
    has_bias: tl.constexpr,
    gated: tl.constexpr,
    has_residual: tl.constexpr,
    enable_pdl: tl.constexpr,
):
    """Grid: (programs that shrink + tiles of features * tiles of tokens,)."""
    parts: tl.constexpr = low_rank[0]
    max_rank: tl.constexpr = low_rank[1]
    features: tl.constexpr = size_0 + size_1 + size_2
    width: tl.constexpr = size_0 if gated else features
    tiles_0: tl.constexpr = (size_0 + block_n - 1) // block_n
    tiles_1: tl.constexpr = 0 if gated else (size_1 + block_n - 1) // block_n
    num_tiles: tl.constexpr = tiles_0 + tiles_1 + (size_2 + block_n - 1) // block_n
    if tl.program_id(0) < in_launch[0]:
        _shrink(
            x_ptr, num_tokens, words_ptr, a_ptr, ranks_ptr, segments_ptr, num_live_ptr, tokens_ptr, number_ptr,
            inputs, enable_pdl, low_rank, in_launch,
        )  # fmt: skip
        return
    program = tl.program_id(0) - in_launch[0]
    part, columns, mask_n = locate_tile(program % num_tiles, size_0, size_1, size_2, block_n)
    tile_m = program // num_tiles
    offs_m = tile_m * rows + tl.arange(0, rows)
    mask_m = offs_m < num_tokens
    slots = tl.load(token_slots_ptr + offs_m, mask=mask_m, other=-1)
    list_at = lists_ptr + tile_m * rows // listed_rows * list_width
    count = tl.load(list_at)
    slot, b = load_slot_b(
        0, 0, list_at, b_ptr, ranks_ptr, columns, mask_n, part, list_width, features, parts, max_rank, block_r, group
    )
    b_up = b
    if gated:
        _, b_up = load_slot_b(
            0, 0, list_at, b_ptr, ranks_ptr, columns + width, mask_n, 1,
            list_width, features, parts, max_rank, block_r, group,
        )  # fmt: skip
    pdl_launch_dependents(enable_pdl)
    pdl_wait(enable_pdl)
    mask = mask_m[:, None] & mask_n[None, :]
    words = _load_words(part, 0, slots, offs_m, words_ptr, low_rank, block_r)  # most often they are there
    words_up = words
    if gated:
        words_up = _load_words(1, 0, slots, offs_m, words_ptr, low_rank, block_r)
    launch = tl.load(number_ptr, volatile=True)
    out_at = offs_m[:, None] * width + columns[None, :]
    if has_residual:
        residual = tl.load(residual_ptr + out_at, mask=mask, other=0.0)
    at = offs_m[:, None] * features + columns[None, :]
    y = _add_partials(partial_ptr, bias_ptr, at, columns, mask, mask_n, num_tokens, num_partials, features, has_bias)
    up = y
    if gated:
        up = _add_partials(
            partial_ptr, bias_ptr, at + width, columns + width, mask, mask_n, num_tokens, num_partials, features,
            has_bias,
        )  # fmt: skip
    for r in tl.static_range(0, max_rank, block_r):
        if r > 0:
            words = _load_words(part, r, slots, offs_m, words_ptr, low_rank, block_r)
        v = _receive(words, part, r, slots, offs_m, words_ptr, ranks_ptr, launch, low_rank, in_launch[4], block_r)
        y = multiply_slots(y, v.to(b.dtype), b, slots, slot, block_r, group)
        if gated:
            if r > 0:
                words_up = _load_words(1, r, slots, offs_m, words_ptr, low_rank, block_r)
            v_up = _receive(
                words_up, 1, r, slots, offs_m, words_ptr, ranks_ptr, launch, low_rank, in_launch[4], block_r
            )
            up = multiply_slots(up, v_up.to(b.dtype), b_up, slots, slot, block_r, group)
        for first in tl.range(group, count, group, num_stages=3):
            slot_of_rank, b = load_slot_b(
                first, r, list_at, b_ptr, ranks_ptr, columns, mask_n, part,
                list_width, features, parts, max_rank, block_r, group,
            )  # fmt: skip
            y = multiply_slots(y, v.to(b.dtype), b, slots, slot_of_rank, block_r, group)
            if gated:
                _, b_up = load_slot_b(
                    first, r, list_at, b_ptr, ranks_ptr, columns + width, mask_n, 1,
                    list_width, features, parts, max_rank, block_r, group,
                )  # fmt: skip
                up = multiply_slots(up, v_up.to(b.dtype), b_up, slots, slot_of_rank, block_r, group)
        if r + block_r < max_rank:
            slot, b = load_slot_b(
                0, r + block_r, list_at, b_ptr, ranks_ptr, columns, mask_n, part,
                list_width, features, parts, max_rank, block_r, group,
            )  # fmt: skip
            if gated:
                _, b_up = load_slot_b(
                    0, r + block_r, list_at, b_ptr, ranks_ptr, columns + width, mask_n, 1,
                    list_width, features, parts, max_rank, block_r, group,
                )  # fmt: skip
    if gated:
        y = y / (1.0 + tl.exp(-y)) * up
    if has_residual:
        y += residual.to(tl.float32)
    tl.store(out_ptr + out_at, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_partials(
    partial_ptr, bias_ptr, at, columns, mask, mask_n, num_tokens,
    num_partials: tl.constexpr, features: tl.constexpr, has_bias: tl.constexpr,
):  # fmt: skip
    """Partial sums, in order, and the bias: (rows, block_n) float32."""
    y = tl.load(partial_ptr + at, mask=mask, other=0.0).to(tl.float32)
    for split in tl.static_range(1, num_partials):
        first = split * num_tokens * features
        y += tl.load(partial_ptr + first + at, mask=mask, other=0.0).to(tl.float32)
    if has_bias:
        y += tl.load(bias_ptr + columns, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def _shrink(
    x_ptr, num_tokens, words_ptr, a_ptr, ranks_ptr, segments_ptr, num_live_ptr, tokens_ptr, number_ptr,
    inputs: tl.constexpr, enable_pdl: tl.constexpr, low_rank: tl.constexpr, in_launch: tl.constexpr,
):  # fmt: skip
    """Segments of tokens of one adapter times 16 rows of its A, by parts of the inputs; the programs share them out."""
    parts: tl.constexpr = low_rank[0]
    max_rank: tl.constexpr = low_rank[1]
    programs: tl.constexpr = in_launch[0]
    block_k: tl.constexpr = in_launch[2]
    segment_stride: tl.constexpr = in_launch[3]
    blocks: tl.constexpr = parts * max_rank // 16
    num_pairs = tl.load(num_live_ptr) * blocks
    splits = in_launch[1]
    while (splits > 1) & (num_pairs * splits > programs):
        splits //= 2
    turns = tl.cdiv(inputs, splits * block_k)  # of a part, the last one's may be fewer
    offs_m, offs_r, offs_k = tl.arange(0, 16), tl.arange(0, 16), tl.arange(0, block_k)
    pdl_launch_dependents(enable_pdl)
    launch = tl.load(number_ptr, volatile=True)
    size = num_tokens * (parts * max_rank)
    for item in range(tl.program_id(0), num_pairs * splits, programs):
        pair, split = item // splits, item % splits
        segment, block = pair // blocks, pair % blocks
        part, first_rank = block * 16 // max_rank, block * 16 % max_rank
        slot = tl.load(segments_ptr + segment).to(tl.int64)
        start = tl.load(segments_ptr + segment_stride + segment)
        mask_m = offs_m < tl.load(segments_ptr + 2 * segment_stride + segment)
        mask_r = first_rank + offs_r < max_rank
        if max_rank > 16:  # else all of it is written, and zero beyond the adapter's
            mask_r = first_rank + offs_r < tl.load(ranks_ptr + slot * parts + part)
        tokens = tl.load(tokens_ptr + start + offs_m, mask=mask_m, other=0)
        x_rows = x_ptr + tokens[:, None] * inputs
        a_rows = a_ptr + ((slot * parts + part) * max_rank + first_rank + offs_r)[None, :] * inputs
        v = tl.zeros((16, 16), dtype=tl.float32)
        for turn in tl.range(0, turns, num_stages=4):
            at = (split * turns + turn) * block_k + offs_k
            mask_k = at < inputs
            x = tl.load(x_rows + at[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            a = tl.load(a_rows + at[:, None], mask=mask_k[:, None] & mask_r[None, :], other=0.0)
            v = tl.dot(x.to(a.dtype), a, v, input_precision="ieee")
        words_at = words_ptr + (tokens[:, None] * (parts * max_rank) + part * max_rank + first_rank + offs_r[None, :])
        mask = mask_m[:, None] & mask_r[None, :]
        if split + 1 < splits:
            tl.store(words_at + (1 + split) * size, mark_words(v, launch), mask=mask)
        else:
            others = tl.arange(0, 8)[:, None, None]
            for first in range(0, splits - 1, 8):  # as many at a time as registers hold
                at = words_at[None, :, :] + (1 + first + others) * size
                present = mask[None, :, :] & (first + others < splits - 1)
                words = tl.load(at, mask=present, other=0, volatile=True)
                v += tl.sum(receive_words(words, at, present, present, launch, in_launch[4]), axis=0)
            tl.store(words_at, mark_words(v, launch), mask=mask)


@triton.jit
def _get_words_at(part, r, offs_m, words_ptr, low_rank: tl.constexpr, block_r: tl.constexpr):
    offs_r = r + tl.arange(0, block_r)
    return words_ptr + (offs_m[:, None] * low_rank[0] + part) * low_rank[1] + offs_r[None, :], offs_r < low_rank[1]


@triton.jit
def _load_words(part, r, slots, offs_m, words_ptr, low_rank: tl.constexpr, block_r: tl.constexpr):
    at, mask_r = _get_words_at(part, r, offs_m, words_ptr, low_rank, block_r)
    return tl.load(at, mask=(slots >= 0)[:, None] & mask_r[None, :], other=0, volatile=True)


@triton.jit
def _receive(
    words, part, r, slots, offs_m, words_ptr, ranks_ptr, launch,
    low_rank: tl.constexpr, max_polls: tl.constexpr, block_r: tl.constexpr,
):  # fmt: skip
    """What each token's own slot made of it, the ranks ``r ...`` of ``part``, (rows, block_r) float32: zero beyond the
    adapter's rank, and where a token has none. ``words`` were loaded before."""
    at, mask_r = _get_words_at(part, r, offs_m, words_ptr, low_rank, block_r)
    present = (slots >= 0)[:, None] & mask_r[None, :]
    mask = present
    if low_rank[1] > 16:
        rank = tl.load(ranks_ptr + tl.maximum(slots, 0) * low_rank[0] + part, mask=slots >= 0, other=0)
        mask = present & ((r + tl.arange(0, block_r))[None, :] < rank[:, None])
    return receive_words(words, at, present, mask, launch, max_polls)
