"""``LLMEngine``: the engine in this process, one step at a time, as scripts for vLLM drive it."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from quire.core.adapters import AdapterRef, LoRARequest
from quire.core.config import EngineConfig, ModelConfig
from quire.core.contracts.executor import Executor
from quire.core.contracts.policy import BatchingPolicy
from quire.core.engine.adapter_registry import AdapterRegistry
from quire.core.engine.answer_parsers import AnswerParsers
from quire.core.engine.args import EngineArgs
from quire.core.engine.config_builder import build_config
from quire.core.engine.engine_core import EngineCore
from quire.core.engine.executor_start import make_executor, start_ranks_early
from quire.core.engine.exporter_group import ExporterGroup
from quire.core.engine.input_processor import InputProcessor
from quire.core.engine.output_processor import OutputProcessor, ProcessedOutputs
from quire.core.engine.prompts import AnyPrompt, Prompt, parse_prompt
from quire.core.engine.request_state import StreamMode
from quire.core.engine.tokenizer import Tokenizer
from quire.core.engine.watchdog import StepWatchdog
from quire.core.errors import ConfigError, InvalidRequestError, PluginError, QuireError
from quire.core.messages import EngineCoreRequest, RequestOutput
from quire.core.plugin.frames import PluginFrames, describe_error
from quire.core.plugin.quarantine import NEVER_CONTAINED
from quire.core.sampling_params import SamplingParams
from quire.core.scheduling_params import SchedulingParams
from quire.core.stats import TRACED_STEPS, StepStats

__all__ = ["LLMEngine"]

_ADAPTER_POLL_S = 0.002


class LLMEngine:
    """``add_request`` as requests come, ``step`` while ``has_unfinished_requests``.

    >>> engine = LLMEngine.from_engine_args(EngineArgs(model="quire-tiny"))
    >>> engine.add_request("0", "Paged attention is", SamplingParams(temperature=0, max_tokens=8))
    >>> while engine.has_unfinished_requests():
    ...     finished = [output for output in engine.step() if output.finished]
    """

    def __init__(self, args: EngineArgs) -> None:
        policy: Any = args.scheduling_policy
        ranks = start_ranks_early(args)  # they import what they need while the configuration is built
        try:
            if not isinstance(policy, BatchingPolicy):
                self.config, policy = build_config(args).config, None
            else:  # the engine is in this process, and can use the object itself
                self.config = build_config(_name_policy_object(args, policy)).config
            self.tokenizer = Tokenizer(self.config.model.tokenizer_path, self.config.extra.get("chat_template"))
            self.engine_core = _start_core(self.config, policy, make_executor(self.config, ranks))
        except BaseException:
            if ranks is not None:
                ranks.kill()
            raise
        """The parts of the engine are public for tests and debugging; everything else goes through the methods."""
        self.input_processor = InputProcessor.from_config(self.config, self.tokenizer)
        exporters = ExporterGroup()
        self.output_processor = OutputProcessor(self.tokenizer, exporters)
        self.answer_parsers = AnswerParsers.from_config(self.config, self.tokenizer, exporters.add_quarantined)
        self._watchdog = StepWatchdog(self.engine_core)
        self.steps: deque[StepStats] = deque(maxlen=TRACED_STEPS)
        """The last steps of the engine; ``quire.server.http.trace.make_chrome_trace`` makes a picture of them."""
        self.adapters = AdapterRegistry(self.config)
        """The LoRA adapters that are loaded, by name."""
        try:
            for module in self.config.extra["lora_modules"]:
                self.add_lora(LoRARequest(module.name, 0, module.path, module.base_model_name))
        except BaseException:
            self.shutdown()
            raise

    @classmethod
    def from_engine_args(cls, args: EngineArgs) -> LLMEngine:
        """From engine arguments. Raises a ``QuireError`` that says what to mend."""
        return cls(args)

    @property
    def model_config(self) -> ModelConfig:
        """What is known of the model, such as ``max_model_len``."""
        return self.config.model

    def add_request(
        self,
        request_id: str,
        prompt: AnyPrompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        scheduling: SchedulingParams | None = None,
        stream: StreamMode = "cumulative",
        lora_request: LoRARequest | None = None,
    ) -> None:
        """Queue a request. ``stream`` says what ``step`` returns of it: all so far (``cumulative``), the new part of
        one continuation (``delta``), or the whole at its end (``final``). ``lora_request`` is an adapter, which is
        loaded if it is not yet.

        Raises ``InvalidRequestError`` for what cannot be served, and for an id that is in use; ``CheckpointError`` for
        an adapter that cannot be read.
        """
        parsed, salt_of_prompt = parse_prompt(prompt)
        salt = salt_of_prompt if cache_salt is None else cache_salt
        adapter = self.find_or_load_adapter(lora_request)
        requests = self.input_processor.process_inputs(
            request_id, parsed, params, priority=priority, cache_salt=salt, scheduling=scheduling, adapter=adapter
        )
        self.engine_core.compile_structured_output(requests[0])
        self.queue_requests(request_id, parsed, requests, stream)

    def queue_requests(
        self, request_id: str, prompt: Prompt, requests: Sequence[EngineCoreRequest], stream: StreamMode
    ) -> None:
        """Queue what ``input_processor`` made of a request."""
        if request_id in self.output_processor:
            raise InvalidRequestError(f"request id {request_id!r} is in use; choose another", "request_id")
        text = prompt if isinstance(prompt, str) else None
        self.output_processor.add_request(request_id, text, requests, stream)
        self._watchdog.begin_turn()
        try:
            for request in requests:
                self.engine_core.add_request(request)
        finally:
            self._watchdog.end_turn()

    def step(self) -> list[RequestOutput]:
        """Run one step of the engine, or wait for one that runs; what it gave, often nothing.

        A request that the engine could not finish is over with the finish reason ``error``; the log says why.
        """
        processed = self.process_step()
        return [*processed.request_outputs, *(failed.output for failed in processed.failed_requests)]

    def process_step(self) -> ProcessedOutputs:
        """``step``, with the errors of requests that failed."""
        self._watchdog.begin_turn()
        try:
            outputs = self.engine_core.step()
        finally:
            self._watchdog.end_turn()
        self.steps.extend(outputs.steps)
        processed = self.output_processor.process_outputs(outputs)
        self.engine_core.abort_requests(processed.requests_to_abort)
        return processed

    def abort_request(self, request_id: str | Iterable[str]) -> None:
        """End one or several requests now: no output follows. Unknown ids are passed over."""
        for each in [request_id] if isinstance(request_id, str) else request_id:
            self.engine_core.abort_requests(self.output_processor.remove_request(each))

    def has_unfinished_requests(self) -> bool:
        """Whether there is a reason to call ``step``."""
        return self.get_num_unfinished_requests() > 0

    def get_num_unfinished_requests(self) -> int:
        """Requests that are not over."""
        return len(self.output_processor)

    def find_or_load_adapter(self, request: LoRARequest | None) -> AdapterRef | None:
        """The adapter of a request, loaded if it is not yet. Raises what ``add_lora`` does."""
        ref = self.adapters.find_requested(request)
        return self.add_lora(request) if ref is None and request is not None else ref

    def add_lora(self, lora_request: LoRARequest) -> AdapterRef:
        """Load an adapter, as ``LLM.load_adapter`` does: requests that run wait for it."""
        name, inplace = lora_request.lora_name, lora_request.load_inplace
        parent = lora_request.base_model_name
        ref = self.adapters.read_adapter(name, lora_request.lora_path, load_inplace=inplace, base_model_name=parent)
        call_control = self.engine_core.control.call_method
        try:
            while not call_control("add_adapter", {"adapter": ref}):
                time.sleep(_ADAPTER_POLL_S)
        except BaseException:
            with contextlib.suppress(QuireError):
                call_control("remove_adapter", {"adapter_id": ref.adapter_id})
            raise
        replaced = self.adapters.add_adapter(ref)
        if replaced is not None:
            call_control("remove_adapter", {"adapter_id": replaced.adapter_id})
        return ref

    def remove_lora(self, name: str) -> None:
        """Drop an adapter, as ``LLM.unload_adapter`` does."""
        ref = self.adapters.remove_adapter(name)
        self.engine_core.control.call_method("remove_adapter", {"adapter_id": ref.adapter_id})
        while self.engine_core.has_work and not self.engine_core.scheduler.has_unfinished_requests:
            self.process_step()  # the last step, which may name its slot

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer of the model."""
        return self.tokenizer.hf_tokenizer

    def get_stats(self) -> dict[str, float]:
        """Gauges and counters of the engine."""
        return self.engine_core.make_stats()

    def shutdown(self) -> None:
        """Free the model. Idempotent."""
        self.engine_core.shutdown()


def _start_core(config: EngineConfig, policy: BatchingPolicy | None, executor: Executor) -> EngineCore:
    """A plugin that exits, or is cancelled, while the engine starts does not end the process of its user."""
    try:
        return EngineCore(config, policy, executor)
    except (Exception, *NEVER_CONTAINED):
        raise
    except BaseException as error:
        raise PluginError(f"the engine cannot start: {describe_error(error, PluginFrames(config))}") from error


def _name_policy_object(args: EngineArgs, policy: BatchingPolicy) -> EngineArgs:
    """``args`` with the class and the options of ``policy`` in its place, for the configuration."""
    if "policy" in args.plugin_options:
        raise ConfigError("scheduling_policy is an object, which has its options: leave out those of plugin_options")
    own = {} if policy.options is None else {"policy": policy.options}
    named: Any = type(policy)  # becomes its name
    return replace(args, scheduling_policy=named, plugin_options={**args.plugin_options, **own})
