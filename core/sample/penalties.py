"""Repetition, frequency and presence penalties, computed from the token table."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["apply_penalties"]


def apply_penalties(
    logits: Tensor,
    tokens: Tensor,
    num_tokens: Tensor,
    prompt_len: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    """Change ``logits`` (n, vocab) float32 in place.

    ``tokens`` (n, length) integer token ids, of which the first ``num_tokens`` (n,) are real and the first
    ``prompt_len`` (n,) the prompt's. Repetition (CTRL, Keskar et al. 2019) divides positive and multiplies negative
    logits of every token seen; frequency and presence (OpenAI) count generated tokens alone.
    """
    n, vocab = logits.shape
    place = torch.arange(tokens.shape[1], device=tokens.device)[None, :]
    real = place < num_tokens[:, None]
    made = real & (place >= prompt_len[:, None])
    index = torch.where(real, tokens, 0).long()
    seen = torch.zeros(n, vocab, device=logits.device).scatter_add_(1, index, real.float()) > 0
    count = torch.zeros(n, vocab, device=logits.device).scatter_add_(1, index, made.float())
    factor = repetition[:, None]
    logits.copy_(torch.where(seen, torch.where(logits > 0, logits / factor, logits * factor), logits))
    logits -= frequency[:, None] * count + presence[:, None] * (count > 0)
