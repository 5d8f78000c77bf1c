"""How many drafts pay: from what was accepted of each request's drafts, and from what steps took."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["DraftLengthTuner"]

_SURE = 2
"""Steps that must have been timed before a number of drafts is judged. A trial takes one more: its first step only
drafts."""
_LAG = 2
"""Steps after a trial until the last of it has landed."""
_SOON = 64
"""Steps until the first trial of what was not chosen."""
_EVERY = 2048
"""And between two, at first; twice as many after each in vain."""
_RARELY = 8192
"""And at most."""
_KNOWN = 3.0
"""Drafts that must have been verified before their acceptance is known: a trial's, of one request."""
_FEW = 8
"""So many requests' prompts may be read to learn it."""
_MARGIN = 1.02
"""By how much drafts must be faster."""
_READING = 1.05
"""The same where a proposer on the device reads prompts too, which is not in the time of steps."""
_BEGINNING = 0.15
"""And more to begin, the more requests: what has not been read until then must be read first."""
_MANY = 64
"""Requests from which on there are many."""
_PRIOR = 4.0
_HOPE = 0.75
"""Acceptance of a proposer that nobody knows yet."""
_FORGET = 0.98
_UNLIKELY = 0.02
"""Drafts that would all be accepted more rarely than this are not worth a request's blocks."""


