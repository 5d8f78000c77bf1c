"""Whether the steps of an engine keep failing, as the API process sees it."""

from __future__ import annotations

import time

from quire.core.config import EngineConfig
from quire.core.engine.client import EngineFault
from quire.core.engine.step_failures import LAYER_KINDS
from quire.core.messages import EngineCoreOutputs
from quire.core.stats import QuarantinedPlugin, StepFailure

__all__ = ["StepHealth"]

_MAX_FAILED_STEPS, _RETRY_AFTER_S = 3, 30.0
_MAX_FAULTS = 8
"""Failed steps in a row after which what other authors wrote is replaced."""


class StepHealth:
    """Whether steps fail one after the other: then requests should go elsewhere. One that fails now and then, or with a
    request that brings it about, is no such sign."""

    def __init__(self, config: EngineConfig) -> None:
        choices = config.plugins.values()
        kinds = (*LAYER_KINDS, "sampler")  # which replaces a sampler that raises, not one whose tokens are none
        self._foreign = {(c.kind, c.name) for c in choices if c.kind in kinds and not c.is_bundled}
        self._num_failed = 0  # steps in a row
        self._last_failure: StepFailure | None = None
        self._last_failed_at = 0.0

    def note_outputs(self, outputs: EngineCoreOutputs) -> None:
        """What one message of the engine core holds. A step from which any request got a token has not failed."""
        if outputs.request_ids or any(output.new_token_ids for output in outputs.outputs):
            self._num_failed = 0
        elif failures := [each for each in outputs.step_failures if each.kind != "request"]:
            self._num_failed += len(failures)
            self._last_failure, self._last_failed_at = failures[-1], time.monotonic()

    def find_fault(self) -> EngineFault | None:
        """That steps keep failing in what another author wrote of layers or sampling; told once. None: they do not."""
        failure = self._last_failure
        if failure is None or self._num_failed < _MAX_FAULTS or (failure.kind, failure.name) not in self._foreign:
            return None
        reason = f"{self._num_failed} steps in a row failed in {failure.kind}/{failure.name}"
        self._num_failed = 0
        return EngineFault(reason, QuarantinedPlugin(failure.kind, failure.name, "raised"))

    def describe_failures(self) -> str | None:
        """Why requests should go elsewhere; None: they are served. After a while without requests they may come again,
        to see."""
        if self._num_failed < _MAX_FAILED_STEPS or time.monotonic() - self._last_failed_at > _RETRY_AFTER_S:
            return None
        failure = self._last_failure
        place = f", in {failure.kind}/{failure.name}" if failure is not None and failure.kind else ""
        return f"the last {self._num_failed} steps failed{place}; the engine's log says why"
