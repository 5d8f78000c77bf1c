"""Drafts of a simulated engine: how many a step verifies is the scheduler's affair, how many are right is said here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.core.config import SpeculationConfig
from quire.core.errors import ConfigError
from quire.core.traces.records import DoneRecord, StepRecord
from quire.server.traces.recording import Recording

__all__ = ["SimulatedDrafts", "measure_acceptance"]


@dataclass(frozen=True, slots=True)
class SimulatedDrafts:
    """A proposer of which only its acceptance is known."""

    num_speculative_tokens: int
    acceptance: float
    """The chance that a draft is right where those before it are."""
    seed: int = 0

    def make_config(self) -> SpeculationConfig:
        """What the scheduler is told. How many are drafted it chooses by acceptance and step times, as ever."""
        return SpeculationConfig(self.num_speculative_tokens)

    def count_accepted(
        self, request_numbers: NDArray[np.int64], lengths: NDArray[np.int64], num_drafts: NDArray[Any]
    ) -> NDArray[np.int64]:
        """How many of the drafts behind ``lengths`` tokens of each request are right, up to the first that is not. It
        depends on the request and the position alone, whatever runs beside them."""
        most = int(num_drafts.max(initial=0))
        positions = lengths[:, None] + np.arange(most)
        is_right = _draw_uniform(self.seed, request_numbers[:, None], positions) < self.acceptance
        is_right &= np.arange(most) < num_drafts[:, None]
        counts: NDArray[np.int64] = np.logical_and.accumulate(is_right, axis=1).sum(axis=1, dtype=np.int64)
        return counts


def measure_acceptance(recording: Recording) -> float:
    """The share of recorded drafts that were right, up to the first wrong one of each verification. Raises
    ``ConfigError`` where there are none."""
    steps: dict[int, StepRecord] = {}
    num_right = num_tried = 0
    for record in recording.records:
        if isinstance(record, StepRecord) and record.drafts is not None:
            steps[record.step] = record
        elif isinstance(record, DoneRecord) and record.step in steps and record.sampled is not None:
            drafts = steps.pop(record.step).drafts
            assert drafts is not None
            for count, gained in zip(drafts, record.sampled, strict=True):
                if count and gained:
                    num_right += min(gained - 1, count)
                    num_tried += min(gained, count)
    if not num_tried:
        raise ConfigError(f"{recording.name} has no drafts: say how many are accepted with --draft-acceptance")
    return num_right / num_tried


def _draw_uniform(seed: int, numbers: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """A number in [0, 1) for each pair: the finalizer of SplitMix64 (Steele et al., OOPSLA 2014), twice."""
    state = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed * 2 + 1)
    state = _mix(_mix(state) + positions.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
