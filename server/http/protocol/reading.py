"""How request bodies are read: as JSON, checked against a model, and small enough that others need not wait.

JSON is parsed on the event loop, and wherever it is parsed the interpreter does nothing else. Bytes of text cost next
to nothing, values do: so values are counted before anything is parsed, in pieces between which others are served.
"""

from __future__ import annotations

import asyncio
from typing import TypeVar

from pydantic import ValidationError
from starlette.requests import Request

from quire.server.http.errors import ApiError, make_validation_error
from quire.server.http.protocol.common import Body
from quire.server.http.state import ServerState

__all__ = ["MAX_NODES", "MAX_VALUES", "read_body", "read_json"]

M = TypeVar("M", bound=Body)

MAX_VALUES = 524_288
"""Values of a body, such as the token ids of all its prompts together: they are parsed in some 40 ms."""
MAX_NODES = 32_768
"""Objects, lists and fields of a body, which take ten times as long each."""

_UNCOUNTED_BYTES = 65_536
"""Bodies of so many bytes hold too few values to matter."""
_PIECE_BYTES = 1_048_576
_QUOTES_PER_PIECE = 4096


async def read_body(request: Request, model: type[M], state: ServerState) -> M:
    """Read and check a JSON body. Raises ApiError on one line."""
    try:
        body = model.model_validate_json(await read_json(request) or b"{}")
    except ValidationError as error:
        raise make_validation_error(error.errors(include_url=False)) from None
    if unknown := body.unknown_fields():
        state.log_unknown_fields(unknown, request.url.path)
    return body


async def read_json(request: Request) -> bytes:
    """The bytes of a body that says it is JSON and holds no more values than can be parsed at once. Raises ApiError."""
    _check_content_type(request.headers.get("content-type", ""))
    if (encoding := request.headers.get("content-encoding", "identity")) != "identity":
        raise ApiError(415, f"the body is encoded as {encoding[:100]!r}; send it without Content-Encoding")
    data = await request.body()
    if len(data) > _UNCOUNTED_BYTES:
        await _check_size(data)
    return data


def _check_content_type(header: str) -> None:
    """A browser sends other types from any web page without asking; for JSON it asks the server first (CORS)."""
    media_type = header.partition(";")[0].strip().lower()
    if media_type != "application/json":
        given = f"not {media_type[:100]!r}" if media_type else "which is missing"
        raise ApiError(415, f"the body must be JSON: send 'Content-Type: application/json', {given}")


async def _check_size(data: bytes) -> None:
    """Count what stands outside of strings; where there is little of it in the whole body, that is known sooner. What
    is no JSON is counted somehow, and refused by the parser."""
    num_values = num_nodes = 0
    for start in range(0, len(data), _PIECE_BYTES):
        num_values += data.count(b",", start, start + _PIECE_BYTES)
        num_nodes += _count_nodes(data, start, start + _PIECE_BYTES)
        await asyncio.sleep(0)
    if num_values <= MAX_VALUES and num_nodes <= MAX_NODES:
        return
    num_values = num_nodes = num_quotes = num_steps = start = after_quote = 0
    in_string = False
    while start < len(data):
        quote = data.find(b'"', start, start + _PIECE_BYTES)
        end = quote if quote >= 0 else min(start + _PIECE_BYTES, len(data))
        if not in_string:
            num_values += data.count(b",", start, end)
            num_nodes += _count_nodes(data, start, end)
            if max(num_values, num_quotes // 2) > MAX_VALUES:
                raise ApiError(400, f"the body holds more than {MAX_VALUES} values; send several requests")
            if num_nodes > MAX_NODES:
                raise ApiError(400, f"the body holds more than {MAX_NODES} objects, lists and fields; send less")
        num_steps += 1
        start = end
        if quote >= 0:
            if not (in_string and _ends_in_escape(data[after_quote:quote])):
                in_string = not in_string
                num_quotes += 1
            start = after_quote = quote + 1
        if quote < 0 or num_steps % _QUOTES_PER_PIECE == 0:
            await asyncio.sleep(0)


def _count_nodes(data: bytes, start: int, end: int) -> int:
    return data.count(b":", start, end) + data.count(b"[", start, end) + data.count(b"{", start, end)


def _ends_in_escape(text: bytes) -> bool:
    """Whether an odd number of backslashes ends it, so that a quote behind it ends no string."""
    return (len(text) - len(text.rstrip(b"\\"))) % 2 == 1
