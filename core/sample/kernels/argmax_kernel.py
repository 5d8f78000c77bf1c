"""Greedy tokens: one launch, one read of the logits."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quire.core.sample.kernels.sample_row import max_or_nan, store_sampled_token
from quire.core.sample.kernels.workspace import Workspace

__all__ = ["launch_argmax"]


def launch_argmax(
    logits: Tensor,
    workspace: Workspace,
    out: Tensor,
    rows: Tensor | None = None,
    token_ids: Tensor | None = None,
    num_tokens: Tensor | None = None,
    *,
    mark_invalid: bool = False,
) -> None:
    """``logits`` (n, vocab), rows dense, bf16, f16 or f32 -> ``out`` (n,) int32: the best token, the first of equals.

    With ``mark_invalid`` a row with a NaN, or without a logit above minus infinity, gets ``NO_LOGITS`` in ``out``.

    With ``rows`` (n,) int64, ``token_ids`` (rows, length) and ``num_tokens`` (rows,) int32 each token is appended to
    its row of the request table, but for the table's last row, which stands for padding and is skipped.
    """
    append = rows is not None and token_ids is not None and num_tokens is not None
    argmax_kernel[(workspace.num_argmax_chunks, len(logits))](
        logits,
        rows if append else out,
        token_ids if append else out,
        num_tokens if append else out,
        workspace.chunks.noised,
        workspace.chunks.token,
        workspace.parts.num_arrived,
        out,
        logits.stride(0),
        token_ids.stride(0) if token_ids is not None else 0,
        len(num_tokens) - 1 if num_tokens is not None else 0,
        append=append,
        mark_invalid=mark_invalid,
        fast=not triton.knobs.runtime.interpret,
        **workspace.argmax_constants,
    )


@triton.jit(do_not_specialize=["padding_row"])
def argmax_kernel(
    logits_ptr,
    rows_ptr,
    token_ids_ptr,
    num_tokens_ptr,
    chunk_logit_ptr,
    chunk_token_ptr,
    num_arrived_ptr,
    out_ptr,
    stride,
    token_stride,
    padding_row,
    vocab_size: tl.constexpr,
    num_chunks: tl.constexpr,
    num_chunks_block: tl.constexpr,
    chunk_size: tl.constexpr,
    append: tl.constexpr,
    mark_invalid: tl.constexpr,
    fast: tl.constexpr,
):
    """Grid (num_chunks, n). A program takes a chunk of a row; the one that arrives last merges the row's chunks."""
    chunk = tl.program_id(0)
    logits_row = tl.program_id(1).to(tl.int64)
    row = logits_row
    if append:
        row = tl.load(rows_ptr + logits_row)
    if not append or row != padding_row:
        tokens = chunk * chunk_size + tl.arange(0, chunk_size)
        row_ptr = logits_ptr + logits_row * stride
        x = tl.load(row_ptr + tokens, mask=tokens < vocab_size, other=float("-inf")).to(tl.float32)
        best = max_or_nan(x, 0, fast)
        # The smallest id of equals, as torch.argmax. A NaN leaves vocab_size, which the end clamps.
        token = tl.min(tl.where(x == best, tokens, vocab_size), axis=0)
        tl.store(chunk_logit_ptr + logits_row * num_chunks + chunk, best)
        tl.store(chunk_token_ptr + logits_row * num_chunks + chunk, token)
        # The barrier orders the stores of all threads before the one atomic that publishes them (release), and the last
        # to arrive acquires those of the other programs. Which one that is changes nothing: maxima are exact.
        tl.debug_barrier()
        num_arrived = tl.atomic_add(num_arrived_ptr + logits_row, 1, sem="acq_rel")
        if num_arrived == num_chunks - 1:
            chunks = tl.arange(0, num_chunks_block)
            inside = chunks < num_chunks
            start = logits_row * num_chunks + chunks
            # .cg reads the L2 cache: another SM's results may not be in this one's L1.
            bests = tl.load(chunk_logit_ptr + start, mask=inside, other=float("-inf"), cache_modifier=".cg")
            best_tokens = tl.load(chunk_token_ptr + start, mask=inside, other=vocab_size, cache_modifier=".cg")
            best = max_or_nan(bests, 0, fast)
            token = tl.min(tl.where(bests == best, best_tokens, vocab_size), axis=0)
            store_sampled_token(
                token, best, logits_row, row, out_ptr, token_ids_ptr, num_tokens_ptr, token_stride, vocab_size, append,
                mark_invalid,
            )  # fmt: skip
            tl.store(num_arrived_ptr + logits_row, 0)  # ready for the next launch, without one to clear it
