"""The end of every draw: the token goes out and, where the kernel feeds the request table, to its row's end."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["store_sampled_token"]


@triton.jit
def store_sampled_token(
    token,
    line,
    row,
    out_ptr,
    token_ids_ptr,
    num_tokens_ptr,
    token_stride,
    vocab: tl.constexpr,
    feed: tl.constexpr,
):
    """Store ``token`` for ``line``; with ``feed`` append it to ``row`` of the request table.

    A row of logits without any number (all NaN) must not send an index out of the vocabulary into the embedding.
    """
    token = tl.minimum(token, vocab - 1).to(tl.int32)
    tl.store(out_ptr + line, token)
    if feed:
        end = tl.load(num_tokens_ptr + row)
        tl.store(token_ids_ptr + row * token_stride + end, token)
        tl.store(num_tokens_ptr + row, end + 1)
