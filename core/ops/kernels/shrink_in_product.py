"""The first product of adapters, ``v = A x``, in the launch of the layer's own product, beside the weights' programs.

Algorithm: the first programs of the grid multiply A's rows by the layer's input and hand ``v`` to the others, which
meanwhile stream the weights, and add ``B v`` in their epilogue. So A travels beside the weights, and no kernel stands
before the product. What is handed over are words of 8 bytes, a float32 and the number of the launch (as NCCL's LL
protocol does): whoever finds the number finds the value, so there is no flag to set behind the values and none to read
before them. The number is read from memory, where every forward pass begins with new ones for all layers, so that
nothing depends on the host, and CUDA graphs may be replayed. Partial sums are added in order, without atomics.

No program waits for one that cannot run: those that wait have higher numbers in the grid than those that they wait for,
a GPU starts programs in the order of their numbers, and the first ones wait for nothing but the kernels before. With
PDL the next kernel starts once every program of this one has started.

Shapes: ``words`` (splits, num_tokens, parts * max_rank) int64, which all layers share, since launches follow each
other; ``number`` (1,) int32, a layer's own.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from quire.core.contracts.quant import ShrinkInProduct
from quire.core.ops.kernels.linear_epilogue import Epilogue, find_part
from quire.core.ops.kernels.pdl import pdl_launch_dependents, pdl_wait

__all__ = [
    "add_adapters",
    "add_shrink",
    "find_adapters",
    "load_adapters",
    "mark_words",
    "pack_shrink_operands",
    "receive_words",
    "shrink_segments",
]

_MAX_SPLITS = 8
_BLOCK_K = 128
_PROGRAMS = 32
"""That shrink: few, since what they take of the places on the SMs the weights' programs wait for."""


def add_shrink(options: dict[str, Any], inputs: int, block_m: int, epilogue: Epilogue) -> int:
    """Add to a kernel's ``options`` what programs take that shrink segments, where they do: how many they are. The
    kernel multiplies ``block_m`` tokens at most."""
    term = epilogue.get("adapters")
    if term is None or term.shrink is None:
        return 0
    shrink = term.shrink
    blocks = term.b.shape[1] // 16 * len(term.part_sizes)
    # By the constants of the kernel, so that no number of tokens or adapters is the first to be compiled for.
    splits: int = min(_MAX_SPLITS, triton.cdiv(inputs, 1024))
    programs = _PROGRAMS
    options |= pack_shrink_operands(shrink, splits * block_m * blocks * 16)
    options |= {
        "segments_ptr": shrink.segments,
        "num_live_ptr": shrink.num_live,
        "tokens_ptr": shrink.token_indices,
        "active_ptr": shrink.active_slots,
        "in_launch": (programs, splits, _BLOCK_K, shrink.segments.stride(0), shrink.max_polls),
    }
    return programs


def pack_shrink_operands(shrink: ShrinkInProduct, num_words: int) -> dict[str, Any]:
    """What every kernel takes of ``shrink``, by name."""
    assert num_words <= shrink.words.numel(), f"{num_words} numbers to hand over, and room for {shrink.words.numel()}"
    return {"v_ptr": shrink.words, "a_ptr": shrink.a, "number_ptr": shrink.number}


