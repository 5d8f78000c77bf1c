"""Greedy tokens: one launch, one read of the logits."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quire.core.sample.kernels.token_feedback import store_sampled_token
from quire.core.sample.kernels.workspace import Workspace

__all__ = ["launch_argmax"]


def launch_argmax(
    logits: Tensor,
    work: Workspace,
    out: Tensor,
    rows: Tensor | None = None,
    token_ids: Tensor | None = None,
    num_tokens: Tensor | None = None,
) -> None:
    """``logits`` (n, vocab), rows dense, bf16, f16 or f32 -> ``out`` (n,) int32: the best token, the first of equals.

    With ``rows`` (n,) int64, ``token_ids`` (rows, length) and ``num_tokens`` (rows,) int32 each token is appended to
    its row of the request table, but for the table's last row, which stands for padding and is skipped.
    """
    n, vocab = logits.shape
    feed = rows is not None and token_ids is not None and num_tokens is not None
    chunk = 2 * work.tiles.chunk_size
    splits = triton.cdiv(vocab, chunk)
    argmax_kernel[(splits, n)](
        logits,
        rows if feed else out,
        token_ids if feed else out,
        num_tokens if feed else out,
        work.chunk_best,
        work.chunk_token,
        work.counter,
        out,
        logits.stride(0),
        token_ids.stride(0) if token_ids is not None else 0,
        len(num_tokens) - 1 if num_tokens is not None else 0,
        vocab=vocab,
        splits=splits,
        splits_block=triton.next_power_of_2(splits),
        chunk=chunk,
        feed=feed,
        num_warps=8,
    )


@triton.jit(do_not_specialize=["padding_row"])
def argmax_kernel(
    logits_ptr,
    rows_ptr,
    token_ids_ptr,
    num_tokens_ptr,
    best_ptr,
    token_ptr,
    counter_ptr,
    out_ptr,
    stride,
    token_stride,
    padding_row,
    vocab: tl.constexpr,
    splits: tl.constexpr,
    splits_block: tl.constexpr,
    chunk: tl.constexpr,
    feed: tl.constexpr,
):
    """A program takes a chunk of a row; the one that arrives last merges the row's chunks."""
    split = tl.program_id(0)
    line = tl.program_id(1).to(tl.int64)
    row = line
    if feed:
        row = tl.load(rows_ptr + line)
    if not feed or row != padding_row:
        at = split * chunk + tl.arange(0, chunk)
        x = tl.load(logits_ptr + line * stride + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        best = tl.max(x, axis=0)
        token = tl.min(tl.where(x == best, at, vocab), axis=0)
        tl.store(best_ptr + line * splits + split, best)
        tl.store(token_ptr + line * splits + split, token)
        tl.debug_barrier()
        arrived = tl.atomic_add(counter_ptr + line, 1, sem="acq_rel")
        if arrived == splits - 1:
            place = tl.arange(0, splits_block)
            inside = place < splits
            start = line * splits + place
            bests = tl.load(best_ptr + start, mask=inside, other=float("-inf"), cache_modifier=".cg")
            tokens = tl.load(token_ptr + start, mask=inside, other=vocab, cache_modifier=".cg")
            token = tl.min(tl.where(bests == tl.max(bests, axis=0), tokens, vocab), axis=0)
            store_sampled_token(token, line, row, out_ptr, token_ids_ptr, num_tokens_ptr, token_stride, vocab, feed)
            tl.store(counter_ptr + line, 0)
