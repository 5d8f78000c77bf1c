"""How many drafts pay: measured from the acceptance of each request's drafts and from what steps take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["DraftLengthSettings", "DraftLengthTuner"]


@dataclass(frozen=True, slots=True)
class DraftLengthSettings:
    """The constants of ``DraftLengthTuner``. They were chosen with the simulations in
    ``tests/spec_decode/test_draft_length.py`` (never below 0.98 of no speculation) and
    ``test_draft_length_with_prefill.py``, whose costs were measured with an 8B model and a 1B draft on one H200.
    Reasons that were measured are in ``docs/decisions/0005-speculation.md``."""

    # Trials
    min_timed_steps: int = 2
    """Timed steps before a length is judged. Few, because a length that does not pay costs time while it is tried. A
    trial takes one step more: its first only drafts, and the next verifies."""
    steps_until_committed: int = 2
    """Steps without drafts after a trial, until the output of its last step is in: as many as are in flight."""
    first_trial_after: int = 64
    """Steps until lengths that were not chosen are tried for the first time: soon, because little is known yet."""
    trial_interval: int = 2048
    """Steps between two trials at first. Prompts, lengths and load change; three steps in 2,048 cost less than 0.2 %
    even if they take twice as long."""
    max_trial_interval: int = 8192
    """Steps between two trials at most: the interval doubles after each trial that changed nothing."""

    # Acceptance
    min_verified_drafts: float = 3.0
    """Verified drafts, decayed, from which acceptance counts as known: what one trial verifies of one request."""
    max_reqs_to_read: int = 8
    """Requests up to which a step's prompts are read by the proposer only to learn its acceptance. At 256 requests,
    reading prompts for drafts that then did not pay cost 3.6 % of a decoding workload."""
    prior_weight: float = 4.0
    """Drafts by which the estimate for one request leans towards that of all requests, and that towards
    ``prior_acceptance``."""
    prior_acceptance: float = 0.75
    """Acceptance of a proposer of which nothing is known. Optimistic, so that it is tried."""
    decay: float = 0.98
    """Factor of earlier drafts at each verification: about the last 50 verifications count."""
    min_probability: float = 0.02
    """A draft that is reached and accepted more rarely than this is not worth a request's blocks."""

    # Speed
    min_speedup: float = 1.02
    """By how much drafts must be faster than none, so that noise in step times does not turn them on."""
    min_speedup_with_prefill: float = 1.05
    """The same for a proposer on the device, which reads prompts too. That time is not in the steps that are timed."""
    extra_speedup_to_begin: float = 0.15
    """And by how much more while nothing is drafted, at ``many_reqs`` requests; in proportion for fewer. What was not
    read until then must be read first: at 256 requests 6 % of a decoding workload each time the choice changes."""
    many_reqs: int = 64
    """Requests from which on a step counts as large: there, a second draft takes as long as the first."""

    # Step times
    weight_if_faster: float = 0.2
    """Weight of a new time in the moving average when it is shorter than the average."""
    weight_if_slower: float = 0.05
    """When it is longer. Less, because outside causes only make steps longer; and it counts as twice the average at
    most."""
    next_draft_cost: float = 0.8
    """What one draft more takes at least, as a share of what the one before it took: estimates of lengths that were
    never timed err on the side of trying."""
    second_draft_cost: float = 0.65
    """The same where the one before it is the first, at few requests: the first pays for drafting at all. The share
    grows to 1 at ``many_reqs`` requests."""


class _StepTime(NamedTuple):
    """Microseconds of a step on the device, as a moving average, and how many steps are in it."""

    device_us: float
    num_steps: int


class _Trial(NamedTuple):
    """A length that is being tried, and for how many steps more."""

    length: int
    steps_left: int


