"""``bad_words`` of vLLM's API: sequences of tokens that an answer never holds."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quire.plugins.logits.row_entries import RowEntries
from quire.sdk import LogitsBatch, LogitsProcessor, NewRequest

__all__ = ["BadWords"]


class BadWords(LogitsProcessor):
    """Forbids the last token of each of ``bad_words_token_ids`` where the answer ends with the tokens before it. Those
    of the prompt do not count: what the prompt began can be completed."""

    def __init__(self, vocab_size: int, device: torch.device, options: object = None) -> None:
        super().__init__(vocab_size, device, options)
        self._last_tokens = RowEntries(device)  # each once
        self._words = RowEntries(device)  # the number of its last token, how many come before it, the prompt's length
        self._prefix_tokens = RowEntries(device)  # the number of its word, token, its distance from the text's end

    def add_row(self, request: NewRequest) -> bool:
        """Keep the request's sequences. Those with a token beyond the vocabulary cannot occur."""
        words = [
            word for word in request.params.bad_words_token_ids if all(0 <= token < self.vocab_size for token in word)
        ]
        if not words:
            return False
        last_tokens, numbers = np.unique([word[-1] for word in words], return_inverse=True)
        lengths = [len(word) - 1 for word in words]
        prefix_tokens = [
            (i, token, distance)
            for i, word in enumerate(words)
            for distance, token in enumerate(reversed(word[:-1]), start=1)
        ]
        self._last_tokens.set_row(request.row, last_tokens[None])
        self._words.set_row(request.row, np.array([numbers, lengths, [request.prompt_len] * len(words)]))
        self._prefix_tokens.set_row(request.row, np.array(prefix_tokens, np.int64).reshape(-1, 3).T)
        return True

    def remove_row(self, row: int) -> None:
        """Forget the row."""
        for entries in (self._last_tokens, self._words, self._prefix_tokens):
            entries.remove_row(row)

    def apply(self, logits: Tensor, batch: LogitsBatch) -> None:
        """Minus infinity for the tokens that would complete a sequence."""
        words, last_tokens = self._words.gather_rows(batch.rows), self._last_tokens.gather_rows(batch.rows)
        if words is None or last_tokens is None:
            return
        # The entries of a row of logits are neighbours: the first one's index and a number within them give the others.
        logits_rows, _, numbers, prefix_lens, prompt_lens = words
        num_tokens = batch.num_tokens.long()
        is_banned = num_tokens[logits_rows] - prefix_lens >= prompt_lens
        prefix_tokens = self._prefix_tokens.gather_rows(batch.rows)
        if prefix_tokens is not None:
            rows_of_tokens, table_rows, words_of_tokens, tokens, distances = prefix_tokens
            positions = (num_tokens[rows_of_tokens] - distances).clamp(min=0)
            is_found = batch.token_ids[table_rows, positions] == tokens
            indices = torch.searchsorted(logits_rows, rows_of_tokens) + words_of_tokens
            is_banned &= torch.zeros_like(prefix_lens).index_add_(0, indices, is_found.long()) == prefix_lens
        # Several words may end in one token: they are counted, and each logit is written once.
        target_rows, _, target_tokens = last_tokens
        indices = torch.searchsorted(target_rows, logits_rows) + numbers
        num_bans = torch.zeros_like(target_rows).index_add_(0, indices, is_banned.long())
        targets = logits[target_rows, target_tokens]
        logits[target_rows, target_tokens] = targets.masked_fill(num_bans > 0, float("-inf"))
