"""Log-probabilities of prompt tokens, for the requests that ask for them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.core.contracts.model import Model
from quire.core.messages import NewRequest, SchedulerOutput
from quire.core.sample.logprobs import LogprobsTensors, gather_logprobs

__all__ = ["PromptLogprobs"]

_MAX_LOGITS_ROWS = 1024
"""Logits rows that are computed at a time: those of a whole prompt would take gigabytes."""


class PromptLogprobs:
    """Knows on the host, by row of the request table, who asked, so that other steps pay nothing."""

    def __init__(self, num_rows: int) -> None:
        self._prompt_len = np.zeros(num_rows, dtype=np.int64)
        self._num_logprobs = np.full(num_rows, -1, dtype=np.int32)  # -1: none are wanted

    def add_request(self, request: NewRequest) -> None:
        """A request enters its row."""
        num_logprobs = request.params.prompt_logprobs
        self._prompt_len[request.row] = request.prompt_len
        self._num_logprobs[request.row] = -1 if num_logprobs is None else num_logprobs

    def gather_prompt_logprobs(
        self, step: SchedulerOutput, hidden: Tensor, model: Model, token_ids: Tensor
    ) -> dict[int, LogprobsTensors]:
        """Those of the prompt tokens that the chunks of this step predict, by index into the step.

        ``hidden`` (num_tokens, hidden); ``token_ids`` (rows, length) int32 of the request table.
        """
        requested = np.flatnonzero(self._num_logprobs[step.rows] >= 0)
        if not len(requested):
            return {}
        chunk_starts: NDArray[np.int64] = np.concatenate(([0], np.cumsum(step.num_scheduled_tokens)))
        logprobs = {}
        for i in requested:
            row = step.rows[i]
            # Prompts have no drafts, so the bound of the context length is exact.
            first_position = step.max_seq_lens[i] - step.num_scheduled_tokens[i]
            # The prompt's last token predicts one that is sampled: that one is no part of the prompt.
            count = int(min(step.num_scheduled_tokens[i], self._prompt_len[row] - 1 - first_position))
            if count <= 0:
                continue
            chosen = token_ids[row, first_position + 1 : first_position + 1 + count]
            states = hidden[chunk_starts[i] : chunk_starts[i] + count]
            parts = [
                gather_logprobs(model.compute_logits(some_states), some_chosen, int(self._num_logprobs[row]))
                for some_states, some_chosen in zip(
                    states.split(_MAX_LOGITS_ROWS), chosen.split(_MAX_LOGITS_ROWS), strict=True
                )
            ]
            logprobs[int(i)] = LogprobsTensors(*(torch.cat(column) for column in zip(*parts, strict=True)))
        return logprobs
