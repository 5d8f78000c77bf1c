"""A step that the executor runs, and when it was scheduled and launched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from quire.core.contracts.executor import StepFuture
from quire.core.messages import ModelRunnerOutput, SchedulerOutput
from quire.core.stats import StepStats

__all__ = ["FailedStep", "InFlightStep"]


@dataclass(slots=True)
class InFlightStep:
    """A launched step, and when it was scheduled and launched; nanoseconds of one monotonic clock."""

    step: SchedulerOutput
    future: StepFuture
    start_ns: int
    scheduled_ns: int
    launched_ns: int
    requests: NDArray[Any] | None = None
    """The requests by index, where some have a grammar."""
    held_ns: int = 0
    """From its model's launch to its sampling's, where some have a grammar."""
    masks_ns: int = 0
    """Of that, making masks."""

    @property
    def is_of_decodes(self) -> bool:
        """Whether no request computes its prompt."""
        return self.step.num_decodes == len(self.step.rows)

    def shares_rows(self, step: SchedulerOutput) -> bool:
        """Whether a request of ``step`` may be in this one."""
        return bool(np.isin(step.rows, self.step.rows).any())

    def make_step_stats(
        self, result: ModelRunnerOutput, wait_start_ns: int, tokens_known_ns: int, updated_ns: int
    ) -> StepStats:
        """The step's shape, and where its time went."""
        return StepStats(
            step=self.step.step,
            num_reqs=len(self.step.rows),
            num_decodes=self.step.num_decodes,
            num_tokens=self.step.total_num_scheduled_tokens,
            start_us=self.start_ns / 1e3,
            schedule_us=(self.scheduled_ns - self.start_ns) / 1e3,
            launch_us=(self.launched_ns - self.scheduled_ns - self.held_ns) / 1e3,
            device_us=result.device_us,
            wait_us=(tokens_known_ns - wait_start_ns) / 1e3,
            end_us=tokens_known_ns / 1e3,
            update_us=(updated_ns - tokens_known_ns) / 1e3,
            num_drafts=0 if result.num_verified_drafts is None else int(result.num_verified_drafts.sum()),
            num_accepted=int(result.num_sampled_tokens.sum() - self.step.sampling_mask.sum()),
            held_us=self.held_ns / 1e3,
            masks_us=self.masks_ns / 1e3,
        )


class FailedStep:
    """A step that could not even be launched."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def result(self) -> NoReturn:
        """Raises what launching it raised."""
        raise self._error

    def done(self) -> bool:
        """Always."""
        return True