class DraftLengthTuner:
    """Chooses among no drafts, 1, 2 and ``num_speculative_tokens``, by tokens per time. Not ``adaptive``: always
    ``num_speculative_tokens``.

    A request's acceptance is a rate: the share of its recent drafts that were right, up to the first wrong one of each
    verification, leaning towards that of all requests. The time of a step is what steps of about as many requests took
    on the device. Lengths whose time is not known are tried, unless they cannot pay; now and then the others are tried
    again, because prompts, lengths and load change.
    """

    def __init__(
        self,
        num_speculative_tokens: int,
        max_num_seqs: int,
        adaptive: bool,
        on_device: bool = False,
        settings: DraftLengthSettings | None = None,
    ) -> None:
        self.last_length = self._max_length = num_speculative_tokens
        self.run_draft_prefill = True
        """Whether the proposer should read what is computed: drafts pay, or their acceptance is yet to be learnt. How
        long drafts take can be measured without reading."""
        self._settings = settings or DraftLengthSettings()
        self._adaptive = adaptive
        self._on_device = on_device
        self._lengths = sorted({0, 1, 2, num_speculative_tokens} - set(range(num_speculative_tokens + 1, 3)))
        # Decayed counts by row; the last entry is of all requests.
        self._num_right = np.zeros(max_num_seqs + 1)
        self._num_tried = np.zeros(max_num_seqs + 1)
        self._step_times: dict[tuple[int, int], _StepTime] = {}  # by (size class, length)
        self._pays = False
        self._num_steps = 0
        self._num_trials = 0  # of lengths that were timed before: they take turns
        self._trial_interval = self._settings.trial_interval // 2  # doubled before it is used
        self._next_trial_at = self._settings.first_trial_after
        self._trial = _Trial(0, 0)

    def choose_length(self, rows: NDArray[np.int64], available: NDArray[np.int64]) -> int:
        """The most drafts that a request should have in a step that decodes ``rows``, of which ``available`` drafts
        each can be had."""
        self.last_length = self._choose_adaptively(rows, available) if self._adaptive else self._max_length
        return self.last_length

    def limit_per_request(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The most drafts that each request should have, by its own acceptance."""
        if not self._adaptive:
            return np.full(len(rows), self._max_length, np.int64)
        rate = np.clip(self._acceptance(rows), 1e-3, 1 - 1e-9)
        # The longest draft that is accepted whole with at least ``min_probability``: rate ** length.
        length: NDArray[np.float64] = np.log(self._settings.min_probability) / np.log(rate)
        return np.clip(length, 1, self._max_length).astype(np.int64)

    def reset_row(self, row: int) -> None:
        """Another request takes the row."""
        self._num_right[row] = self._num_tried[row] = 0.0

    def record_acceptance(
        self, rows: NDArray[Any], num_verified: NDArray[Any], num_accepted: NDArray[np.int64]
    ) -> None:
        """``rows`` verified and accepted so many drafts each. Without rows nothing is learnt, and nothing decays."""
        if not len(rows):
            return
        settings = self._settings
        # Drafts behind the first wrong one say nothing of the proposer: only that one counts as tried.
        num_tried = num_accepted + (num_accepted < num_verified)
        was_unknown = self._num_tried[-1] < settings.min_verified_drafts
        self._num_right[rows] = self._num_right[rows] * settings.decay + num_accepted
        self._num_tried[rows] = self._num_tried[rows] * settings.decay + num_tried
        self._num_right[-1] = self._num_right[-1] * settings.decay + num_accepted.sum()
        self._num_tried[-1] = self._num_tried[-1] * settings.decay + num_tried.sum()
        if was_unknown and self._num_tried[-1] >= settings.min_verified_drafts:
            self._next_trial_at = self._num_steps + settings.trial_interval

    def record_step_time(self, num_reqs: int, num_drafts: int, device_us: float) -> None:
        """A step of nothing but decodes, each with up to ``num_drafts`` drafts, took ``device_us`` microseconds."""
        settings = self._settings
        length = next((length for length in self._lengths if length >= num_drafts), self._max_length)
        key = _size_class(num_reqs), length
        average, count = self._step_times.get(key, _StepTime(device_us, 0))
        weight = settings.weight_if_faster if device_us < average else settings.weight_if_slower
        moved = average + weight * (min(device_us, 2 * average) - average)
        # The first steps may hold a compilation or a cold cache: until a length is judged, its shortest time counts.
        shortest = min(average, device_us)
        self._step_times[key] = _StepTime(moved if count >= settings.min_timed_steps else shortest, count + 1)

    def _choose_adaptively(self, rows: NDArray[np.int64], available: NDArray[np.int64]) -> int:
        settings, num_reqs = self._settings, len(rows)
        size = _size_class(num_reqs)
        # The longest one need not be filled: a step takes as long with fewer drafts.
        most = next((length for length in self._lengths if length >= available.max(initial=0)), self._max_length)
        lengths = [length for length in self._lengths if length <= most]
        self._num_steps += 1

        # A trial that has begun goes on, then waits without drafts until its last step's output is in.
        trial, steps_left = self._trial
        if steps_left and (trial in lengths or steps_left <= settings.steps_until_committed):
            self._trial = _Trial(trial, steps_left - 1)
            return trial if steps_left > settings.steps_until_committed else 0

        rate, margin = np.clip(self._acceptance(rows), 0.0, 1 - 1e-9), self._required_speedup(num_reqs)
        unknown = bool(self._num_tried[-1] < settings.min_verified_drafts) and num_reqs <= settings.max_reqs_to_read
        speeds: list[float] = []  # by length: tokens per microsecond, less the margin
        worth_trying: list[int] = []
        known_times: list[tuple[int, float]] = []  # (length, microseconds), of the lengths before
        for length in lengths:
            device_us, count = self._step_times.get((size, length), _StepTime(0.0, 0))
            is_timed = count >= settings.min_timed_steps
            max_tokens = np.minimum(available, length) + 1  # by request, if all its drafts are right
            # 1 + rate + rate**2 + ...: a draft counts if all before it are right.
            expected_tokens = float(((1 - rate**max_tokens) / (1 - rate)).sum())
            # The best that the length can be: where its time is known, with all drafts right; else with the acceptance
            # that is known, in the least time that it can take.
            if is_timed:
                best_speed = max_tokens.sum() / device_us
            else:
                best_speed = length and expected_tokens / self._least_time(known_times, length, num_reqs)
            cannot_pay = bool(length and best_speed < speeds[0] * margin)
            if not cannot_pay:
                worth_trying.append(length)
            if not is_timed and not cannot_pay:
                self.run_draft_prefill = unknown
                return self._begin_trial(length)
            if count:
                known_times.append((length, device_us))
            speeds.append(expected_tokens / device_us / (margin if length else 1.0) if count else 0.0)

        best = lengths[int(np.argmax(speeds))]
        self._pays = best > 0
        self.run_draft_prefill = self._pays or unknown
        if self._num_steps < self._next_trial_at:
            return best
        # Time to try another length again, rarely while nothing pays.
        longer = min(2 * self._trial_interval, settings.max_trial_interval)
        self._trial_interval = settings.trial_interval if best else longer
        self._next_trial_at = self._num_steps + self._trial_interval
        self._num_trials += 1
        self.run_draft_prefill = True
        return self._begin_trial(worth_trying[self._num_trials % len(worth_trying)])

    def _required_speedup(self, num_reqs: int) -> float:
        """How much faster than none drafts must be."""
        settings = self._settings
        if not self._on_device:
            return settings.min_speedup
        if self._pays:
            return settings.min_speedup_with_prefill
        share = settings.extra_speedup_to_begin * min(num_reqs, settings.many_reqs) / settings.many_reqs
        return settings.min_speedup_with_prefill + share

    def _begin_trial(self, length: int) -> int:
        steps = self._settings.min_timed_steps + (self._settings.steps_until_committed if length else 0)
        self._trial = _Trial(length, steps)
        return length

    def _acceptance(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        settings = self._settings
        prior_right = settings.prior_weight * settings.prior_acceptance
        overall = (self._num_right[-1] + prior_right) / (self._num_tried[-1] + settings.prior_weight)
        rates: NDArray[np.float64] = (self._num_right[rows] + settings.prior_weight * overall) / (
            self._num_tried[rows] + settings.prior_weight
        )
        return rates

    def _least_time(self, known_times: list[tuple[int, float]], length: int, num_reqs: int) -> float:
        """Microseconds that ``length`` drafts take at least, where fewer take ``known_times``: each draft more takes
        about as long as the one before it, or longer."""
        if len(known_times) < 2:
            return known_times[0][1]
        settings = self._settings
        (previous, previous_us), (last, last_us) = known_times[-2:]
        if previous:
            cost = settings.next_draft_cost
        else:
            large = min(num_reqs, settings.many_reqs) / settings.many_reqs
            cost = settings.second_draft_cost + (1 - settings.second_draft_cost) * large
        slope = (last_us - previous_us) / (last - previous) * cost
        return last_us + max(0.0, slope) * (length - last)


def _size_class(num_reqs: int) -> int:
    """Steps of about as many requests take about as long: three classes for each power of two."""
    return round(3 * float(np.log2(max(num_reqs, 1))))
