"""A lean HTTP client for load: one request per connection, the time of every event noted as its bytes arrive."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, urlsplit

import httptools

from quire.core.errors import ConfigError

__all__ = ["Client", "Timing"]


@dataclass(slots=True)
class Timing:
    """One streamed answer. Times in seconds since the request was sent."""

    status: int = 0
    error: str | None = None
    events: list[float] = field(default_factory=list)
    """When each piece of text arrived."""
    output_tokens: int = 0
    total: float = 0.0


class Client:
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

    async def get(self, path: str) -> Any:
        """A JSON document. Raises ConfigError if the server cannot be reached or refuses."""
        answer = _Answer()
        try:
            await self._exchange("GET", path, b"", answer)
        except OSError as error:
            raise ConfigError(f"no server at {self._host}:{self._port}: {error}; start one with quire serve") from None
        if answer.status != 200:
            raise ConfigError(f"GET {path} answered {answer.status}: {bytes(answer.body)[:200]!r}")
        return json.loads(bytes(answer.body))

    async def stream(self, path: str, body: dict[str, Any]) -> Timing:
        """Post a request for a stream, and time it."""
        answer = _Answer()
        timing = Timing()
        try:
            await self._exchange("POST", path, json.dumps(body).encode(), answer)
        except (OSError, httptools.HttpParserError) as error:
            timing.error = f"{type(error).__name__}: {error}"
            return timing
        timing.status, timing.total = answer.status, time.perf_counter() - answer.start
        if answer.status != 200:
            timing.error = bytes(answer.body)[:200].decode(errors="replace")
            return timing
        _read_events(answer, timing)
        return timing

    async def _exchange(self, method: str, path: str, body: bytes, answer: _Answer) -> None:
        reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls or None)
        try:
            head = (
                f"{method} {self._prefix}{path} HTTP/1.1\r\nHost: {self._host}\r\nConnection: close\r\n{self._key}"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            answer.start = time.perf_counter()
            writer.write(head.encode() + body)
            while data := await reader.read(1 << 16):
                answer.feed(data)
        finally:
            writer.close()


class _Answer:
    """What the parser tells us. ``marks`` are (time, length of the body by then)."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self.start = 0.0
        self.status = 0
        self.body = bytearray()
        self.marks: list[tuple[float, int]] = []

    def feed(self, data: bytes) -> None:
        """Take bytes off the wire."""
        before = len(self.body)
        self._parser.feed_data(data)
        if len(self.body) > before:
            self.marks.append((time.perf_counter() - self.start, len(self.body)))

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        self.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        """Called by the parser."""
        self.body += data


def _read_events(answer: _Answer, timing: Timing) -> None:
    """Find when each piece of text had arrived in full, after the fact: nothing is parsed while the clock runs."""
    at, mark = 0, 0
    body = bytes(answer.body)
    while (end := body.find(b"\n\n", at)) >= 0:
        data = body[at:end].removeprefix(b"data: ")
        at = end + 2
        while answer.marks[mark][1] < at:
            mark += 1
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            timing.error = str(event["error"].get("message"))
        timing.output_tokens = (event.get("usage") or {}).get("completion_tokens", timing.output_tokens)
        if any(choice.get("text") or choice.get("finish_reason") is None for choice in event.get("choices", ())):
            timing.events.append(answer.marks[mark][0])
    timing.error = timing.error or "the stream ended before [DONE]"
