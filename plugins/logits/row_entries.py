"""Values that logits processors keep for requests, laid out for one step: on the device, for all its rows at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.sdk.ops import copy_to_device

__all__ = ["RowEntries"]


class RowEntries:
    """For each request a table of integers, whose entries a step needs for each of the request's rows of logits.

    A step has the same rows as the one before, mostly: then nothing is copied to the device again.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._entries: dict[int, NDArray[np.int64]] = {}
        self._batch_rows: Sequence[int] | None = None
        self._gathered: Tensor | None = None

    def set_row(self, row: int, entries: NDArray[np.int64]) -> None:
        """``entries`` (columns, n) belong to the request in ``row`` of the request table."""
        self._entries[row] = entries
        self._batch_rows = None

    def remove_row(self, row: int) -> None:
        """Forget the row."""
        del self._entries[row]
        self._batch_rows = None

    def gather_rows(self, batch_rows: Sequence[int]) -> Tensor | None:
        """The entries of a step whose rows of logits belong to ``batch_rows`` of the request table: (2 + columns, m)
        int64 on the device, above each entry its row of the logits and its row of the table. None if there are none.
        """
        if batch_rows != self._batch_rows:
            parts = [
                np.concatenate((np.full((1, table.shape[1]), i), np.full((1, table.shape[1]), row), table))
                for i, row in enumerate(batch_rows)
                if (table := self._entries.get(row)) is not None and table.shape[1]
            ]
            self._gathered = None
            if parts:
                entries = np.ascontiguousarray(np.concatenate(parts, 1))
                self._gathered = copy_to_device(entries, torch.int64, self._device)
            self._batch_rows = list(batch_rows)
        return self._gathered
