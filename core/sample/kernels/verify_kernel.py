"""Verification and placing of drafts: one small program a request, the same for any number of drafts, and nothing that
the host would have to know."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.core.contracts.sampler import SamplingTable
from quire.core.sample.kernels.noise_kernel import device_philox

if TYPE_CHECKING:
    from quire.core.sample.verify import DraftSpans

__all__ = ["launch_place_drafts", "launch_verify_drafts"]


def launch_verify_drafts(
    sampled: Tensor, spans: DraftSpans, table: SamplingTable, num_computed: Tensor, num_drafts: Tensor,
    forced_acceptance: float | None,
) -> Tensor:  # fmt: skip
    """As ``quire.core.sample.verify.verify``; the table's last row, which is padding, is left alone."""
    n, width = len(spans.rows), spans.max_len
    out = torch.empty(n, 2 + width, dtype=torch.int32, device=sampled.device)
    t, forced = table, forced_acceptance is not None
    verify_drafts_kernel[(n,)](
        sampled, spans.rows, spans.start, spans.num_drafts, t.token_ids, t.num_tokens, num_computed, num_drafts, t.seed,
        out, t.token_ids.stride(0), len(num_drafts) - 1, float(forced_acceptance or 0.0), width,
        block=max(32, triton.next_power_of_2(width)), forced=forced, fast=not triton.knobs.runtime.interpret,
        num_warps=1,
    )  # fmt: skip
    return out


def launch_place_drafts(
    tokens: Tensor, lengths: Tensor | None, rows: Tensor, table: SamplingTable, num_drafts: Tensor, vocab_size: int
) -> None:
    """As ``quire.core.sample.verify.place_drafts``."""
    n, k = tokens.shape
    ids = table.token_ids
    place_drafts_kernel[(n,)](
        tokens, tokens if lengths is None else lengths, rows, ids, table.num_tokens, num_drafts,
        *tokens.stride(), ids.stride(0), len(num_drafts) - 1, ids.shape[1], vocab_size, k,
        block=max(64, triton.next_power_of_2(k)), has_lengths=lengths is not None, num_warps=1,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["token_stride", "padding_row", "width"],
    do_not_specialize_on_alignment=["drawn_ptr", "rows_ptr", "first_ptr", "drafts_ptr"],
)
def verify_drafts_kernel(
    drawn_ptr, rows_ptr, first_ptr, drafts_ptr, token_ids_ptr, num_tokens_ptr, computed_ptr, num_drafts_ptr, seed_ptr,
    out_ptr, token_stride, padding_row, acceptance, width,
    block: tl.constexpr, forced: tl.constexpr, fast: tl.constexpr,
):  # fmt: skip
    """Accept up to the first draft that is not what was drawn, append, and say so in (n, 2 + width)."""
    request = tl.program_id(0)
    row = tl.load(rows_ptr + request)
    if row != padding_row:
        place = tl.arange(0, block)
        base = tl.load(num_tokens_ptr + row)
        granted = tl.load(drafts_ptr + request).to(tl.int32)
        offered = tl.minimum(granted, tl.load(num_drafts_ptr + row))
        line = tl.load(first_ptr + request)
        mine = (place <= granted) & (place < width)
        at = token_ids_ptr + row * token_stride + base + place
        tokens = tl.load(drawn_ptr + line + place, mask=mine, other=-1)
        before = tl.load(at, mask=mine, other=-2)
        if forced:
            zero = tl.full((), 0x5EED, tl.int32)
            share = (
                device_philox(tl.load(seed_ptr + row), zero, base + place, fast).to(tl.float32) * 2.3283064365386963e-10
            )
            right = share < acceptance
            tokens = tl.where(right & (place < offered), before, tokens)
        else:
            right = tokens == before
        wrong = tl.min(tl.where(right & (place < offered), block, place), axis=0)
        count = tl.minimum(wrong, offered) + 1
        tl.store(at, tokens, mask=place < count)
        tl.store(num_tokens_ptr + row, base + count)
        tl.store(computed_ptr + row, base + count - 1)
        tl.store(num_drafts_ptr + row, 0)
        result = out_ptr + request * (2 + width)
        tl.store(result, count)
        tl.store(result + 1, offered)
        tl.store(result + 2 + place, tokens, mask=place < width)


@triton.jit(do_not_specialize=["stride", "stride_k", "token_stride", "padding_row", "room", "vocab", "k"])
def place_drafts_kernel(
    tokens_ptr, lengths_ptr, rows_ptr, token_ids_ptr, num_tokens_ptr, num_drafts_ptr,
    stride, stride_k, token_stride, padding_row, room, vocab, k,
    block: tl.constexpr, has_lengths: tl.constexpr,
):  # fmt: skip
    """Write a request's drafts up to the first that is no token."""
    request = tl.program_id(0)
    row = tl.load(rows_ptr + request)
    if row != padding_row:
        place = tl.arange(0, block)
        tokens = tl.load(tokens_ptr + request * stride + place * stride_k, mask=place < k, other=-1).to(tl.int32)
        count = tl.min(tl.where((tokens >= 0) & (tokens < vocab), block, place), axis=0)
        count = tl.minimum(count, k)
        if has_lengths:
            count = tl.minimum(count, tl.maximum(tl.load(lengths_ptr + request), 0).to(tl.int32))
        base = tl.load(num_tokens_ptr + row)
        count = tl.minimum(count, room - base)
        tl.store(token_ids_ptr + row * token_stride + base + place, tokens, mask=place < count)
        tl.store(num_drafts_ptr + row, count)
