"""What a client tells the scheduling policy: in fields of the body, or in ``X-Quire-...`` headers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from starlette.datastructures import Headers
from starlette.requests import Request

from quire.core.scheduling_params import MAX_GROUP_CHARS, MAX_TAG_CHARS, MAX_TAG_KEY_CHARS, MAX_TAGS, SchedulingParams
from quire.server.http.errors import ApiError
from quire.server.http.middleware import get_key_name
from quire.server.http.protocol.common import GenerationBody
from quire.server.http.state import ServerState

__all__ = ["RequestScheduling", "read_scheduling"]


class RequestScheduling(NamedTuple):
    """How a request is to be scheduled."""

    priority: int
    params: SchedulingParams


def read_scheduling(state: ServerState, request: Request, body: GenerationBody) -> RequestScheduling:
    """From a request: the body wins over headers. The group is the name of the API key, where it has one; else what the
    client names, or its ``user``. Raises ``ApiError`` and ``InvalidRequestError``."""
    values: dict[str, Any] = {}
    for header in _HEADERS:
        value = getattr(body, header.field)
        if value is None:
            value = header.read_value(request.headers)
        if value is not None:
            values[header.field] = value
    values["group"] = _choose_group(state, request, values.pop("group", None), body.user)
    if "tags" not in values and body.metadata:
        values["tags"] = _to_tags(body.metadata)
    return RequestScheduling(values.pop("priority", 0), SchedulingParams(**values))


class _Header(NamedTuple):
    """A field of the body for clients that can add headers only."""

    name: str
    field: str
    convert: Callable[[str], Any]
    what: str

    def read_value(self, headers: Headers) -> Any:
        text = headers.get(self.name)
        if text is None:
            return None
        try:
            return self.convert(text)
        except ValueError:
            raise ApiError(400, f"{self.name}: must be {self.what}, got {text[:60]!r}", param=self.name) from None


def _split_tags(text: str) -> dict[str, str]:
    tags = {}
    for pair in text.split(","):
        if pair.strip():
            key, equals, value = pair.partition("=")
            if not equals or not key.strip():
                raise ValueError
            tags[key.strip()] = value.strip()
    return tags


_HEADERS = (
    _Header("X-Quire-Priority", "priority", int, "a whole number"),
    _Header("X-Quire-Group", "group", str, "a name"),
    _Header("X-Quire-Deadline-Ms", "deadline_ms", float, "a number of milliseconds"),
    _Header("X-Quire-TTFT-Target-Ms", "ttft_target_ms", float, "a number of milliseconds"),
    _Header("X-Quire-TPOT-Target-Ms", "tpot_target_ms", float, "a number of milliseconds"),
    _Header("X-Quire-Predicted-Tokens", "predicted_tokens", int, "a whole number"),
    _Header("X-Quire-Tags", "tags", _split_tags, "a list of name=text, separated by commas"),
)


def _choose_group(state: ServerState, request: Request, named: str | None, user: str | None) -> str | None:
    key_name = get_key_name(request.scope)
    if key_name is not None:
        if named not in (None, key_name):
            raise ApiError(403, f"group: the API key belongs to the group {key_name!r}; leave it out", param="group")
        return key_name
    group = named if named is not None else (user or "")[:MAX_GROUP_CHARS] or None
    if group in state.api_keys.names:
        if named is None:
            return None  # a user that happens to be called so
        raise ApiError(403, f"group: {group[:60]!r} belongs to another API key; name another", param="group")
    return group


def _to_tags(metadata: dict[str, Any]) -> dict[str, str]:
    """What of OpenAI's ``metadata`` can be tags. Clients put other things there too, which no policy needs to see."""
    texts = ((key, value) for key, value in metadata.items() if isinstance(value, str))
    fitting = [(k, v) for k, v in texts if len(k) <= MAX_TAG_KEY_CHARS and len(v) <= MAX_TAG_CHARS]
    return dict(fitting[:MAX_TAGS])
