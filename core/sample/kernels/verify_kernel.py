"""Verification and placing of drafts: one small program a request, the same for any number of drafts, and nothing that
the host would have to know."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.core.contracts.sampler import SamplingTable
from quire.core.sample.inputs import DraftSpans

__all__ = ["launch_place_drafts", "launch_verify_drafts"]


def launch_verify_drafts(
    sampled: Tensor, spans: DraftSpans, table: SamplingTable, num_computed: Tensor, num_drafts: Tensor
) -> Tensor:
    """As ``quire.core.sample.verify.verify_drafts``; the table's last row, which is padding, is left alone."""
    n, max_len = len(spans.rows), spans.max_len
    out = torch.empty(n, 2 + max_len, dtype=torch.int32, device=sampled.device)
    verify_drafts_kernel[(n,)](
        sampled, spans.rows, spans.start, spans.num_drafts, table.token_ids, table.num_tokens, num_computed, num_drafts,
        out, table.token_ids.stride(0), len(num_drafts) - 1, max_len,
        block=max(32, triton.next_power_of_2(max_len)), num_warps=1,
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


# Proposers on the host find as many drafts as they find, and the tensors are views into packed uploads: neither the
# width nor the alignment of a pointer may compile a kernel anew while requests are served.
@triton.jit(
    do_not_specialize=["token_stride", "padding_row", "max_len"],
    do_not_specialize_on_alignment=["sampled_ptr", "rows_ptr", "start_ptr", "granted_ptr"],
)
def verify_drafts_kernel(
    sampled_ptr, rows_ptr, start_ptr, granted_ptr, token_ids_ptr, num_tokens_ptr, computed_ptr, num_drafts_ptr,
    out_ptr, token_stride, padding_row, max_len,
    block: tl.constexpr,
):  # fmt: skip
    """Grid (n,). Accept up to the first draft that is not what was sampled, append, and say so in (n, 2 + max_len)."""
    request = tl.program_id(0)
    row = tl.load(rows_ptr + request)
    if row != padding_row:
        offset = tl.arange(0, block)
        base = tl.load(num_tokens_ptr + row)
        granted = tl.load(granted_ptr + request).to(tl.int32)
        num_verified = tl.minimum(granted, tl.load(num_drafts_ptr + row))
        logits_row = tl.load(start_ptr + request)
        own = (offset <= granted) & (offset < max_len)  # logits rows of this request
        draft_ptr = token_ids_ptr + row * token_stride + base + offset
        tokens = tl.load(sampled_ptr + logits_row + offset, mask=own, other=-1)
        drafts = tl.load(draft_ptr, mask=own, other=-2)
        rejected = tl.min(tl.where((tokens == drafts) & (offset < num_verified), block, offset), axis=0)
        count = tl.minimum(rejected, num_verified) + 1  # the token sampled after the accepted drafts comes for free
        tl.store(draft_ptr, tl.maximum(tokens, 0), mask=offset < count)  # a fault of ``row_faults`` is no token
        tl.store(num_tokens_ptr + row, base + count)
        tl.store(computed_ptr + row, base + count - 1)  # the last token's keys and values are the next step's
        tl.store(num_drafts_ptr + row, 0)
        result = out_ptr + request * (2 + max_len)
        tl.store(result, count)
        tl.store(result + 1, num_verified)
        tl.store(result + 2 + offset, tokens, mask=offset < max_len)


@triton.jit(do_not_specialize=["stride", "stride_k", "token_stride", "padding_row", "max_tokens", "vocab", "k"])
def place_drafts_kernel(
    tokens_ptr, lengths_ptr, rows_ptr, token_ids_ptr, num_tokens_ptr, num_drafts_ptr,
    stride, stride_k, token_stride, padding_row, max_tokens, vocab, k,
    block: tl.constexpr, has_lengths: tl.constexpr,
):  # fmt: skip
    """Grid (n,). Write a request's drafts up to the first that is no token."""
    request = tl.program_id(0)
    row = tl.load(rows_ptr + request)
    if row != padding_row:
        offset = tl.arange(0, block)
        tokens = tl.load(tokens_ptr + request * stride + offset * stride_k, mask=offset < k, other=-1).to(tl.int32)
        count = tl.min(tl.where((tokens >= 0) & (tokens < vocab), block, offset), axis=0)
        count = tl.minimum(count, k)
        if has_lengths:
            count = tl.minimum(count, tl.maximum(tl.load(lengths_ptr + request), 0).to(tl.int32))
        base = tl.load(num_tokens_ptr + row)
        count = tl.minimum(count, max_tokens - base)
        tl.store(token_ids_ptr + row * token_stride + base + offset, tokens, mask=offset < count)
        tl.store(num_drafts_ptr + row, count)
