"""What the routes share: the engine, the settings, and whether the server is draining. One per application."""

from __future__ import annotations

import asyncio
import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from quire.core.adapters import AdapterRef
from quire.core.errors import EngineDeadError
from quire.server.http.api_keys import ApiKeys
from quire.server.http.errors import ModelNotFoundError
from quire.server.http.http_metrics import HttpMetrics
from quire.server.http.response_store import ResponseStore
from quire.server.http.settings import ServerSettings
from quire.server.http.template_defaults import parse_template_defaults

if TYPE_CHECKING:
    from quire.core.engine.async_llm import AsyncLLM

__all__ = ["ServerState"]

T = TypeVar("T")

_MAX_LOGGED_FIELDS = 64
_THREAD_ABOVE_BYTES = 16_384

log = logging.getLogger(__name__)


class ServerState:
    """Shared by the routes of one application; lives in its event loop."""

    def __init__(self, engine: AsyncLLM, settings: ServerSettings, arguments: Any = None) -> None:
        self.engine = engine
        self.settings = settings
        self.responses = ResponseStore(settings.max_stored_responses, settings.max_stored_response_bytes)
        self.api_keys = ApiKeys(settings.api_key, settings.named_api_key)
        self.arguments = arguments
        """The parsed command line, for plugins that added flags; None when there was none."""
        self._template_defaults = parse_template_defaults(settings.default_chat_template_kwargs)
        self.http_metrics = HttpMetrics()
        self.draining = False
        self.in_flight = 0
        """Requests to ``/v1`` that are being answered."""
        self._idle = asyncio.Event()
        self._idle.set()
        self._unknown_fields: set[str] = set()
        self._logged_tools = False

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names by which requests call the model, the first of which answers carry."""
        model = self.engine.config.model
        return model.served_names or (model.model,)

    def check_model(self, name: str | None) -> str:
        """The name to answer with: the model's or an adapter's. Raises ModelNotFoundError if ``name`` is not served;
        None means the first."""
        names = self.model_names
        if name is None:
            return names[0]
        if name not in names and self.engine.adapters.find_adapter(name) is None:
            adapters = [ref.name for ref in self.engine.adapters.list_adapters()]
            raise ModelNotFoundError(name, [*names, *adapters])
        return name

    def find_adapter(self, name: str | None) -> AdapterRef | None:
        """The adapter of a request for the model ``name``. Raises ModelNotFoundError if there is no such model any
        more, so that an adapter that was unloaded is never answered by the model without it."""
        self.check_model(name)
        return None if name is None else self.engine.adapters.find_adapter(name)

    async def encode_conversation(self, size: int, arguments: Mapping[str, Any]) -> list[int]:
        """Messages to token ids: ``AsyncLLM.apply_chat_template`` with ``arguments``, of a body of ``size`` bytes, and
        what the server sets of the template's variables where they leave it out."""
        variables = {**self._template_defaults, **(arguments.get("chat_template_kwargs") or {})}
        arguments = {**arguments, "chat_template_kwargs": variables or None}
        return await self.run_by_size(size, self.engine.apply_chat_template, **arguments)

    def check_alive(self) -> None:
        """Raise EngineDeadError if no request can be served any more."""
        if self.engine.is_dead:
            raise EngineDeadError("the engine stopped; see its log and restart the server")

    async def run_by_size(self, size: int, work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """What ``work`` returns, run in a thread if its input, of ``size`` bytes, would hold up the event loop."""
        if size < _THREAD_ABOVE_BYTES:
            return work(*args, **kwargs)
        return await asyncio.to_thread(work, *args, **kwargs)

    def begin_request(self, is_api: bool) -> None:
        """A request begins; only ``work``, requests to ``/v1``, is counted."""
        self.in_flight += is_api
        if is_api:
            self._idle.clear()

    def end_request(self, is_api: bool) -> None:
        """A request ends."""
        self.in_flight -= is_api
        if self.in_flight == 0:
            self._idle.set()

    async def wait_idle(self, timeout: float) -> bool:
        """Wait until no request is in flight. False if ``timeout`` seconds passed first."""
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def log_unknown_fields(self, names: Mapping[str, Sequence[str]], where: str) -> None:
        """Log unknown fields of a request, each once, with the closest of the known ones beside it."""
        for name, known in names.items():
            if name not in self._unknown_fields and len(self._unknown_fields) < _MAX_LOGGED_FIELDS:
                self._unknown_fields.add(name)
                close = difflib.get_close_matches(name[:64], known, n=1, cutoff=0.75)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                log.warning("%s: the field %.64r is unknown and was ignored%s (logged once)", where, name, hint)

    def log_unparsed_tools(self) -> None:
        """Log, once, what comes of ``tools`` without a parser."""
        if not self._logged_tools:
            self._logged_tools = True
            log.warning(
                "tools: no tool-call parser is in use, so calls are text; name one with --tool-call-parser NAME"
            )
