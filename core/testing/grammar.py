"""A grammar small enough to check by eye, for tests of masks: each token's class follows from the one before it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quire.core.contracts.logits_processor import LogitsBatch, LogitsProcessor
from quire.core.messages import NewRequest
from quire.core.ops.pinned import copy_to_device

__all__ = ["CyclicGrammar"]

_CLASSES = 3


class CyclicGrammar(LogitsProcessor):
    """After a token of class ``c`` (its id modulo 3) only tokens of class ``c + 1`` are allowed. On where
    ``extra_args`` has ``cyclic``."""

    @dataclass(frozen=True)
    class Arguments:
        """What a request may say."""

        cyclic: bool = False

    def __init__(self, vocab_size: int, device: torch.device, options: object = None) -> None:
        super().__init__(vocab_size, device, options)
        self._rows: set[int] = set()
        self._classes = torch.arange(vocab_size, device=device) % _CLASSES

    def add_row(self, request: NewRequest) -> bool:
        """Whether the request asked for it."""
        has_grammar: bool = self.read_arguments(request.params).cyclic
        if has_grammar:
            self._rows.add(request.row)
        return has_grammar

    def remove_row(self, row: int) -> None:
        """Forget the row."""
        self._rows.discard(row)

    def apply(self, logits: Tensor, batch: LogitsBatch) -> None:
        """Mask each row of the logits by the token before it, which may be a draft."""
        logits_rows = copy_to_device(
            [i for i, row in enumerate(batch.rows) if row in self._rows], torch.int64, logits.device
        )
        rows = copy_to_device(batch.rows, torch.int64, logits.device)[logits_rows]
        before = batch.token_ids[rows, batch.num_tokens[logits_rows].long() - 1]
        allowed = self._classes[None, :] == (before[:, None] + 1) % _CLASSES
        logits[logits_rows] = logits[logits_rows].masked_fill(~allowed, float("-inf"))
