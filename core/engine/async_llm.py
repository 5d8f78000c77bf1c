"""``AsyncLLM``: the engine for services, its core in a process of its own."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, get_args

from quire.core.adapters import AdapterRef, LoRARequest
from quire.core.config import PluginChoice
from quire.core.contracts.metrics import MetricsExporter
from quire.core.engine.adapter_manager import AdapterManager
from quire.core.engine.adapter_registry import AdapterRegistry
from quire.core.engine.answer_parsers import AnswerParsers
from quire.core.engine.args import EngineArgs
from quire.core.engine.client import EngineCoreClient, EngineFault, format_ready_line
from quire.core.engine.config_builder import build_config
from quire.core.engine.engine_stats import EngineStats
from quire.core.engine.exporter_group import ExporterGroup, RenderedMetrics
from quire.core.engine.input_processor import InputProcessor
from quire.core.engine.output_processor import OutputProcessor
from quire.core.engine.output_queue import OutputQueue
from quire.core.engine.process import EngineProcess
from quire.core.engine.prompts import AnyPrompt, parse_prompt
from quire.core.engine.request_state import StreamMode
from quire.core.engine.restarts import EngineRestarter, read_until_fault
from quire.core.engine.step_health import StepHealth
from quire.core.engine.tokenizer import Tokenizer
from quire.core.engine.vllm_names import check_call_arguments
from quire.core.engine.watchdog import PluginWatchdog
from quire.core.errors import EngineDeadError, InvalidRequestError, QuireError, RequestFailedError
from quire.core.messages import RequestOutput
from quire.core.plugin.options import parse_options
from quire.core.sampling_params import SamplingParams
from quire.core.scheduling_params import SchedulingParams
from quire.core.stats import TRACED_STEPS, StepStats
from quire.core.structured_output.checker import ConstraintChecker

__all__ = ["AsyncLLM"]

_log = logging.getLogger("quire.engine")
_LONG_TEXT_CHARS = 16_384  # characters beyond which tokenizing would hold up the event loop


class AsyncLLM:
    """Construct (resolves the configuration), ``await start()``, then ``generate``; ``await shutdown()`` at the end.

    The engine core begins to load as soon as its configuration is known: in ``process``, where one was started before.
    """

    def __init__(
        self, args: EngineArgs | None = None, *, log_level: str = "INFO", process: EngineProcess | None = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        self._output_queues: dict[str, OutputQueue] = {}
        self._request_counter = itertools.count()
        self.steps: deque[StepStats] = deque(maxlen=TRACED_STEPS)
        """The last steps of the engine, for ``quire trace``."""
        self._plugin_watchdog: PluginWatchdog | None = None
        self._output_handler: asyncio.Task[None] | None = None
        self._unavailable_reason: str | None = None
        self._is_dead = False
        args = args or EngineArgs.from_kwargs(**kwargs)
        self._client: EngineCoreClient | None = EngineCoreClient(
            process or EngineProcess(args.device, args.num_workers, args.executor)
        )
        try:
            built = build_config(args)
            self.config, self.plugins = built.config, built.plugins
            self._client.start_engine(self.config, log_level)
            self.step_health = StepHealth(self.config)
            self._restarter = EngineRestarter(self.config, log_level)
            self.adapters = AdapterManager(AdapterRegistry(self.config), self.call_control)
            """The LoRA adapters: to load, unload and find by name."""
            self._build_processors()
        except BaseException:
            self._client.kill()
            raise

    @classmethod
    def from_engine_args(cls, args: EngineArgs) -> AsyncLLM:
        """From engine arguments, as code for vLLM's ``AsyncLLMEngine`` does it; ``await start()`` is still to come."""
        return cls(args)

    @property
    def exporters(self) -> list[MetricsExporter]:
        """The metrics exporters still in use."""
        return self._exporters.active

    async def render_metrics(self) -> list[RenderedMetrics]:
        """What the metrics exporters show, by exporter; one that takes more than five seconds is left out."""
        return await self._exporters.render()

    @property
    def is_ready(self) -> bool:
        """Whether requests are served."""
        return self._output_handler is not None and self._unavailable_reason is None

    @property
    def unavailable_reason(self) -> str | None:
        """Why requests are not served any more, or not until another engine core has started; None: they are, or the
        first engine core has not started yet."""
        return self._unavailable_reason

    @property
    def is_dead(self) -> bool:
        """Whether the engine core hung or died, and none takes its place."""
        return self._is_dead

    @property
    def process(self) -> EngineProcess | None:
        """The process of the engine core, another one after each restart; None after ``shutdown``."""
        return None if self._client is None else self._client.process

    @property
    def ready_line(self) -> str:
        """What the engine holds, once it is ready."""
        assert self._client is not None
        return format_ready_line(self.config, self._client.capacity)

    async def start(self) -> None:
        """Wait until the engine core has loaded the model. Raises a ``QuireError`` with the reason if it cannot."""
        if self._client is None:
            raise EngineDeadError("the engine was shut down; make another")
        begin = time.monotonic()
        try:
            await self._client.wait_ready()
        except BaseException:
            self._client.kill()
            self._client = None
            raise
        self._restarter.note_first_start(time.monotonic() - begin)
        self._plugin_watchdog = PluginWatchdog(list_thread_ids=self._exporters.list_thread_ids)
        self._stats.record(self._client.capacity.stats)
        self._output_handler = asyncio.create_task(self._serve_engines(), name="quire-outputs")
        for module in self.config.extra["lora_modules"]:
            await self.adapters.load_adapter(module.name, module.path, base_model_name=module.base_model_name)

    async def generate(
        self,
        prompt: AnyPrompt,
        sampling_params: SamplingParams,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        scheduling: SchedulingParams | None = None,
        stream: StreamMode = "cumulative",
        shown_token_ids: frozenset[int] = frozenset(),
        lora_request: LoRARequest | AdapterRef | None = None,
        **vllm_arguments: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield outputs as they come: ``delta`` the new part of one continuation, ``cumulative`` all so far, ``final``
        once. ``scheduling`` is told to the scheduling policy. Closing the generator aborts the request and frees its
        blocks. ``shown_token_ids`` are special tokens that the text has though ``skip_special_tokens`` is on: those
        that an ``AnswerParser`` reads. ``lora_request`` is a LoRA adapter, which is loaded if it is not yet. Other
        arguments of vLLM's are accepted while they are off, as ``prompt_adapter_request=None``.

        Raises ``InvalidRequestError``, ``QueueFullError``, ``RequestFailedError`` or ``EngineDeadError``.
        """
        check_call_arguments("generate", vllm_arguments)
        self._require_client()
        if stream not in get_args(StreamMode):
            raise InvalidRequestError(f"stream must be one of {get_args(StreamMode)}, got {stream!r:.60}", "stream")
        prompt, salt_of_prompt = parse_prompt(prompt)
        cache_salt = salt_of_prompt if cache_salt is None else cache_salt
        if request_id is None:
            request_id = f"quire-{next(self._request_counter)}"
        elif not isinstance(request_id, str):
            raise InvalidRequestError(f"request_id must be a string, got {request_id!r:.60}", "request_id")
        if request_id in self._output_queues:
            raise InvalidRequestError(f"request id {request_id!r} is in use; choose another", "request_id")
        queue = self._output_queues[request_id] = OutputQueue()
        try:
            options: dict[str, Any] = {"priority": priority, "cache_salt": cache_salt, "scheduling": scheduling}
            options["adapter"] = await self.adapters.find_or_load(lora_request)
            if isinstance(prompt, str) and len(prompt) > _LONG_TEXT_CHARS:
                requests = await asyncio.to_thread(
                    self._input_processor.process_inputs, request_id, prompt, sampling_params, **options
                )
            else:
                requests = self._input_processor.process_inputs(request_id, prompt, sampling_params, **options)
            queue.num_answers = len(requests)
            await self.constraint_checker.check_constraint(requests[0].params.structured_outputs)
            self._output_processor.add_request(
                request_id, prompt if isinstance(prompt, str) else None, requests, stream, shown_token_ids
            )
            self._require_client().add_requests(requests)
            while True:
                item = await queue.get()
                if isinstance(item, QuireError):
                    raise item
                yield item
                if item.finished:
                    return
        finally:
            self._output_queues.pop(request_id, None)
            self._abort_core_requests(self._output_processor.remove_request(request_id))

    async def abort(self, request_id: str) -> None:
        """End a request; its generator raises ``RequestFailedError``."""
        self._abort_core_requests(self._output_processor.remove_request(request_id))
        self._put_output(request_id, RequestFailedError(f"request {request_id} was aborted"))

    async def call_control(
        self, method: str, arguments: Mapping[str, Any] | None = None, *, timeout: float = 60.0
    ) -> Any:
        """Call a control method of the engine core between two steps, such as ``get_stats``; what it returned, as plain
        values. Requests go on meanwhile, a step later.

        Raises ``InvalidRequestError`` for an unknown method or arguments that do not fit, ``ControlCallError`` if it
        fails or does not reply within ``timeout`` seconds, and ``EngineDeadError``.
        """
        return await self._require_client().call_control(method, arguments or {}, timeout)

    async def collective_rpc(
        self, method: str, arguments: Mapping[str, Any] | None = None, *, timeout: float = 60.0
    ) -> list[Any]:
        """Call a control method of every worker, such as ``describe_worker``; what each returned, by rank. Raises what
        ``call_control`` does."""
        call = {"method": method, "arguments": dict(arguments or {})}
        results: list[Any] = await self.call_control("collective_rpc", call, timeout=timeout)
        return results

    async def set_policy(self, name: str, options: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Ask another scheduling policy, or the same with other options, from the next step on; what the control method
        ``get_policy`` returns then. No request is dropped. Raises ``PluginError``, and what ``call_control`` does."""
        found = self.plugins.resolve_plugin("policy", name, announce=False, anew=True)
        choice = PluginChoice("policy", found.name, found.target, dict(options or {}))
        parse_options(self.plugins.load_class(found), choice.options)
        arguments = {"name": choice.name, "target": found.location, "options": choice.options}
        policy = dict(await self.call_control("set_policy", arguments))
        self._restarter.note_policy(choice)
        return policy

    async def get_tokenizer(self) -> Any:
        """The transformers tokenizer of the model."""
        return self.tokenizer.hf_tokenizer

    def get_stats(self) -> Mapping[str, float]:
        """The latest gauges and counters of the engine core, by the names of ``quire.core.stats.ENGINE_STATS``."""
        return dict(self._stats.latest)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, max_tokens: int | None = None, **options: Any
    ) -> list[int]:
        """Messages to token ids, by the model's chat template; see ``Tokenizer.render_chat_template``. More than
        ``max_tokens``, by default those of a prompt, are refused before they are tokenized whole."""
        text = self.tokenizer.render_chat_template(messages, **options)
        return self._input_processor.encode_text(text, add_special_tokens=False, max_tokens=max_tokens)

    def encode_prompt(self, prompt: str | Sequence[int], sampling_params: SamplingParams) -> list[int]:
        """The token ids that ``generate`` makes of a prompt, and takes in its place: for callers that tokenize in a
        thread. Raises ``InvalidRequestError``."""
        return self._input_processor.encode_prompt(prompt, sampling_params)

    def tokenize(self, text: str, add_special_tokens: bool = True, max_tokens: int | None = None) -> list[int]:
        """Text to token ids. With ``max_tokens``, a text of more is refused before it is tokenized whole."""
        if max_tokens is None:
            return self.tokenizer.encode(text, add_special_tokens)
        return self._input_processor.encode_text(text, add_special_tokens, max_tokens)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Token ids to text, special tokens included."""
        return self.tokenizer.decode(ids)

    def convert_id_to_text(self, token_id: int) -> str:
        """What one token adds to a text that it does not begin."""
        return self.tokenizer.token_texts[token_id]

    def convert_id_to_bytes(self, token_id: int) -> bytes:
        """One token as bytes."""
        return self.tokenizer.token_bytes[token_id]

    async def shutdown(self, timeout: float = 10.0) -> None:
        """Stop the engine core, by force after ``timeout`` seconds. Unfinished requests end with ``EngineDeadError``
        at once. Idempotent."""
        if self._output_handler is not None:
            self._output_handler.cancel()
            await asyncio.gather(self._output_handler, return_exceptions=True)
            self._output_handler = None
        if self._client is not None:
            client, self._client = self._client, None
            is_serving = self._unavailable_reason is None
            self._fail_all_requests("the engine was shut down")
            await client.shutdown(timeout if is_serving else 0)
        self.constraint_checker.close()
        await asyncio.to_thread(self._exporters.close)
        if self._plugin_watchdog is not None:
            self._plugin_watchdog.stop()

    def kill_at_once(self) -> None:
        """End the engine's process, from a signal handler that is about to end this one: waits for nothing."""
        if self._client is not None:
            self._client.process.kill_at_once()

    def _build_processors(self) -> None:
        """Build what this process needs of the model: everything but its weights."""
        self.tokenizer = Tokenizer(self.config.model.tokenizer_path, self.config.extra.get("chat_template"))
        self._input_processor = InputProcessor.from_config(self.config, self.tokenizer)
        self.constraint_checker = ConstraintChecker(self.config)
        self._exporters = ExporterGroup.from_config(self.config)
        self.add_quarantined = self._exporters.add_quarantined
        """To be told that a plugin of this process was quarantined."""
        self._stats = EngineStats(self._restarter, self.constraint_checker, self._exporters)
        self._output_processor = OutputProcessor(self.tokenizer, self._exporters)
        self.answer_parsers = AnswerParsers.from_config(self.config, self.tokenizer, self.add_quarantined)

    async def _serve_engines(self) -> None:
        """Serve with an engine core, and with another when it hangs or dies, until there is to be none."""
        try:
            is_served = True
            while is_served:
                assert self._client is not None
                fault = await read_until_fault(self._client, self._handle_outputs(self._client))
                is_served = await self._recover_from(fault)
        except Exception as error:
            _log.error("reading the engine's outputs failed", exc_info=error)
            self._is_dead = True
            self._fail_all_requests(str(error))

    async def _handle_outputs(self, client: EngineCoreClient) -> EngineFault:
        """Put outputs into the queues of their callers until the engine core is gone, or its plugins keep failing."""
        while True:
            outputs = await client.get_outputs()
            processed = self._output_processor.process_outputs(outputs)
            self._abort_core_requests(processed.requests_to_abort)
            for output in processed.request_outputs:
                self._put_output(output.request_id, output)
            for failed in processed.failed_requests:
                self._put_output(failed.request_id, failed.to_exception())
            self.steps.extend(outputs.steps)
            self._exporters.record_steps(outputs)
            if outputs.stats is not None:
                self._stats.record(outputs.stats, outputs.quarantined)
                if self.config.adapters is not None:
                    self._exporters.record_adapters(outputs.adapters, self.config.adapters.max_loras)
            self.step_health.note_outputs(outputs)
            if (fault := self.step_health.find_fault()) is not None:
                return fault

    async def _recover_from(self, fault: EngineFault) -> bool:
        """Requests of which callers have got nothing run again on another engine core, once; the others end with an
        error. False if there is no other, and every request has ended."""
        while True:
            self._unavailable_reason = fault.reason
            refusal = self._restarter.find_refusal(fault)
            self._is_dead = refusal is not None
            for request_id in self._output_processor.remove_lost_requests():
                self._put_output(request_id, EngineDeadError(fault.reason))
            if refusal is not None:
                _log.error("%s", refusal)
                self._fail_all_requests(refusal)
            self._stats.record_no_engine()
            assert self._client is not None
            await self._client.shutdown(timeout=0)
            if refusal is not None:
                return False
            self._client = self._restarter.start_engine(fault)
            self._stats.record_no_engine()
            _log.error("%s; starting another engine (restart %d)", fault.reason, self._restarter.num_restarts)
            try:
                async with asyncio.timeout(self._restarter.start_limit_s):
                    await self._client.wait_ready()
                break
            except (QuireError, TimeoutError) as error:
                why = str(error) or f"it was not ready in {self._restarter.start_limit_s:.0f} s"
                fault = EngineFault(f"another engine did not start: {why}")
        self._stats.record(self._client.capacity.stats)
        self._unavailable_reason = None
        restarted = self._output_processor.restart_requests()
        for requests in restarted:
            self._require_client().add_requests(requests)
        _log.warning("the engine serves again; %d requests run again", len(restarted))
        return True

    def _put_output(self, name: str, item: RequestOutput | QuireError) -> None:
        queue = self._output_queues.get(name)
        if queue is not None and not queue.put_output(item):
            self._abort_core_requests(self._output_processor.remove_request(name))

    def _abort_core_requests(self, core_ids: list[int]) -> None:
        if core_ids and self._client is not None and self._unavailable_reason is None:
            self._client.abort_requests(core_ids)

    def _fail_all_requests(self, reason: str) -> None:
        self._unavailable_reason = reason
        for queue in self._output_queues.values():
            queue.put_nowait(EngineDeadError(reason))

    def _require_client(self) -> EngineCoreClient:
        if self._unavailable_reason is not None:
            raise EngineDeadError(self._unavailable_reason)
        if self._client is None or self._output_handler is None:
            raise EngineDeadError("the engine is not started; await start() first")
        return self._client
