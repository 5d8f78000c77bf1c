"""A lean HTTP client for load: one request per connection, the time of every event recorded as its bytes arrive."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

import httptools
import msgspec

from quire.core.errors import ConfigError

__all__ = ["LoadClient", "Timing", "run_async"]

T = TypeVar("T")


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end on the fastest loop there is: the client must not be what is measured.

    SIGTERM cancels the work, as SIGINT does: what it changed on a server is taken back before the process ends.
    """
    try:
        import uvloop
    except ImportError:
        return asyncio.run(_cancel_on_sigterm(work))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_cancel_on_sigterm(work))


async def _cancel_on_sigterm(work: Coroutine[Any, Any, T]) -> T:
    if threading.current_thread() is not threading.main_thread():
        return await work
    task = asyncio.ensure_future(work)
    loop, previous = asyncio.get_running_loop(), signal.getsignal(signal.SIGTERM)
    is_ended = False

    def end() -> None:
        nonlocal is_ended
        is_ended = True
        task.cancel()

    loop.add_signal_handler(signal.SIGTERM, end)
    try:
        return await task
    except asyncio.CancelledError:
        if is_ended:
            signal.signal(signal.SIGTERM, previous)
            signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        signal.signal(signal.SIGTERM, previous)


@dataclass(slots=True)
class Timing:
    """One streamed answer. Times in seconds since the request was sent."""

    status: int = 0
    error: str | None = None
    sent_at: float = 0.0
    """On the clock of ``time.perf_counter``."""
    events: list[float] = field(default_factory=list)
    """When each piece of text arrived."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that the server found in its prefix cache; 0 where it does not report them."""
    output_tokens: int = 0
    total: float = 0.0

    @property
    def refused(self) -> bool:
        """Whether the server refused the request because of its load (429 or 503)."""
        return self.status in (429, 503)


class LoadClient:
    """Sends JSON to one server."""

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        parts: SplitResult = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--base-url {base_url!r} is not a URL such as http://127.0.0.1:8000")
        self._host = parts.hostname
        self._tls = parts.scheme == "https"
        self._port = parts.port or (443 if self._tls else 80)
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""

    async def get_text(self, path: str) -> str:
        """A document. Raises ConfigError if the server cannot be reached or refuses."""
        try:
            answer = await self._send_request("GET", path, b"")
        except (OSError, httptools.HttpParserError) as error:
            raise ConfigError(f"no server at {self._host}:{self._port}: {error}; start one with quire serve") from None
        if answer.status != 200:
            raise ConfigError(f"GET {path} answered {answer.status}: {bytes(answer.body)[:200]!r}")
        return bytes(answer.body).decode(errors="replace")

    async def get_json(self, path: str) -> Any:
        """A JSON document. Raises as ``text`` does."""
        return json.loads(await self.get_text(path))

    async def time_stream(self, path: str, body: dict[str, Any]) -> Timing:
        """Post a request for a stream, and time it."""
        timing = Timing(sent_at=time.perf_counter())
        try:
            answer = await self._send_request("POST", path, json.dumps(body).encode())
        except (OSError, httptools.HttpParserError) as error:
            timing.error = f"{type(error).__name__}: {error}"
            return timing
        timing.sent_at, timing.status, timing.total = answer.start, answer.status, time.perf_counter() - answer.start
        if answer.status != 200:
            timing.error = bytes(answer.body)[:200].decode(errors="replace")
            return timing
        _parse_events(answer, timing)
        return timing

    async def _send_request(self, method: str, path: str, body: bytes) -> _Response:
        head = (
            f"{method} {self._prefix}{path} HTTP/1.1\r\nHost: {self._host}\r\nConnection: close\r\n{self._key}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        loop = asyncio.get_running_loop()
        transport, answer = await loop.create_connection(
            lambda: _Response(head.encode() + body), self._host, self._port, ssl=self._tls or None
        )
        try:
            await answer.done
        finally:
            transport.close()
        return answer


class _Response(asyncio.Protocol):
    """Records bytes as they arrive, unparsed. ``arrivals`` are (time, length of the body by then)."""

    def __init__(self, request: bytes) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._request = request
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.start = 0.0
        self.status = 0
        self.body = bytearray()
        self.arrivals: list[tuple[float, int]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send."""
        sender: Any = transport  # uvloop's are of no class of asyncio's
        self.start = time.perf_counter()
        sender.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Take bytes off the wire."""
        now, before = time.perf_counter() - self.start, len(self.body)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._finish(error)
        if len(self.body) > before:
            self.arrivals.append((now, len(self.body)))

    def connection_lost(self, exc: Exception | None) -> None:
        """The other side has closed."""
        self._finish(exc if exc is not None or self.status else ConnectionError("closed without an answer"))

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        self.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        """Called by the parser."""
        self.body += data

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self._finish(None)

    def _finish(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None) if error is None else self.done.set_exception(error)


def _parse_events(answer: _Response, timing: Timing) -> None:
    """Find when each piece of text had arrived in full, after the fact: nothing is parsed while the clock runs."""
    position, arrival, finished = 0, 0, 0.0
    body = bytes(answer.body)
    while (end := body.find(b"\n\n", position)) >= 0:
        data = body[position:end].removeprefix(b"data: ")
        position = end + 2
        while answer.arrivals[arrival][1] < position:
            arrival += 1
        if data == b"[DONE]":
            if finished and len(timing.events) < timing.output_tokens:
                timing.events.append(finished)  # the last token was one without text
            return
        if data.startswith(b":"):  # a comment, which keeps the connection open
            continue
        event = msgspec.json.decode(data)
        if "error" in event:
            timing.error = str(event["error"].get("message"))
        if usage := event.get("usage"):
            timing.output_tokens = usage.get("completion_tokens", 0)
            timing.prompt_tokens = usage.get("prompt_tokens", 0)
            timing.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        choices = event.get("choices", ())
        if any(_has_token(choice) for choice in choices):
            timing.events.append(answer.arrivals[arrival][0])
        elif any(choice.get("finish_reason") for choice in choices):
            finished = answer.arrivals[arrival][0]
    timing.error = timing.error or "the stream ended before [DONE]"


def _has_token(choice: dict[str, Any]) -> bool:
    """Whether a token came with it, though perhaps no text yet. A chat begins with an event that has neither."""
    delta = choice.get("delta")
    if delta is None:
        return bool(choice.get("text") or choice.get("finish_reason") is None)
    return bool(delta.get("content") or delta.get("reasoning_content"))
