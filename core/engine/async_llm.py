"""``AsyncLLM``: the engine for services, its core in a process of its own."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from quire.core.contracts.metrics import MetricsExporter
from quire.core.engine.args import EngineArgs
from quire.core.engine.client import ProcessClient, ready_line
from quire.core.engine.config_builder import configure
from quire.core.engine.input_processor import InputProcessor, Prompt
from quire.core.engine.output_processor import Exporters, OutputProcessor
from quire.core.engine.process import EngineProcess
from quire.core.engine.request_state import StreamMode
from quire.core.engine.tokenizer import Tokenizer
from quire.core.errors import EngineDeadError, InvalidRequestError, QueueFullError, QuireError, RequestFailedError
from quire.core.messages import RequestOutput
from quire.core.plugin.options import parse_options
from quire.core.plugin.target import load_target
from quire.core.sampling_params import SamplingParams
from quire.core.stats import TRACED_STEPS, StepStats

__all__ = ["AsyncLLM"]

_log = logging.getLogger("quire.engine")
_LONG_TEXT = 16_384  # characters beyond which tokenizing would hold up the event loop


class AsyncLLM:
    """Construct (resolves the configuration), ``await start()``, then ``generate``; ``await shutdown()`` at the end.

    The engine core begins to load as soon as its configuration is known. ``process`` is where, if it runs already.
    """

    def __init__(
        self, args: EngineArgs | None = None, *, log_level: str = "INFO", process: EngineProcess | None = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        self._streams: dict[str, asyncio.Queue[RequestOutput | QuireError]] = {}
        self._ids = itertools.count()
        self.steps: deque[StepStats] = deque(maxlen=TRACED_STEPS)
        """The last steps of the engine, for ``quire trace``."""
        self._stats: dict[str, float] = {}
        self._receiver: asyncio.Task[None] | None = None
        self._dead: str | None = None
        args = args or EngineArgs.from_kwargs(**kwargs)
        self._client: ProcessClient | None = ProcessClient(process or EngineProcess(args.device))
        try:
            configured = configure(args)
            self.config, self.plugins = configured.config, configured.plugins
            self._client.build(self.config, log_level)
            self._prepare()
        except BaseException:
            self._client.kill()
            raise

    @property
    def exporters(self) -> list[MetricsExporter]:
        """The metrics exporters still in use."""
        return self._exporters.active

    @property
    def is_ready(self) -> bool:
        """Whether requests are served."""
        return self._receiver is not None and self._dead is None

    @property
    def is_dead(self) -> bool:
        """Whether the engine core stopped by itself."""
        return self._dead is not None

    @property
    def ready_line(self) -> str:
        """What the engine holds, once it is ready."""
        assert self._client is not None
        return ready_line(self.config, self._client.capacity)

    async def start(self) -> None:
        """Wait until the engine core has loaded the model. Raises a ``QuireError`` with the reason if it cannot."""
        if self._client is None:
            raise EngineDeadError("the engine was shut down; make another")
        try:
            await self._client.ready()
        except BaseException:
            self._client.kill()
            self._client = None
            raise
        self._receiver = asyncio.create_task(self._receive(), name="quire-outputs")

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        stream: StreamMode = "cumulative",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield outputs as they come: ``delta`` the new part of one continuation, ``cumulative`` all so far, ``final``
        once. Closing the generator aborts the request and frees its blocks.

        Raises ``InvalidRequestError`` (with ``param``), ``QueueFullError``, ``RequestFailedError``
        or ``EngineDeadError``.
        """
        client = self._alive()
        name = request_id if request_id is not None else f"quire-{next(self._ids)}"
        if name in self._streams:
            raise InvalidRequestError(f"request id {name!r} is in use; choose another", "request_id")
        queue = self._streams[name] = asyncio.Queue()
        try:
            wishes: dict[str, Any] = {"priority": priority, "cache_salt": cache_salt}
            if isinstance(prompt, str) and len(prompt) > _LONG_TEXT:
                requests = await asyncio.to_thread(self._inputs.process, name, prompt, params, **wishes)
            else:
                requests = self._inputs.process(name, prompt, params, **wishes)
            self._outputs.add(name, prompt if isinstance(prompt, str) else None, requests, params, stream)
            client.add(requests)
            while True:
                item = await queue.get()
                if isinstance(item, QuireError):
                    raise item
                yield item
                if item.finished:
                    return
        finally:
            self._streams.pop(name, None)
            self._abort(self._outputs.remove(name))

    async def abort(self, request_id: str) -> None:
        """End a request; its generator raises ``RequestFailedError``."""
        self._abort(self._outputs.remove(request_id))
        if request_id in self._streams:
            self._streams[request_id].put_nowait(RequestFailedError(f"request {request_id} was aborted"))

    def stats(self) -> Mapping[str, float]:
        """The latest gauges and counters of the engine core, by the names of ``quire.core.stats.ENGINE_STATS``."""
        return dict(self._stats)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Messages to token ids, by the model's chat template; see ``Tokenizer.apply_chat_template``."""
        return self.tokenizer.apply_chat_template(messages, **options)

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Text to token ids."""
        return self.tokenizer.encode(text, add_special_tokens)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Token ids to text, special tokens included."""
        return self.tokenizer.decode(ids)

    def token_text(self, token_id: int) -> str:
        """One token as text."""
        return self.tokenizer.token_text(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """One token as bytes."""
        return self.tokenizer.token_bytes(token_id)

    async def shutdown(self) -> None:
        """Stop the engine core. Requests under way end with ``EngineDeadError``. Idempotent."""
        if self._receiver is not None:
            self._receiver.cancel()
            await asyncio.gather(self._receiver, return_exceptions=True)
            self._receiver = None
        if self._client is not None:
            await self._client.shutdown()
            self._client = None
            self._die("the engine was shut down")
        self._exporters.close()

    def _prepare(self) -> None:
        """What this process needs of the model: everything but its weights."""
        self.tokenizer = Tokenizer(self.config.model.tokenizer_path, self.config.extra.get("chat_template"))
        self._inputs = InputProcessor.of(self.config, self.tokenizer)
        self._exporters = Exporters(self._make_exporters())
        self._outputs = OutputProcessor(self.tokenizer, self._exporters)

    async def _receive(self) -> None:
        """Take outputs to their callers until the engine core is gone."""
        assert self._client is not None
        try:
            while True:
                outputs = await self._client.outputs()
                made = self._outputs.process(outputs)
                self._abort(made.aborts)
                for output in made.outputs:
                    self._put(output.request_id, output)
                for name, reason in made.errors:
                    self._put(name, _as_error(reason))
                for step in outputs.steps:
                    self.steps.append(step)
                    self._exporters.record_step(step)
                if outputs.stats is not None:
                    self._stats = outputs.stats
                    self._exporters.record_engine(outputs.stats)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            if not isinstance(error, EngineDeadError):
                _log.error("reading the engine's outputs failed", exc_info=error)
            self._die(str(error))

    def _put(self, name: str, item: RequestOutput | QuireError) -> None:
        queue = self._streams.get(name)
        if queue is not None:
            queue.put_nowait(item)

    def _abort(self, core_ids: list[str]) -> None:
        if core_ids and self._client is not None and self._dead is None:
            self._client.abort(core_ids)

    def _die(self, reason: str) -> None:
        self._dead = reason
        for queue in self._streams.values():
            queue.put_nowait(EngineDeadError(reason))

    def _alive(self) -> ProcessClient:
        if self._dead is not None:
            raise EngineDeadError(self._dead)
        if self._client is None or self._receiver is None:
            raise EngineDeadError("the engine is not started; await start() first")
        return self._client

    def _make_exporters(self) -> list[MetricsExporter]:
        made = []
        labels = {"model_name": self.config.model.served_names[0]}
        for choice in self.config.plugins_of("metrics"):
            cls = load_target(choice.target, MetricsExporter)
            made.append(cls(labels, parse_options(cls, choice.options)))
        return made


def _as_error(reason: str) -> QuireError:
    kind, _, text = reason.partition(": ")
    if kind == "full":
        return QueueFullError(text)
    if kind == "invalid":
        return InvalidRequestError(text)
    return RequestFailedError(reason)
