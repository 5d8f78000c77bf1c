"""What becomes of a step that failed on the worker, or of some of its rows: requests end with the place, and the log
has the reason."""

from __future__ import annotations

import logging

import torch

from quire.core.adapters import AdapterRef
from quire.core.config import EngineConfig
from quire.core.errors import EngineDeadError
from quire.core.messages import EngineCoreOutput, EngineCoreOutputs, ModelRunnerOutput, SchedulerOutput
from quire.core.plugin.frames import PluginFrames
from quire.core.sample.row_faults import MASKED, NO_TOKEN, parse_processor_fault
from quire.core.sched.scheduler import Scheduler
from quire.core.stats import StepFailure
from quire.core.traces.recorder import TraceRecorder

__all__ = ["LAYER_KINDS", "StepFailures"]

_log = logging.getLogger("quire.engine")
LAYER_KINDS = ("attention", "quant", "model", "op")
"""What computes logits. Of these, what other authors wrote is at fault before what is bundled."""
_NOBODY, _CONSTRAINTS, _ADAPTER = (
    StepFailure("", ""),
    StepFailure("request", "constraints"),
    StepFailure("request", "adapter"),
)


class StepFailures:
    """Ends the requests of failed steps, and counts these steps by the plugin in which they failed."""

    def __init__(self, config: EngineConfig, recorder: TraceRecorder | None = None) -> None:
        self.num_failures = 0
        self._config = config
        self._recorder = recorder
        self._faulty_adapter_id: int | None = None  # of the last row whose logits were no numbers

    def fail_step(self, scheduler: Scheduler, step: SchedulerOutput, error: BaseException) -> EngineCoreOutputs:
        """End the requests of ``step``, which raised ``error``. They are told the plugin whose frame was innermost and
        whether memory ran out, not what the exception says: that may hold anything, also of other requests.

        Raises ``error`` where it is the end of the engine: the requests may run again in another.
        """
        if isinstance(error, EngineDeadError):
            raise error
        raiser = PluginFrames(self._config).find_raiser(error) or ("", "")
        suspects = self._find_suspects(raiser, error)
        # One of several is not picked to be counted, and to be left out after more such steps.
        kind, name = suspects[0] if len(suspects) == 1 else raiser
        place = f" in {'/'.join(raiser)}" if raiser[0] else ""
        if suspects:
            place += f", perhaps for what {' or '.join(map('/'.join, suspects))} returned"
        _log.error("step %d failed%s; its requests end with an error", step.step, place, exc_info=error)
        self.num_failures += 1
        what = "ran out of memory" if isinstance(error, torch.OutOfMemoryError) else "failed"
        outputs = scheduler.fail_step(step, f"a step of the engine {what}{place}; the engine's log says why")
        outputs.step_failures = [StepFailure(kind, name)]
        return outputs

    def update_from_output(
        self, scheduler: Scheduler, step: SchedulerOutput, output: ModelRunnerOutput
    ) -> EngineCoreOutputs:
        """Apply the output of ``step``, the oldest in flight. Requests for which it has no token, their logits being
        invalid, end before; what the prefix cache has of them is dropped. The others go on."""
        if not output.row_faults:
            return scheduler.update_from_output(step, output)
        requests, ended, failures = scheduler.in_flight[0].requests, [], []
        for index, fault in output.row_faults.items():
            request = requests[index]
            error, failure = self._describe_fault(fault, request.adapter)
            if scheduler.abort_request(request.request_id, "error", evict_prefix=True):
                _log.error("request %s ends: %s", request.external_request_id, error)
                ended.append(EngineCoreOutput(request.request_id, [], finish_reason="error", error=error))
                failures.append(failure)
                if self._recorder is not None:
                    self._recorder.record_abort(request.request_id)
        outputs = scheduler.update_from_output(step, output)
        outputs.outputs[:0] = ended
        outputs.step_failures = list(dict.fromkeys(failures))
        self.num_failures += len(outputs.step_failures)
        return outputs

    def _find_suspects(self, raiser: tuple[str, str], error: BaseException) -> list[tuple[str, str]]:
        """The operations of other authors, where ``raiser`` is a bundled layer: what they returned may be why it
        raised. Memory and the device fail for other reasons."""
        is_bundled = raiser[0] in LAYER_KINDS and PluginFrames(self._config).is_bundled(raiser)
        is_of_device = isinstance(error, torch.OutOfMemoryError) or getattr(error, "error_code", None) is not None
        if not is_bundled or is_of_device:
            return []
        chosen = self._config.plugins.values()
        return list(dict.fromkeys((c.kind, c.name) for c in chosen if c.kind == "op" and not c.is_bundled))

    def _describe_fault(self, fault: int, adapter: AdapterRef | None) -> tuple[str, StepFailure]:
        """What is told of a row, and to whom it is counted."""
        processors = self._config.plugins_of("logits_processor")
        if (of_processor := parse_processor_fault(fault)) is not None:
            choice = processors[of_processor.place]
            what = "left no token that can be sampled (NaN, or all minus infinity)"
            if of_processor.has_raised:
                what = "failed; the engine's log says why"
            is_of_request = choice.is_bundled and not of_processor.has_raised
            failure = _CONSTRAINTS if is_of_request else StepFailure(choice.kind, choice.name)
            return f"logits_processor/{choice.name} {what}", failure
        if fault == NO_TOKEN:
            name = self._config.plugin("sampler").name
            return f"sampler/{name} returned a token that is not in the vocabulary", StepFailure("sampler", name)
        if fault == MASKED:
            failure = _CONSTRAINTS if all(choice.is_bundled for choice in processors) else _NOBODY
            return "the request's constraints together leave no token that can be sampled", failure
        kinds = LAYER_KINDS if adapter is None else (*LAYER_KINDS, "adapter")
        chosen = [choice for key, choice in self._config.plugins.items() if key.partition(":")[0] in kinds]
        foreign = [choice for choice in chosen if not choice.is_bundled]
        what = "the model computed logits without a token that can be sampled (NaN, or all minus infinity)"
        if not foreign and adapter is not None:
            # Where another adapter's row failed just before, it is no request that brings it about.
            is_of_request = self._faulty_adapter_id in (None, adapter.adapter_id)
            self._faulty_adapter_id = adapter.adapter_id
            failure = _ADAPTER if is_of_request else _NOBODY
            return f"{what}: the weights of adapter {adapter.name!r} are at fault, or those of the model", failure
        if not foreign:
            return f"{what}: every layer is bundled, so that the weights are at fault, or Quire is", _NOBODY
        names = " or ".join(f"{choice.kind}/{choice.name}" for choice in foreign)
        return f"{what}; at fault is {names}, or the weights are", StepFailure(foreign[0].kind, foreign[0].name)