class DraftLengthTuner:
    """Chooses among no drafts, 1, 2 and ``most``, by tokens per time. Not ``adaptive``: always ``most``.

    A request's acceptance is a rate: the share of its drafts that were right up to the first wrong one, lately, leaning
    towards that of all requests. The time of a step is what steps of about as many requests took on the device. Numbers
    of drafts whose time is not known are tried, but for those that cannot pay, and now and then the others again, as
    prompts, lengths and load change.
    """

    def __init__(self, most: int, num_rows: int, adaptive: bool, on_device: bool = False) -> None:
        self.last_length = self._most = most
        self.run_draft_prefill = True
        """Whether drafts pay, or what is accepted of them is yet to be learnt: a proposer had better read what is
        computed. What a number of drafts takes shows without reading."""
        self._adaptive = adaptive
        self._on_device = on_device
        self._levels = sorted({0, 1, 2, most} - set(range(most + 1, 3)))
        self._right = np.zeros(num_rows + 1)  # by row, and of all
        self._tried = np.zeros(num_rows + 1)
        self._times: dict[tuple[int, int], tuple[float, int]] = {}  # (size, drafts) -> microseconds, how often timed
        self._pays = False
        self._steps = self._turn = 0
        self._gap, self._due = _EVERY // 2, _SOON  # the gap is doubled before it counts
        self._trial: tuple[int, int] = (0, 0)  # drafts, steps left

    def choose_length(self, rows: NDArray[np.int64], available: NDArray[np.int64]) -> int:
        """The most drafts a request of a step of decoding ``rows`` should have, where so many are ``available``."""
        self.last_length = self._best(rows, available) if self._adaptive else self._most
        return self.last_length

    def limit_per_request(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The most drafts by request."""
        if not self._adaptive:
            return np.full(len(rows), self._most, np.int64)
        rate = np.clip(self._rates(rows), 1e-3, 1 - 1e-9)
        return np.clip(np.log(_UNLIKELY) / np.log(rate), 1, self._most).astype(np.int64)

    def reset_row(self, row: int) -> None:
        """Another request has the row."""
        self._right[row] = self._tried[row] = 0.0

    def record_acceptance(self, rows: NDArray[Any], drafted: NDArray[Any], accepted: NDArray[np.int64]) -> None:
        """Drafts that were verified, and how many of them were accepted. Of none nothing is learnt, and nothing
        forgotten."""
        if not len(rows):
            return
        tried, unknown = accepted + (accepted < drafted), self._tried[-1] < _KNOWN
        self._right[rows] = self._right[rows] * _FORGET + accepted
        self._tried[rows] = self._tried[rows] * _FORGET + tried
        self._right[-1] = self._right[-1] * _FORGET + accepted.sum()
        self._tried[-1] = self._tried[-1] * _FORGET + tried.sum()
        if unknown and self._tried[-1] >= _KNOWN:
            self._due = self._steps + _EVERY

    def record_step_time(self, num_reqs: int, drafts: int, took_us: float) -> None:
        """A step of nothing but decodes, with up to so many drafts for each, took so long."""
        key = _size(num_reqs), next((level for level in self._levels if level >= drafts), self._most)
        before, count = self._times.get(key, (took_us, 0))
        weight = 0.2 if took_us < before else 0.05  # steps are held up rather than hurried
        lately = before + weight * (min(took_us, 2 * before) - before)
        self._times[key] = (lately if count >= _SURE else min(before, took_us)), count + 1

    def _best(self, rows: NDArray[np.int64], available: NDArray[np.int64]) -> int:
        size, levels = _size(len(rows)), [level for level in self._levels if level <= available.max(initial=0)]
        self._steps += 1
        trial, left = self._trial
        if left and trial in levels:
            self._trial = trial, left - 1
            return trial if left > _LAG else 0
        rate, margin = np.clip(self._rates(rows), 0.0, 1 - 1e-9), self._margin(len(rows))
        unknown = bool(self._tried[-1] < _KNOWN) and len(rows) <= _FEW
        speeds: list[float] = []
        worth: list[int] = []  # levels that may be best
        times: list[tuple[int, float]] = []
        for level in levels:
            took, count = self._times.get((size, level), (0.0, 0))
            lines = np.minimum(available, level) + 1
            tokens = float(((1 - rate**lines) / (1 - rate)).sum())
            hope = lines.sum() / took if count >= _SURE else level and tokens / _least(times, level, len(rows))
            hopeless = bool(level and hope < speeds[0] * margin)
            if not hopeless:
                worth.append(level)
            if count < _SURE and not hopeless:
                self.run_draft_prefill = unknown
                return self._try(level)
            if count:
                times.append((level, took))
            speeds.append(tokens / took / (margin if level else 1.0) if count else 0.0)
        best = levels[int(np.argmax(speeds))]
        self._pays = best > 0
        self.run_draft_prefill = self._pays or unknown
        if self._steps < self._due:
            return best
        self._gap = _EVERY if best else min(2 * self._gap, _RARELY)
        self._due, self._turn, self.run_draft_prefill = self._steps + self._gap, self._turn + 1, True
        return self._try(worth[self._turn % len(worth)])

    def _margin(self, num_reqs: int) -> float:
        """How much faster drafts must be."""
        if not self._on_device:
            return _MARGIN
        return _READING + (0.0 if self._pays else _BEGINNING * min(num_reqs, _MANY) / _MANY)

    def _try(self, level: int) -> int:
        self._trial = level, _SURE + (_LAG if level else 0)
        return level

    def _rates(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        overall = (self._right[-1] + _PRIOR * _HOPE) / (self._tried[-1] + _PRIOR)
        rates: NDArray[np.float64] = (self._right[rows] + _PRIOR * overall) / (self._tried[rows] + _PRIOR)
        return rates


def _size(num_reqs: int) -> int:
    """Steps of about as many requests take about as long: powers of two, and two steps between them."""
    return round(3 * float(np.log2(max(num_reqs, 1))))


def _least(times: list[tuple[int, float]], level: int, num_reqs: int) -> float:
    """What ``level`` drafts take at least, in microseconds, where fewer take ``times``. Each draft more takes about as
    long as the one before it, or longer; a first one of few requests takes what drafting at all does, too."""
    if len(times) < 2:
        return times[0][1]
    (before, less), (last, more) = times[-2:]
    slope = (more - less) / (last - before) * (0.8 if before else 0.65 + 0.35 * min(num_reqs, _MANY) / _MANY)
    return more + max(0.0, slope) * (level - last)
