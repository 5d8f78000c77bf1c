"""``allowed_token_ids`` of vLLM's API: only these tokens can be sampled."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quire.plugins.logits.row_entries import RowEntries
from quire.sdk import InvalidRequestError, LogitsBatch, LogitsProcessor, NewRequest, SamplingParams

__all__ = ["AllowedTokenIds"]


class AllowedTokenIds(LogitsProcessor):
    """Minus infinity for every token that the request does not allow; EOS too, unless it is among them."""

    def __init__(self, vocab_size: int, device: torch.device, options: object = None) -> None:
        super().__init__(vocab_size, device, options)
        self._tokens = RowEntries(device)  # the allowed tokens of each row

    @classmethod
    def validate_params(cls, params: SamplingParams, vocab_size: int) -> None:
        """Tokens must be in the vocabulary, and ``bad_words`` must leave one of them."""
        allowed = params.allowed_token_ids
        if allowed is None:
            return
        unknown = next((token for token in allowed if not 0 <= token < vocab_size), None)
        if unknown is not None:
            raise InvalidRequestError(
                f"allowed_token_ids names token {unknown}; the vocabulary has tokens 0 to {vocab_size - 1}",
                "allowed_token_ids",
            )
        if set(allowed) <= {sequence[0] for sequence in params.bad_words_token_ids if len(sequence) == 1}:
            raise InvalidRequestError("bad_words forbid every token of allowed_token_ids", "allowed_token_ids")

    def add_row(self, request: NewRequest) -> bool:
        """Keep the request's tokens."""
        allowed = request.params.allowed_token_ids
        if allowed is None:
            return False
        self._tokens.set_row(request.row, np.unique(np.asarray(allowed, np.int64))[None])
        return True

    def remove_row(self, row: int) -> None:
        """Forget the row."""
        self._tokens.remove_row(row)

    def apply(self, logits: Tensor, batch: LogitsBatch) -> None:
        """Keep the logits of allowed tokens alone, in the rows of requests that name some."""
        entries = self._tokens.gather_rows(batch.rows)
        if entries is not None:
            logits_rows, _, tokens = entries
            kept = logits[logits_rows, tokens]
            logits.index_fill_(0, logits_rows, float("-inf"))
            logits[logits_rows, tokens] = kept
