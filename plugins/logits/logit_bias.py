"""``logit_bias`` of the OpenAI API: what a caller adds to single logits."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.sdk import InvalidRequestError, LogitsBatch, LogitsProcessor, NewRequest, SamplingParams
from quire.sdk.ops import copy_to_device

__all__ = ["LogitBias"]


class LogitBias(LogitsProcessor):
    """Adds ``bias`` to the logit of each named token, as the OpenAI API defines it."""

    def __init__(self, vocab_size: int, device: torch.device, options: object = None) -> None:
        super().__init__(vocab_size, device, options)
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}

    @classmethod
    def validate_params(cls, params: SamplingParams, vocab_size: int) -> None:
        """Tokens must be in the vocabulary."""
        for token in params.logit_bias or {}:
            if not 0 <= token < vocab_size:
                raise InvalidRequestError(
                    f"logit_bias names token {token}; the vocabulary has tokens 0 to {vocab_size - 1}", "logit_bias"
                )

    def add_row(self, request: NewRequest) -> bool:
        """Upload the request's biases."""
        bias = request.params.logit_bias
        if not bias:
            return False
        self._rows[request.row] = (
            copy_to_device(list(bias), torch.int64, self.device),
            copy_to_device(list(bias.values()), torch.float32, self.device),
        )
        return True

    def remove_row(self, row: int) -> None:
        """Forget the row."""
        del self._rows[row]

    def apply(self, logits: Tensor, batch: LogitsBatch) -> None:
        """Add the biases of each row's request."""
        for logits_row, row in enumerate(batch.rows):
            if row in self._rows:
                tokens, values = self._rows[row]
                logits[logits_row, tokens] += values
