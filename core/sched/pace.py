"""How many drafts pay: from what was accepted so far, and from what steps cost."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Pace"]


class Pace:
    """A fixed number of drafts."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.last = most

    def now(self, num_reqs: int) -> int:
        """Drafts to verify in a step of so many decoding requests, at most."""
        return self._most

    def next(self, num_reqs: int) -> int:
        """Drafts to propose for the step after."""
        return self._most

    def each(self, rows: NDArray[np.int64], most: int) -> NDArray[np.int64]:
        """The same by request, none above ``most``."""
        return np.full(len(rows), most, np.int64)

    def learn(self, rows: NDArray[Any], drafted: NDArray[Any], accepted: NDArray[np.int64]) -> None:
        """Drafts that were verified, and how many of them were accepted."""
