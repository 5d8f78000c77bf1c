"""``min_tokens`` of vLLM's API: no end before that many tokens were generated."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.sdk import LogitsBatch, LogitsProcessor, NewRequest
from quire.sdk.ops import copy_to_device

__all__ = ["MinTokens"]


class MinTokens(LogitsProcessor):
    """Forbids EOS and the caller's stop tokens until ``min_tokens`` tokens were generated."""

    def __init__(self, vocab_size: int, device: torch.device, options: object = None) -> None:
        super().__init__(vocab_size, device, options)
        self._rows: dict[int, tuple[int, Tensor]] = {}

    def add_row(self, request: NewRequest) -> bool:
        """Remember the position from which the request may end."""
        stops = [t for t in request.stop_token_ids if 0 <= t < self.vocab_size]
        if request.params.min_tokens <= 0 or not stops or request.params.structured_outputs is not None:
            return False  # where a grammar leaves nothing but a stop token, the answer is at its end: its masks know
        self._rows[request.row] = (
            request.prompt_len + request.params.min_tokens,
            copy_to_device(stops, torch.int64, self.device),
        )
        return True

    def remove_row(self, row: int) -> None:
        """Forget the row."""
        del self._rows[row]

    def apply(self, logits: Tensor, batch: LogitsBatch) -> None:
        """Minus infinity for the stop tokens of every row whose request is too short to end."""
        for logits_row, (row, max_position) in enumerate(zip(batch.rows, batch.max_positions, strict=True)):
            if row not in self._rows:
                continue
            min_position, stops = self._rows[row]
            if max_position < min_position:  # an upper bound: certainly too short
                logits[logits_row].index_fill_(0, stops, float("-inf"))
            else:  # with drafts only the device knows
                too_short = batch.num_tokens[logits_row] < min_position
                logits[logits_row, stops] = logits[logits_row, stops].masked_fill(too_short, float("-inf"))
