"""Masks of tokens on logits: what a grammar does not allow becomes minus infinity."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["apply_token_masks"]


def apply_token_masks(logits: Tensor, mask_rows: Tensor, bits: Tensor) -> None:
    """Forbid tokens in ``logits`` (n, vocab), rows dense, any float dtype, in place.

    ``mask_rows`` (n,) int32 is the row of ``bits`` (m, ceil(vocab / 32)) int32 for each logits row, -1 where every
    token may come: such rows cost a launch of programs that end at once. Token t is allowed if bit t % 32 of word
    t // 32 is 1.
    """
    if logits.is_cuda:
        from quire.core.sample.kernels.token_mask_kernel import launch_token_masks

        launch_token_masks(logits, mask_rows, bits)
        return
    masked = (mask_rows >= 0).nonzero()[:, 0]
    shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
    allowed = (bits[mask_rows[masked].long()][:, :, None] >> shifts) & 1  # (k, words, 32)
    forbidden = allowed.flatten(1)[:, : logits.shape[1]] == 0
    logits[masked] = logits[masked].masked_fill(forbidden, float("-inf"))
