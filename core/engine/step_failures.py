"""What becomes of a step that failed on the worker: its requests end, the log has the exception, callers the place."""

from __future__ import annotations

import logging

import torch

from quire.core.config import EngineConfig
from quire.core.messages import EngineCoreOutputs, SchedulerOutput
from quire.core.plugin.frames import PluginFrames
from quire.core.sched.scheduler import Scheduler
from quire.core.stats import StepFailure

__all__ = ["StepFailures"]

_log = logging.getLogger("quire.engine")


class StepFailures:
    """Ends the requests of failed steps, and counts these steps by the plugin in which they failed."""

    def __init__(self, config: EngineConfig) -> None:
        self.num_failures = 0
        self._config = config

    def fail_step(self, scheduler: Scheduler, step: SchedulerOutput, error: Exception) -> EngineCoreOutputs:
        """End the requests of ``step``, which raised ``error``. They are told the plugin whose frame was innermost and
        whether memory ran out, not what the exception says: that may hold anything, also of other requests."""
        kind, name = PluginFrames(self._config).find_raiser(error) or ("", "")
        place = f" in {kind}/{name}" if kind else ""
        _log.error("step %d failed%s; its requests end with an error", step.step, place, exc_info=error)
        self.num_failures += 1
        what = "ran out of memory" if isinstance(error, torch.OutOfMemoryError) else "failed"
        outputs = scheduler.fail_step(step, f"a step of the engine {what}{place}; the engine's log says why")
        outputs.step_failures = [StepFailure(kind, name)]
        return outputs
