"""``LLM``: offline inference, the engine in this process."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from quire.core.engine.args import EngineArgs
from quire.core.engine.client import ready_line
from quire.core.engine.config_builder import configure
from quire.core.engine.engine_core import EngineCore
from quire.core.engine.input_processor import InputProcessor, Prompt
from quire.core.engine.output_processor import Exporters, OutputProcessor
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
        self.config = configure(EngineArgs.from_kwargs(model=model, **kwargs)).config
        self.tokenizer = Tokenizer(self.config.model.tokenizer_path, self.config.extra.get("chat_template"))
        self._core = EngineCore(self.config)
        self._inputs = InputProcessor.of(self.config, self.tokenizer)
        self._outputs = OutputProcessor(self.tokenizer, Exporters())
        self._ids = itertools.count()
        self.steps: deque[StepStats] = deque(maxlen=TRACED_STEPS)
        """The last steps of the engine; ``quire.server.http.trace.make_chrome_trace`` makes a picture of them."""

    @property
    def ready_line(self) -> str:
        """What the engine holds."""
        return ready_line(self.config, self._core.capacity)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Complete prompts (texts or token ids), in order. One set of parameters serves all, or one each.

        Raises ``InvalidRequestError`` before anything runs if one of them cannot be served.
        """
        batch = _as_batch(prompts)
        if sampling_params is None:
            sampling_params = SamplingParams()
        params = [sampling_params] * len(batch) if isinstance(sampling_params, SamplingParams) else sampling_params
        if len(params) != len(batch):
            raise InvalidRequestError(f"{len(batch)} prompts but {len(params)} sampling_params; give one, or one each")
        ids = [str(next(self._ids)) for _ in batch]
        requests = [
            self._inputs.process(name, prompt, own) for name, prompt, own in zip(ids, batch, params, strict=True)
        ]
        for name, prompt, own, mine in zip(ids, batch, params, requests, strict=True):
            self._outputs.add(name, prompt if isinstance(prompt, str) else None, mine, own, "final")
            for request in mine:
                self._core.add(request)
        return self._run(ids, use_tqdm)

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

    def stats(self) -> dict[str, float]:
        """Gauges and counters of the engine."""
        return self._core.stats()

    def shutdown(self) -> None:
        """Free the model. Idempotent."""
        self._core.shutdown()

    def _run(self, ids: list[str], use_tqdm: bool) -> list[RequestOutput]:
        finished: dict[str, RequestOutput] = {}
        bar = tqdm(total=len(ids), disable=not use_tqdm, desc="requests", unit="req")
        try:
            while len(finished) < len(ids):
                outputs = self._core.step()
                self.steps.extend(outputs.steps)
                made = self._outputs.process(outputs)
                self._core.abort(made.aborts)
                if made.errors:
                    raise RequestFailedError(f"request {made.errors[0][0]}: {made.errors[0][1]}")
                finished.update((output.request_id, output) for output in made.outputs)
                bar.update(len(made.outputs))
        finally:
            bar.close()
            for name in ids:
                self._core.abort(self._outputs.remove(name))
        return [finished[name] for name in ids]


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
