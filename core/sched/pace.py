"""How many drafts pay: from what was accepted of each request's drafts, and from what steps took."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Pace"]

_SURE = 3
"""Steps that must have been timed before a number of drafts is judged, and that a trial takes."""
_EVERY = 512
"""Steps between two trials of what was not chosen."""
_MARGIN = 1.02
"""By how much drafts must be faster."""
_READING = 1.1
"""The same where a proposer on the device reads prompts too: many requests at once gain little from drafts, and what
reading costs is not in the time of their steps."""
_PRIOR = 4.0
_FORGET = 0.98
_UNLIKELY = 0.02
"""Drafts that would all be accepted more rarely than this are not worth a request's blocks."""


class Pace:
    """Chooses among no drafts, 1, 2 and ``most``, by tokens per time. Not ``adaptive``: always ``most``.

    A request's acceptance is a rate: the share of its drafts that were right up to the first wrong one, lately, leaning
    towards that of all requests. The time of a step is what steps of about as many requests took on the device. Numbers
    of drafts whose time is not known are tried, and now and then the others again, as prompts, lengths and load change.
    """

    def __init__(self, most: int, num_rows: int, adaptive: bool, on_device: bool = False) -> None:
        self.last = self._most = most
        self.reads = True
        """Whether drafts are known to pay, or not known not to: a proposer had better read what is computed."""
        self._adaptive = adaptive
        self._margin = _READING if on_device else _MARGIN
        self._levels = sorted({0, 1, 2, most} - set(range(most + 1, 3)))
        self._right = np.zeros(num_rows + 1)  # by row, and of all
        self._tried = np.zeros(num_rows + 1)
        self._times: dict[tuple[int, int], tuple[float, int]] = {}  # (size, drafts) -> microseconds, how often timed
        self._steps = 0
        self._trial: tuple[int, int] = (0, 0)  # drafts, steps left

    def choose(self, rows: NDArray[np.int64], available: NDArray[np.int64]) -> int:
        """The most drafts a request of a step of decoding ``rows`` should have, where so many are ``available``."""
        self.last = self._best(rows, available) if self._adaptive else self._most
        return self.last

    def each(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The most drafts by request."""
        if not self._adaptive:
            return np.full(len(rows), self._most, np.int64)
        rate = np.clip(self._rates(rows), 1e-3, 1 - 1e-9)
        return np.clip(np.log(_UNLIKELY) / np.log(rate), 1, self._most).astype(np.int64)

    def enter(self, row: int) -> None:
        """Another request has the row."""
        self._right[row] = self._tried[row] = 0.0

    def learn(self, rows: NDArray[Any], drafted: NDArray[Any], accepted: NDArray[np.int64]) -> None:
        """Drafts that were verified, and how many of them were accepted."""
        tried = accepted + (accepted < drafted)
        self._right[rows] = self._right[rows] * _FORGET + accepted
        self._tried[rows] = self._tried[rows] * _FORGET + tried
        self._right[-1] = self._right[-1] * _FORGET + accepted.sum()
        self._tried[-1] = self._tried[-1] * _FORGET + tried.sum()

    def timed(self, num_reqs: int, drafts: int, took_us: float) -> None:
        """A step of nothing but decodes, with up to so many drafts for each, took so long."""
        key = _size(num_reqs), next((level for level in self._levels if level >= drafts), self._most)
        before, count = self._times.get(key, (took_us, 0))
        lately = before + 0.2 * (min(took_us, 2 * before) - before)
        self._times[key] = (lately if count >= _SURE else min(before, took_us)), count + 1

    def _best(self, rows: NDArray[np.int64], available: NDArray[np.int64]) -> int:
        size, levels = _size(len(rows)), [level for level in self._levels if level <= available.max(initial=0)]
        self._steps += 1
        trial, left = self._trial
        if left and trial in levels:
            self._trial = trial, left - 1
            return trial
        rate = np.clip(self._rates(rows), 0.0, 1 - 1e-9)
        speeds: list[float] = []
        worth: list[int] = []  # levels that may be best, as more drafts never take less time
        least = 0.0
        for level in levels:
            took, count = self._times.get((size, level), (0.0, 0))
            tokens = float(((1 - rate ** (np.minimum(available, level) + 1)) / (1 - rate)).sum())
            hopeless = bool(least and speeds and tokens / least < speeds[0])
            if not hopeless:
                worth.append(level)
            if count < _SURE and not hopeless:
                self._trial, self.reads = (level, _SURE), True
                return level
            least = max(least, took if level else 0.0)
            speeds.append(tokens / took / (self._margin if level else 1.0) if count else 0.0)
        if self._steps % _EVERY == 0:
            self._trial = worth[self._steps // _EVERY % len(worth)], _SURE
            return self._trial[0]
        best = levels[int(np.argmax(speeds))]
        self.reads = best > 0
        return best

    def _rates(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        overall = (self._right[-1] + 1.0) / (self._tried[-1] + 2.0)
        rates: NDArray[np.float64] = (self._right[rows] + _PRIOR * overall) / (self._tried[rows] + _PRIOR)
        return rates


def _size(num_reqs: int) -> int:
    """Steps of about as many requests take about as long: powers of two, and two steps between them."""
    return round(3 * float(np.log2(max(num_reqs, 1))))
