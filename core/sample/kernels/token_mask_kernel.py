"""Masks of tokens, applied to logits where the sampling kernels will read them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["launch_token_masks"]

_BLOCK = 4096
"""Tokens that a program takes: 512 bytes of a mask."""


def launch_token_masks(logits: Tensor, mask_rows: Tensor, bits: Tensor) -> None:
    """As ``quire.core.sample.token_mask.apply_token_masks``. Fit for capture: what differs from step to step is read on
    the device."""
    n, vocab_size = logits.shape
    token_mask_kernel[(triton.cdiv(vocab_size, _BLOCK), n)](
        logits, mask_rows, bits, logits.stride(0), bits.stride(0), vocab_size=vocab_size, block=_BLOCK, num_warps=4
    )


@triton.jit
def token_mask_kernel(
    logits_ptr, mask_rows_ptr, bits_ptr, stride, bits_stride, vocab_size: tl.constexpr, block: tl.constexpr
):
    """Grid (chunks, n). Nothing is read of logits; only forbidden ones are written."""
    logits_row = tl.program_id(1).to(tl.int64)
    mask_row = tl.load(mask_rows_ptr + logits_row).to(tl.int64)
    if mask_row >= 0:
        tokens = tl.program_id(0) * block + tl.arange(0, block)
        inside = tokens < vocab_size
        words = tl.load(bits_ptr + mask_row * bits_stride + tokens // 32, mask=inside, other=-1)
        forbidden = ((words >> (tokens % 32)) & 1) == 0
        minus_infinity = tl.full((block,), float("-inf"), logits_ptr.dtype.element_ty)
        tl.store(logits_ptr + logits_row * stride + tokens, minus_infinity, mask=inside & forbidden)
