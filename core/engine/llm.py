"""``LLM``: offline inference, the engine in this process."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from tqdm import tqdm

from quire.core.engine.args import EngineArgs
from quire.core.engine.client import format_ready_line
from quire.core.engine.config_builder import build_config
from quire.core.engine.engine_core import EngineCore
from quire.core.engine.input_processor import InputProcessor
from quire.core.engine.output_processor import ExporterGroup, OutputProcessor
from quire.core.engine.prompts import AnyPrompt, parse_prompt, split_prompts
from quire.core.engine.tokenizer import Tokenizer
from quire.core.errors import InvalidRequestError, RequestFailedError
from quire.core.messages import RequestOutput
from quire.core.sampling_params import SamplingParams
from quire.core.stats import TRACED_STEPS, StepStats

__all__ = ["LLM"]


class LLM:
    """Load a model and complete batches of prompts.

    Keyword arguments are the fields of ``EngineArgs`` (the flags of ``quire serve``). Raises a ``QuireError`` that says
    what to mend.

    >>> llm = LLM(model="quire-tiny")
    >>> [output] = llm.generate(["Paged attention is"], SamplingParams(temperature=0, max_tokens=8))
    >>> output.outputs[0].text
    """

    def __init__(self, model: str = "quire-tiny", **kwargs: Any) -> None:
        self.config = build_config(EngineArgs.from_kwargs(model=model, **kwargs)).config
        self.tokenizer = Tokenizer(self.config.model.tokenizer_path, self.config.extra.get("chat_template"))
        self.engine_core = EngineCore(self.config)
        """The parts of the engine are public for tests and debugging; everything else goes through the methods."""
        self.input_processor = InputProcessor.from_config(self.config, self.tokenizer)
        self.output_processor = OutputProcessor(self.tokenizer, ExporterGroup())
        self._request_counter = itertools.count()
        self.steps: deque[StepStats] = deque(maxlen=TRACED_STEPS)
        """The last steps of the engine; ``quire.server.http.trace.make_chrome_trace`` makes a picture of them."""

    @classmethod
    def from_engine_args(cls, args: EngineArgs) -> LLM:
        """From engine arguments, as code for vLLM's ``LLMEngine`` does it."""
        return cls(**{each.name: getattr(args, each.name) for each in fields(args)})

    @property
    def ready_line(self) -> str:
        """What the engine holds."""
        return format_ready_line(self.config, self.engine_core.capacity)

    def generate(
        self,
        prompts: AnyPrompt | Sequence[AnyPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = False,
        *,
        priority: int | Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts (texts, token ids, or mappings with ``prompt`` or ``prompt_token_ids``), in order. One set
        of parameters serves all, or one each; None: the model's defaults. So does ``priority`` (lower is sooner), where
        the scheduling policy looks at it.

        Raises ``InvalidRequestError`` before anything runs if one of them cannot be served.
        """
        batch = [parse_prompt(prompt) for prompt in split_prompts(prompts)]
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        params = [sampling_params] * len(batch) if isinstance(sampling_params, SamplingParams) else sampling_params
        if len(params) != len(batch):
            raise InvalidRequestError(f"{len(batch)} prompts but {len(params)} sampling_params; give one, or one each")
        priorities = [priority or 0] * len(batch) if priority is None or isinstance(priority, int) else priority
        if len(priorities) != len(batch):
            raise InvalidRequestError(f"{len(batch)} prompts but {len(priorities)} priorities; give one, or one each")
        request_ids = [str(next(self._request_counter)) for _ in batch]
        requests = [
            self.input_processor.process_inputs(request_id, prompt, p, priority=rank, cache_salt=salt)
            for request_id, (prompt, salt), p, rank in zip(request_ids, batch, params, priorities, strict=True)
        ]
        for request_id, (prompt, _), core_requests in zip(request_ids, batch, requests, strict=True):
            text = prompt if isinstance(prompt, str) else None
            self.output_processor.add_request(request_id, text, core_requests, "final")
            for request in core_requests:
                self.engine_core.add_request(request)
        return self._run_engine(request_ids, use_tqdm)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Answer one conversation, or a batch of them, in the form of ``/v1/chat/completions``.

        ``chat_template`` replaces the model's; ``chat_template_kwargs`` are variables of the template's own, such as
        ``enable_thinking``. Raises ``InvalidRequestError``, with the place in the messages, for what cannot be served.
        """
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if single else messages
        prompts = [
            self.tokenizer.apply_chat_template(
                conversation,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                chat_template=chat_template,
                chat_template_kwargs=chat_template_kwargs,
            )
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def call_control(self, method: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Call a control method of the engine core, such as ``get_stats``; what it returned, as plain values. Raises
        ``InvalidRequestError`` for an unknown method or arguments that do not fit, ``ControlCallError`` if it fails."""
        return self.engine_core.control.call_method(method, arguments or {})

    def collective_rpc(self, method: str, arguments: Mapping[str, Any] | None = None) -> list[Any]:
        """Call a control method of every worker, such as ``describe_worker``; what each returned, by rank. Raises what
        ``call_control`` does."""
        call = {"method": method, "arguments": dict(arguments or {})}
        results: list[Any] = self.call_control("collective_rpc", call)
        return results

    def get_default_sampling_params(self) -> SamplingParams:
        """Parameters with the defaults of the model's ``generation_config.json``; see ``generation_config`` and
        ``override_generation_config`` of ``EngineArgs``."""
        return SamplingParams(**self.config.model.sampling_defaults)

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer of the model."""
        return self.tokenizer.hf_tokenizer

    def get_stats(self) -> dict[str, float]:
        """Gauges and counters of the engine."""
        return self.engine_core.make_stats()

    def shutdown(self) -> None:
        """Free the model. Idempotent."""
        self.engine_core.shutdown()

    def _run_engine(self, request_ids: list[str], use_tqdm: bool) -> list[RequestOutput]:
        finished: dict[str, RequestOutput] = {}
        progress_bar = tqdm(total=len(request_ids), disable=not use_tqdm, desc="requests", unit="req")
        try:
            while len(finished) < len(request_ids):
                outputs = self.engine_core.step()
                self.steps.extend(outputs.steps)
                processed = self.output_processor.process_outputs(outputs)
                self.engine_core.abort_requests(processed.requests_to_abort)
                for failed in processed.failed_requests:
                    raise RequestFailedError(f"request {failed.request_id}: {failed.error}")
                finished.update((output.request_id, output) for output in processed.request_outputs)
                progress_bar.update(len(processed.request_outputs))
        finally:
            progress_bar.close()
            for request_id in request_ids:
                self.engine_core.abort_requests(self.output_processor.remove_request(request_id))
        return [finished[request_id] for request_id in request_ids]
