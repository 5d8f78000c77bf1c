"""Repetition, frequency and presence penalties, computed from the token table.

- Repetition (Keskar et al., "CTRL", 2019; ``repetition_penalty`` of Hugging Face and vLLM): the logit of every token
  seen, in the prompt or generated, is divided by the penalty if positive and multiplied by it if negative.
- Frequency and presence (the OpenAI API): ``logit -= frequency * count + presence * (count > 0)``, where ``count`` is
  how often the token was generated; the prompt does not count, as in vLLM.

They apply in this order, before the temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quire.core.sample.inputs import PenaltyColumns

__all__ = ["apply_penalties", "apply_penalties_torch"]


def apply_penalties(
    logits: Tensor, logits_rows: Tensor, rows: Tensor, num_tokens: Tensor, max_num_tokens: int, columns: PenaltyColumns
) -> None:
    """Penalize some ``logits_rows`` (m,) int64 of ``logits`` (n, vocab) float32, in place; with kernels on a GPU.

    ``rows`` (n,) int64, of the request table, and ``num_tokens`` (n,) int32, how many of a row's tokens come before the
    one to sample, are by logits row; no such number is above ``max_num_tokens``, which the host knows.
    """
    if logits.is_cuda:
        from quire.core.sample.kernels.penalties_kernel import launch_penalties

        launch_penalties(logits, logits_rows, rows, num_tokens, max_num_tokens, columns)
        return
    token_ids, *others = columns
    penalized_rows, penalized = rows[logits_rows], logits[logits_rows]
    by_logits_row = (column[penalized_rows] for column in others)
    of_rows = PenaltyColumns(token_ids[penalized_rows, :max_num_tokens], *by_logits_row)
    apply_penalties_torch(penalized, num_tokens[logits_rows], of_rows)
    logits[logits_rows] = penalized


def apply_penalties_torch(logits: Tensor, num_tokens: Tensor, columns: PenaltyColumns) -> None:
    """Change ``logits`` (n, vocab) float32 in place; ``columns`` and ``num_tokens`` (n,) are by logits row.

    Of ``columns.token_ids`` (n, length) the first ``num_tokens`` are real, and the first ``prompt_len`` the prompt's.
    """
    n, vocab_size = logits.shape
    tokens = columns.token_ids
    position = torch.arange(tokens.shape[1], device=tokens.device)[None, :]
    real = position < num_tokens[:, None]
    generated = real & (position >= columns.prompt_len[:, None])
    index = torch.where(real, tokens, 0).long()  # what is not real adds zero to token 0
    seen = torch.zeros(n, vocab_size, device=logits.device).scatter_add_(1, index, real.float()) > 0
    count = torch.zeros(n, vocab_size, device=logits.device).scatter_add_(1, index, generated.float())
    factor = columns.repetition[:, None]
    logits.copy_(torch.where(seen, torch.where(logits > 0, logits / factor, logits * factor), logits))
    logits -= columns.frequency[:, None] * count + columns.presence[:, None] * (count > 0)
