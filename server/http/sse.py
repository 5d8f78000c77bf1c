"""Server-sent events: the response that writes them, and the chunks of the API as prebuilt bytes.

A streamed token costs one ``msgspec`` encoding of its text between two constant pieces; no object is built for it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from quire.core.messages import CompletionOutput
from quire.server.http.errors import ClientDisconnectedError

__all__ = ["DONE", "ChunkWriter", "EventStream", "cancel_on_disconnect", "encode_event", "needs_chunk"]

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
encode = msgspec.json.Encoder().encode


def encode_event(value: Any) -> bytes:
    """One event with a JSON value."""
    return b"data: %b\n\n" % encode(value)


def needs_chunk(choice: CompletionOutput, with_token_ids: bool) -> bool:
    """Whether a chunk of text is due: one for every step that sampled a token, even if its text is still held back for
    the rest of a character or a stop string, since clients time tokens by their chunks."""
    is_due = with_token_ids or choice.finish_reason is None
    return bool(choice.text or choice.logprobs or (choice.token_ids and is_due))


class EventStream(Response):
    """Send events as they come. When the client leaves, the generator is closed at once, wherever it waits."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the response."""
        with contextlib.suppress(ClientDisconnectedError):
            await cancel_on_disconnect(receive, self._send_events(send))

    async def _send_events(self, send: Send) -> None:
        async with contextlib.aclosing(self._events):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def cancel_on_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``; cancel it and raise ClientDisconnectedError if the client disconnects first.

    To be called once the request's body is read: then the next thing to be received is the disconnection.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_wait_disconnect(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnectedError
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


class ChunkWriter:
    """Builds the chunks of one streamed answer around constant head and tail.

    ``kind`` is ``chat.completion.chunk`` or ``text_completion``. With ``usage``, chunks carry ``"usage": null``, as in
    the API when the last one will bring the usage; with ``running_usage``, each carries what that returns.
    """

    def __init__(
        self,
        response_id: str,
        kind: str,
        created: int,
        model: str,
        usage: bool,
        running_usage: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        self._fields = {"id": response_id, "object": kind, "created": created, "model": model}
        self._head = b"data: %b" % encode(self._fields)[:-1] + b',"choices":[{"index":'
        self._tail = b'}],"usage":null}\n\n' if usage else b"}]}\n\n"
        self.ends_with_usage = usage
        self._running_usage = running_usage
        chat = kind.startswith("chat")
        self._before = b',"delta":{"content":' if chat else b',"text":'
        self._after = b"}" if chat else b""

    def encode_text(self, index: int, text: str, logprobs: Any = None, token_ids: list[int] | None = None) -> bytes:
        """New text of one choice."""
        extra = b"null" if logprobs is None else encode(logprobs)
        middle = b'%d%b%b%b,"logprobs":%b,"finish_reason":null' % (
            index,
            self._before,
            encode(text),
            self._after,
            extra,
        )
        if token_ids is not None:
            middle += b',"token_ids":' + encode(token_ids)
        return self._head + middle + self._make_tail()

    def encode_delta(self, index: int, delta: dict[str, Any], logprobs: Any, token_ids: list[int] | None) -> bytes:
        """What is new in a message of one choice beside text."""
        fields = {"delta": delta, "logprobs": logprobs, "finish_reason": None}
        return self.encode_choice(index, **(fields if token_ids is None else {**fields, "token_ids": token_ids}))

    def encode_choice(self, index: int, beside: Mapping[str, Any] | None = None, **fields: Any) -> bytes:
        """Any other chunk of one choice: its role, its end. ``beside``: fields of the chunk itself."""
        chunk = self._head + b"%d," % index + encode(fields)[1:-1] + self._make_tail()
        return chunk.removesuffix(b"}\n\n") + b"," + encode(beside)[1:] + b"\n\n" if beside else chunk

    def encode_usage(self, usage: dict[str, Any]) -> bytes:
        """The last chunk of an answer that ``ends_with_usage``."""
        return encode_event({**self._fields, "choices": [], "usage": usage})

    def _make_tail(self) -> bytes:
        if self._running_usage is None:
            return self._tail
        return b'}],"usage":%b}\n\n' % encode(self._running_usage())


async def _wait_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
