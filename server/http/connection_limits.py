"""Limits of a connection, kept below HTTP: the size of a request's headers, and the time for a request to arrive.

Uvicorn has none of them: with ``httptools`` headers may grow without end, and a connection that sends half a request,
or nothing, stays for ever.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["ConnectionLimits", "LimitedHttpProtocol"]

log = logging.getLogger(__name__)

_GOODBYE_S = 0.1
_CHUNK_OVERHEAD = 8
"""Bytes on the wire for each byte of a body, at most: chunks of one byte take six."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What a client may take of a connection before its request is there."""

    max_header_bytes: int = 65_536
    """The request line and all headers, and later what is no body (trailers, extensions of chunks). As much as is read
    at once may come on top."""
    header_timeout_s: float = 30.0
    """From the start of a connection, or of a request on it, to the end of the headers."""
    body_timeout_s: float = 300.0
    """From the end of the headers to the end of the body."""


class LimitedHttpProtocol(HttpToolsProtocol):
    """Uvicorn's protocol, with ``limits``. A request that comes in one piece, as most do, sets no timer."""

    limits = ConnectionLimits()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._num_header_bytes = self._num_body_bytes = self._num_requests = 0
        self._phase: str | None = "headers"
        """What is awaited of a request: its headers or its body; None between two requests."""
        self._timer: asyncio.TimerHandle | None = None
        self._timed_phase: str | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client connects: its first request has to follow."""
        super().connection_made(transport)
        self._set_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._stop_timer()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """The server ends. A TLS connection without a request waits for the goodbye of its client no longer than that
        of the server takes: one that reads nothing never says it."""
        super().shutdown()
        if self.transport.is_closing() and self.transport.get_extra_info("ssl_object") is not None:
            self.loop.call_later(_GOODBYE_S, self._end_tls)

    def _end_tls(self) -> None:
        """Once all that was written has left; ``connection_lost`` comes next, if it has not come."""
        if self not in self.connections:
            return
        if self.transport.get_write_buffer_size():
            self.loop.call_later(_GOODBYE_S, self._end_tls)
        else:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Parse what came, then see how much of a request is still missing."""
        phase, num_requests = self._phase, self._num_requests
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._phase is not None and phase == self._phase and num_requests == self._num_requests:
            self._num_header_bytes += len(data)  # a piece in which headers begin or end is not counted
            if self._num_header_bytes - _CHUNK_OVERHEAD * self._num_body_bytes > self.limits.max_header_bytes:
                self._refuse(b"431 Request Header Fields Too Large", "the headers are too large")
                return
        if self._phase != self._timed_phase:
            self._set_timer()

    def on_message_begin(self) -> None:
        """A request begins."""
        self._phase = "headers"
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The headers are there; a request without a body is complete at once."""
        self._phase = "body"
        self._num_header_bytes = self._num_body_bytes = 0
        self._num_requests += 1
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of the body, whose size the middleware limits."""
        self._num_body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is complete. An idle connection is closed by ``timeout_keep_alive``."""
        self._phase = None
        self._num_header_bytes = self._num_body_bytes = 0
        super().on_message_complete()

    def _set_timer(self) -> None:
        self._stop_timer()
        if self._phase is not None:
            is_body = self._phase == "body"
            seconds = self.limits.body_timeout_s if is_body else self.limits.header_timeout_s
            self._timer, self._timed_phase = self.loop.call_later(seconds, self._end_slow_request), self._phase

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._timed_phase = None

    def _end_slow_request(self) -> None:
        self._timer = self._timed_phase = None
        if self._phase == "body":
            # Its route waits for the body, or has answered without it: the end of the connection ends both.
            log.warning(
                "a request's body did not come within %g s: the connection is closed", self.limits.body_timeout_s
            )
            self.transport.close()
        elif not self.transport.is_closing():
            self._refuse(b"408 Request Timeout", "the headers did not come in time")

    def _refuse(self, status: bytes, reason: str) -> None:
        """Answer and close. Nothing is read any more: what comes while the answer leaves is not kept."""
        self._stop_timer()
        log.warning("a connection is closed: %s", reason)
        if self.cycle is None or self.cycle.response_complete:  # else an answer to an earlier request is on its way
            self.transport.write(b"HTTP/1.1 %b\r\ncontent-length: 0\r\nconnection: close\r\n\r\n" % status)
        self.transport.close()
