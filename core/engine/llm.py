"""``LLM``: offline inference, the engine in this process."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from tqdm import tqdm

from quire.core.adapters import AdapterRef, LoRARequest
from quire.core.engine.args import EngineArgs
from quire.core.engine.client import format_ready_line
from quire.core.engine.llm_engine import LLMEngine
from quire.core.engine.prompts import AnyPrompt, parse_prompt, split_prompts
from quire.core.engine.tool_use import read_tool_use
from quire.core.engine.vllm_names import check_call_arguments
from quire.core.errors import InvalidRequestError, RequestFailedError
from quire.core.messages import RequestOutput
from quire.core.sampling_params import SamplingParams
from quire.core.scheduling_params import SchedulingParams

__all__ = ["LLM"]


class LLM:
    """Load a model and complete batches of prompts.

    Keyword arguments are the fields of ``EngineArgs`` (the flags of ``quire serve``). Those that name a plugin take its
    class as well, and ``scheduling_policy`` an object of it. Raises a ``QuireError`` that says what to mend.

    >>> llm = LLM(model="quire-tiny")
    >>> [output] = llm.generate(["Paged attention is"], SamplingParams(temperature=0, max_tokens=8))
    >>> output.outputs[0].text
    """

    def __init__(self, model: str = "quire-tiny", **kwargs: Any) -> None:
        self.llm_engine = LLMEngine(EngineArgs.from_kwargs(model=model, **kwargs))
        """The engine that runs the batches, to be stepped by hand."""
        self.config = self.llm_engine.config
        self.tokenizer = self.llm_engine.tokenizer
        self.engine_core = self.llm_engine.engine_core
        """The parts of the engine are public for tests and debugging; everything else goes through the methods."""
        self.input_processor = self.llm_engine.input_processor
        self.output_processor = self.llm_engine.output_processor
        self.answer_parsers = self.llm_engine.answer_parsers
        self.steps = self.llm_engine.steps
        """The last steps of the engine; ``quire.server.http.trace.make_chrome_trace`` makes a picture of them."""
        self._request_counter = itertools.count()
        self.adapters = self.llm_engine.adapters
        """The LoRA adapters that are loaded, by name."""

    @classmethod
    def from_engine_args(cls, args: EngineArgs) -> LLM:
        """From engine arguments."""
        return cls(**{each.name: getattr(args, each.name) for each in fields(args)})

    @property
    def ready_line(self) -> str:
        """What the engine holds."""
        return format_ready_line(self.config, self.engine_core.capacity)

    def generate(
        self,
        prompts: AnyPrompt | Sequence[AnyPrompt] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = False,
        *,
        prompt_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        priority: int | Sequence[int] | None = None,
        scheduling: SchedulingParams | Sequence[SchedulingParams] | None = None,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        **vllm_arguments: Any,
    ) -> list[RequestOutput]:
        """Complete prompts (texts, token ids, or mappings with ``prompt`` or ``prompt_token_ids``), in order. One set
        of parameters serves all, or one each; None: the model's defaults. So do ``priority`` (lower is sooner) and
        ``scheduling``, where the scheduling policy looks at them, and ``lora_request``, an adapter, which is loaded if
        it is not yet. ``prompt_token_ids`` are prompts too, where there are no others. Other arguments of vLLM's are
        accepted while they are off, as ``prompt_adapter_request=None``.

        Raises ``InvalidRequestError`` before anything runs if one of them cannot be served, and ``CheckpointError`` for
        an adapter that cannot be read.
        """
        check_call_arguments("generate", vllm_arguments)
        given = prompt_token_ids if prompts is None else prompts
        if given is None or (prompts is not None and prompt_token_ids is not None):
            raise InvalidRequestError("give either prompts or prompt_token_ids", "prompts")
        batch = [parse_prompt(prompt) for prompt in split_prompts(given)]
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        params = [sampling_params] * len(batch) if isinstance(sampling_params, SamplingParams) else sampling_params
        if len(params) != len(batch):
            raise InvalidRequestError(f"{len(batch)} prompts but {len(params)} sampling_params; give one, or one each")
        priorities = [priority or 0] * len(batch) if priority is None or isinstance(priority, int) else priority
        if len(priorities) != len(batch):
            raise InvalidRequestError(f"{len(batch)} prompts but {len(priorities)} priorities; give one, or one each")
        hints = [scheduling] * len(batch) if isinstance(scheduling, SchedulingParams | None) else scheduling
        if len(hints) != len(batch):
            raise InvalidRequestError(f"{len(batch)} prompts but {len(hints)} scheduling; give one, or one each")
        wanted = list(lora_request) if isinstance(lora_request, Sequence) else [lora_request] * len(batch)
        if len(wanted) != len(batch):
            raise InvalidRequestError(f"{len(batch)} prompts but {len(wanted)} lora_request; give one, or one each")
        found: dict[int, AdapterRef | None] = {}  # by the request's place in memory: each is loaded once
        for request in wanted:
            if id(request) not in found:
                found[id(request)] = self.llm_engine.find_or_load_adapter(request)
        adapters = [found[id(request)] for request in wanted]
        request_ids = [self._make_request_id() for _ in batch]
        requests = [
            self.input_processor.process_inputs(
                request_id, prompt, p, priority=rank, cache_salt=salt, scheduling=hint, adapter=adapter
            )
            for request_id, (prompt, salt), p, rank, hint, adapter in zip(
                request_ids, batch, params, priorities, hints, adapters, strict=True
            )
        ]
        for first, *_ in requests:
            self.engine_core.compile_structured_output(first)
        for request_id, (prompt, _), core_requests in zip(request_ids, batch, requests, strict=True):
            self.llm_engine.queue_requests(request_id, prompt, core_requests, "final")
        return self._run_engine(request_ids, use_tqdm)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        use_tqdm: bool = False,
        **vllm_arguments: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or a batch of them, in the form of ``/v1/chat/completions``.

        ``message`` of each completion is its text as content, reasoning and calls of ``tools``; to be called again with
        what they return, add ``message.to_dict()`` and a message of role ``tool`` for each call.

        ``chat_template`` replaces the model's; ``chat_template_kwargs`` are variables of the template's own, such as
        ``enable_thinking``. ``lora_request`` is as for ``generate``. Other arguments of vLLM's are accepted while they
        are off.

        Raises ``InvalidRequestError``, with the place in the messages, for what cannot be served.
        """
        check_call_arguments("chat", vllm_arguments)
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if single else messages
        use = read_tool_use(tools, tool_choice, parallel_tool_calls)
        prompts = [
            self.tokenizer.apply_chat_template(
                conversation,
                tools=None if use.choice == "none" else tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                chat_template=chat_template,
                chat_template_kwargs=chat_template_kwargs,
            )
            for conversation in conversations
        ]
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        params = [sampling_params] * len(prompts) if isinstance(sampling_params, SamplingParams) else sampling_params
        if len(params) == len(prompts):  # otherwise they are refused by name
            constrain = self.answer_parsers.constrain_params
            params = [constrain(use, prompt, each) for prompt, each in zip(prompts, params, strict=True)]
        outputs = self.generate(prompts, params, use_tqdm=use_tqdm, lora_request=lora_request)
        for output, of_prompt in zip(outputs, params, strict=True):
            for completion in output.outputs:
                completion.message = self.answer_parsers.read_message(
                    use, output.prompt_token_ids, completion, of_prompt
                )
        return outputs

    def load_adapter(
        self, name: str, path: str, *, load_inplace: bool = False, base_model_name: str | None = None
    ) -> AdapterRef:
        """Load a LoRA adapter from a folder that PEFT wrote, or from the hub: ``lora_request=LoRARequest(name)`` uses
        it. ``load_inplace`` replaces the one that has the name; requests that have begun keep that. Raises
        ``InvalidRequestError`` and ``CheckpointError``."""
        return self.llm_engine.add_lora(LoRARequest(name, 0, path, base_model_name, load_inplace=load_inplace))

    def unload_adapter(self, name: str) -> None:
        """Drop a LoRA adapter, once the requests that use it have ended. Raises ``InvalidRequestError``."""
        self.llm_engine.remove_lora(name)

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
        return self.llm_engine.get_tokenizer()

    def get_stats(self) -> dict[str, float]:
        """Gauges and counters of the engine."""
        return self.llm_engine.get_stats()

    def shutdown(self) -> None:
        """Free the model. Idempotent."""
        self.llm_engine.shutdown()

    def _make_request_id(self) -> str:
        return next(name for name in map(str, self._request_counter) if name not in self.output_processor)

    def _run_engine(self, request_ids: list[str], use_tqdm: bool) -> list[RequestOutput]:
        finished: dict[str, RequestOutput] = {}
        own_ids = set(request_ids)  # others may have been added to the engine by hand
        progress_bar = tqdm(total=len(request_ids), disable=not use_tqdm, desc="requests", unit="req")
        try:
            while len(finished) < len(request_ids):
                processed = self.llm_engine.process_step()
                for failed in processed.failed_requests:
                    if failed.request_id in own_ids:
                        raise RequestFailedError(f"request {failed.request_id}: {failed.error}")
                outputs = [output for output in processed.request_outputs if output.request_id in own_ids]
                finished.update((output.request_id, output) for output in outputs)
                progress_bar.update(len(outputs))
        finally:
            progress_bar.close()
            self.llm_engine.abort_request(request_ids)
        return [finished[request_id] for request_id in request_ids]