@triton.jit
def shrink_segments(
    x_ptr,  # (num_tokens, inputs)
    norm_ptr,  # (inputs,)
    num_tokens,
    words_ptr,  # (splits, num_tokens, parts * max_rank)
    a_ptr,  # (slots, parts, max_rank, inputs)
    ranks_ptr,  # (slots, parts)
    segments_ptr,  # (3, segment_stride): slot, first sorted token, number of tokens, 16 at most
    num_live_ptr,  # (1,)
    tokens_ptr,  # (num_tokens,)
    number_ptr,
    inputs: tl.constexpr,
    has_norm: tl.constexpr,
    enable_pdl: tl.constexpr,
    low_rank: tl.constexpr,
    in_launch: tl.constexpr,
):
    """Segments of tokens of one adapter times 16 rows of its A, by parts of the inputs; the programs share them out."""
    parts: tl.constexpr = low_rank[0]
    max_rank: tl.constexpr = low_rank[1]
    programs: tl.constexpr = in_launch[0]
    splits: tl.constexpr = in_launch[1]
    block_k: tl.constexpr = in_launch[2]
    segment_stride: tl.constexpr = in_launch[3]
    blocks: tl.constexpr = parts * max_rank // 16
    split_inputs: tl.constexpr = (inputs + splits * block_k - 1) // (splits * block_k) * block_k
    num_items = tl.load(num_live_ptr) * (blocks * splits)
    offs_m, offs_r, offs_k = tl.arange(0, 16), tl.arange(0, 16), tl.arange(0, block_k)
    pdl_launch_dependents(enable_pdl)
    launch = 0
    if tl.program_id(0) < num_items:  # the idle ones are gone before the kernels before have ended
        pdl_wait(enable_pdl)
        launch = tl.load(number_ptr, volatile=True)
    for item in range(tl.program_id(0), num_items, programs):
        segment, block, split = item // (blocks * splits), item // splits % blocks, item % splits
        part, first_rank = block * 16 // max_rank, block * 16 % max_rank
        slot = tl.load(segments_ptr + segment).to(tl.int64)
        start = tl.load(segments_ptr + segment_stride + segment)
        mask_m = offs_m < tl.load(segments_ptr + 2 * segment_stride + segment)
        mask_r = first_rank + offs_r < max_rank
        if max_rank > 16:  # else all of it is written, and zero beyond the adapter's
            mask_r = first_rank + offs_r < tl.load(ranks_ptr + slot * parts + part)
        tokens = tl.load(tokens_ptr + start + offs_m, mask=mask_m, other=0)
        x_rows = x_ptr + tokens.to(tl.int64)[:, None] * inputs
        a_rows = a_ptr + ((slot * parts + part) * max_rank + first_rank + offs_r)[None, :] * inputs
        v = tl.zeros((16, 16), dtype=tl.float32)
        for k in tl.range(0, split_inputs, block_k, num_stages=4):
            at = split * split_inputs + k + offs_k
            mask_k = at < inputs
            x = tl.load(x_rows + at[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            if has_norm:
                g = tl.load(norm_ptr + at, mask=mask_k, other=0.0).to(tl.float32)
                x = (x.to(tl.float32) * g[None, :]).to(x.dtype)
            a = tl.load(a_rows + at[:, None], mask=mask_k[:, None] & mask_r[None, :], other=0.0)
            v = tl.dot(x.to(a.dtype), a, v, input_precision="ieee")
        rows_at = words_ptr + (split * num_tokens + tokens)[:, None] * (parts * max_rank)
        words_at = rows_at + part * max_rank + first_rank + offs_r[None, :]
        tl.store(words_at, mark_words(v, launch), mask=mask_m[:, None] & mask_r[None, :])


@triton.jit
def find_adapters(num_tokens, slots_ptr, active_ptr, block_m: tl.constexpr):
    """For several tokens, before the product: each one's slot, -1 without an adapter; how many slots the step has, and
    the first of these. Nothing waits for them, so weights travel at once."""
    offs_m = tl.arange(0, block_m)
    slots = tl.load(slots_ptr + offs_m, mask=offs_m < num_tokens, other=-1)
    return slots, tl.load(active_ptr), tl.load(active_ptr + 1)


@triton.jit
def load_adapters(
    found,  # as ``find_adapters`` returned them
    offs_n,  # (block_n,) features
    num_tokens,
    words_ptr,  # as of ``shrink_segments``
    b_ptr,  # (slots, max_rank, features)
    ranks_ptr,  # (slots, parts)
    features: tl.constexpr,
    low_rank: tl.constexpr,
    in_launch: tl.constexpr,
    gated: tl.constexpr,
):
    """After the product, and before its parts are summed, while which these travel: of each part that the features are
    of, what there is of v, (splits, block_r, block_m), and each token's rank; the first slot's B, (block_n, block_r).
    """
    slots, num_active, slot = found
    parts: tl.constexpr = low_rank[0]
    words, ranks = (), ()
    for index in tl.static_range(_count_parts(low_rank, offs_n.shape[0], gated)):
        at, present = _get_words_at(index, slots, offs_n, num_tokens, words_ptr, low_rank, in_launch, gated)
        words = words + (tl.load(at, mask=present, other=0, volatile=True),)  # type: ignore[assignment]  # noqa: RUF005
        rank = tl.full(slots.shape, low_rank[1], tl.int32)
        if low_rank[1] > 16:
            part = _get_part(index, offs_n, low_rank, gated)
            rank = tl.load(ranks_ptr + tl.maximum(slots, 0) * parts + part, mask=slots >= 0, other=0)
        ranks = ranks + (rank,)  # type: ignore[assignment]  # noqa: RUF005
    return words, ranks, _load_b(slot, num_active > 0, offs_n, b_ptr, ranks_ptr, features, low_rank)


@triton.jit
def add_adapters(
    y,  # (block_n, block_m) float32
    loaded,  # as ``load_adapters`` returned them
    found,  # as ``find_adapters`` returned them
    offs_n,  # (block_n,) features
    num_tokens,
    words_ptr,  # as of ``shrink_segments``
    b_ptr,
    ranks_ptr,
    active_ptr,
    number_ptr,
    features: tl.constexpr,
    low_rank: tl.constexpr,
    in_launch: tl.constexpr,
    gated: tl.constexpr,
):
    """Wait for v of all tokens, and add ``B v`` to ``y``, adapter by adapter. With a norm that the product folds in it
    comes before the division by the root."""
    slots, num_active, slot = found
    words, ranks, b = loaded
    num_parts: tl.constexpr = _count_parts(low_rank, y.shape[0], gated)
    offs_r = tl.arange(0, b.shape[1])
    launch = tl.load(number_ptr, volatile=True)
    vs = ()
    for index in tl.static_range(num_parts):
        at, present = _get_words_at(index, slots, offs_n, num_tokens, words_ptr, low_rank, in_launch, gated)
        mask = present & (offs_r[:, None] < ranks[index][None, :])[None, :, :]
        v = tl.sum(receive_words(words[index], at, present, mask, launch, in_launch[4]), axis=0)
        vs = vs + (v,)  # type: ignore[assignment]  # noqa: RUF005
    part_of_row = find_part(offs_n, low_rank)
    y = _add_adapter(y, b, slot, slots, vs, part_of_row, num_parts)
    for index in range(1, num_active):
        slot = tl.load(active_ptr + 1 + index)
        b = _load_b(slot, True, offs_n, b_ptr, ranks_ptr, features, low_rank)
        y = _add_adapter(y, b, slot, slots, vs, part_of_row, num_parts)
    return y


@triton.jit
def _get_words_at(
    index: tl.constexpr,
    slots,
    offs_n,
    num_tokens,
    words_ptr,
    low_rank: tl.constexpr,
    in_launch: tl.constexpr,
    gated: tl.constexpr,
):
    """Where a part's words are, (splits, block_r, block_m), and which of them there are."""
    parts: tl.constexpr = low_rank[0]
    max_rank: tl.constexpr = low_rank[1]
    splits: tl.constexpr = in_launch[1]
    offs_s, offs_r = tl.arange(0, triton.next_power_of_2(splits)), tl.arange(0, triton.next_power_of_2(max_rank))
    part = _get_part(index, offs_n, low_rank, gated)
    rows = (offs_s * num_tokens)[:, None, None] + tl.arange(0, slots.shape[0])[None, None, :]
    at = words_ptr + rows * (parts * max_rank) + part * max_rank + offs_r[None, :, None]
    return at, (offs_s < splits)[:, None, None] & (offs_r < max_rank)[None, :, None] & (slots >= 0)[None, None, :]


@triton.jit
def _get_part(index: tl.constexpr, offs_n, low_rank: tl.constexpr, gated: tl.constexpr):
    """The ``index``-th of the parts that the features of a tile are of."""
    if _is_of_one_part(low_rank, offs_n.shape[0], gated):
        return tl.max(find_part(offs_n, low_rank))
    else:
        return index


@triton.jit
def _add_adapter(y, b, slot, slots, vs, part_of_row, num_parts: tl.constexpr):
    """``y`` plus one adapter's B times v of its tokens."""
    for part in tl.static_range(num_parts):
        b_of_part = b if num_parts == 1 else tl.where((part_of_row == part)[:, None], b, 0.0)
        v = tl.where((slots == slot)[None, :], vs[part], 0.0)
        y = tl.dot(b_of_part, v.to(b.dtype), y, input_precision="ieee")
    return y


@triton.jit
def _load_b(slot, mask, offs_n, b_ptr, ranks_ptr, features: tl.constexpr, low_rank: tl.constexpr):
    """The slot's B of the features, (block_n, block_r). Up to 16 ranks are loaded whole: zero beyond the adapter's."""
    offs_r = tl.arange(0, triton.next_power_of_2(low_rank[1]))
    held = tl.maximum(slot, 0).to(tl.int64)
    rank = tl.full(offs_n.shape, low_rank[1], tl.int32)
    if low_rank[1] > 16:
        rank = tl.load(ranks_ptr + held * low_rank[0] + find_part(offs_n, low_rank))
    b_at = b_ptr + (held * low_rank[1] + offs_r)[None, :] * features + offs_n[:, None]
    return tl.load(b_at, mask=(offs_r[None, :] < rank[:, None]) & mask, other=0.0)


@triton.jit
def mark_words(values, launch):
    """Words of float32 ``values`` and the launch's number."""
    return (launch.to(tl.int64) << 32) | (values.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def receive_words(words, words_at, present, mask, launch, max_polls: tl.constexpr):
    """The values of marked words, 0 where not ``mask``, once all of them are of this launch; ``words`` were loaded
    before, and ``present`` may be read. With ``max_polls`` it gives up after so many looks, and the values are not
    numbers."""
    polls = 0
    while (tl.max(tl.where(mask, (words >> 32).to(tl.int32) != launch, False).to(tl.int32)) > 0) & (
        (max_polls == 0) | (polls < max_polls)
    ):
        words = tl.load(words_at, mask=present, other=0, volatile=True)
        polls += 1
    values = tl.where(mask, words.to(tl.int32).to(tl.float32, bitcast=True), 0.0)
    if max_polls > 0:
        values = tl.where(mask & ((words >> 32).to(tl.int32) != launch), float("nan"), values)
    return values


@triton.constexpr_function
def _count_parts(low_rank: Any, block_n: int, gated: bool) -> int:
    """Of how many of the layer's parts a tile's features may be."""
    return 1 if _is_of_one_part(low_rank, block_n, gated) else low_rank[0]


@triton.constexpr_function
def _is_of_one_part(low_rank: Any, block_n: int, gated: bool) -> bool:
    """Whether all features of a tile are of one of the layer's parts."""
    parts, _, _, size_0, size_1 = low_rank
    return parts == 1 or not (gated or size_0 % block_n or size_1 % block_n)
