"""What a rank notes of its work while it works, so that one that hangs can be told from those that wait for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["RankStatus", "find_behind"]

_IS_COMPILING, _NUM_BEGUN, _NUM_ENDED, _NUM_ENTERED, _NUM_LEFT = range(5)


class RankStatus:
    """Numbers that a rank counts up and that its executor reads, in memory that both see or in a copy of it.

    All ranks are sent the same messages and meet in the same collective operations, so equal counts are the same
    place in a step.
    """

    NUM_VALUES = 8
    """With room for more: a line of the processor's cache for each rank."""

    def __init__(self, values: NDArray[np.int64] | None = None) -> None:
        """``values`` (NUM_VALUES,): the memory; None: some of its own."""
        self.values: NDArray[np.int64] = np.zeros(self.NUM_VALUES, np.int64) if values is None else values

    @property
    def is_compiling(self) -> bool:
        """Whether the rank compiles a kernel."""
        return bool(self.values[_IS_COMPILING])

    @is_compiling.setter
    def is_compiling(self, value: bool) -> None:
        self.values[_IS_COMPILING] = value

    def begin_message(self) -> None:
        """The rank begins to do what a message says."""
        self.values[_NUM_BEGUN] += 1

    def end_message(self) -> None:
        """It has done it."""
        self.values[_NUM_ENDED] += 1

    @property
    def collective_counts(self) -> NDArray[np.int64]:
        """(2,): how many collective operations the rank's host has entered, and left; see ``CollectiveNotes``."""
        return self.values[_NUM_ENTERED : _NUM_LEFT + 1]

    @property
    def is_busy(self) -> bool:
        """Whether it does what a message says."""
        return bool(self.values[_NUM_BEGUN] > self.values[_NUM_ENDED])

    @property
    def is_waiting(self) -> bool:
        """Whether its host waits for other ranks in a collective operation."""
        return bool(self.values[_NUM_ENTERED] > self.values[_NUM_LEFT])

    @property
    def num_ended(self) -> int:
        """Messages that were dealt with."""
        return int(self.values[_NUM_ENDED])

    @property
    def num_entered(self) -> int:
        """Collective operations that were begun."""
        return int(self.values[_NUM_ENTERED])


def find_behind(statuses: Sequence[RankStatus], groups: Sequence[Sequence[int]]) -> list[int]:
    """Those of the ranks that the others wait for; none where that cannot be told. ``statuses`` by rank; the ranks of
    each of the ``groups`` do the same.

    On a CPU the others are inside a collective operation, which one has not entered. On a GPU a collective operation
    is launched and not waited for: there one has not launched as much as the others.
    """
    busy = [rank for rank, status in enumerate(statuses) if status.is_busy]
    if not any(statuses[rank].is_waiting for rank in busy):
        return _find_fewest({rank: status.num_ended for rank, status in enumerate(statuses)})
    if away := [rank for rank in busy if not statuses[rank].is_waiting]:
        return away
    return [rank for group in groups for rank in _find_fewest({rank: statuses[rank].num_entered for rank in group})]


def _find_fewest(counts: dict[int, int]) -> list[int]:
    fewest = min(counts.values())
    return [] if fewest == max(counts.values()) else [rank for rank, count in counts.items() if count == fewest]
