"""Repetition, frequency and presence penalties, computed from the token table."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["apply_penalties", "apply_penalties_torch"]


def apply_penalties(
    logits: Tensor,
    lines: Tensor,
    rows: Tensor,
    num_tokens: Tensor,
    longest: int,
    token_ids: Tensor,
    prompt_len: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    """``apply_penalties`` on some ``lines`` (m,) int64 of ``logits`` (n, vocab) float32, in place; a kernel on a GPU.

    ``rows`` (n,) int64 and ``num_tokens`` (n,) int32 are by line, no length above ``longest``. The others are the
    request table's columns: ``token_ids`` (rows, length) and ``prompt_len`` (rows,) int32, penalties (rows,) float32.
    """
    if logits.is_cuda:
        from quire.core.sample.kernels import penalties_kernel as penalties

        columns = (token_ids, prompt_len, repetition, frequency, presence)
        penalties.launch_penalties(logits, lines, rows, num_tokens, longest, *columns)
        return
    mine, some = rows[lines], logits[lines]
    of_lines = (column[mine] for column in (prompt_len, repetition, frequency, presence))
    apply_penalties_torch(some, token_ids[mine, :longest], num_tokens[lines], *of_lines)
    logits[lines] = some


def apply_penalties_torch(
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
