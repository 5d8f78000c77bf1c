"""Answers of ``/v1/responses`` that are kept for ``previous_response_id``: in memory, bounded in number and bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from quire.server.http.errors import ApiError

__all__ = ["ResponseStore", "StoredResponse"]


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """One answer and the conversation that it ends, both encoded."""

    owner: str | None
    """The API key with which it was made."""
    response: bytes
    conversation: bytes

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes."""
        return len(self.response) + len(self.conversation)

    def list_messages(self) -> list[dict[str, Any]]:
        """The conversation, as messages of a chat."""
        messages: list[dict[str, Any]] = msgspec.json.decode(self.conversation)
        return messages


class ResponseStore:
    """The latest responses. The oldest make room for new ones; one that is larger than the store is not kept."""

    def __init__(self, max_responses: int, max_bytes: int) -> None:
        self._max_responses, self._max_bytes = max_responses, max_bytes
        self._stored: OrderedDict[str, StoredResponse] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def is_on(self) -> bool:
        """Whether anything is kept."""
        return self._max_responses > 0

    def add_response(
        self, response_id: str, owner: str | None, response: bytes, messages: Sequence[dict[str, Any]]
    ) -> None:
        """Keep a response, if the store is on."""
        stored = StoredResponse(owner, response, msgspec.json.encode(messages))
        if not self.is_on or stored.num_bytes > self._max_bytes:
            return
        self._stored[response_id] = stored
        self.num_bytes += stored.num_bytes
        while len(self._stored) > self._max_responses or self.num_bytes > self._max_bytes:
            _, oldest = self._stored.popitem(last=False)
            self.num_bytes -= oldest.num_bytes

    def find_response(self, response_id: str, owner: str | None, param: str | None = None) -> StoredResponse:
        """A response of ``owner``. ApiError 404 if there is none, as where it is another's; 400 if nothing is kept."""
        self._check_on(param)
        stored = self._stored.get(response_id)
        if stored is None or stored.owner != owner:
            message = f"there is no response {response_id[:100]!r}: it was not stored, or made room for newer ones"
            raise ApiError(404, message, param=param, code="response_not_found")
        return stored

    def delete_response(self, response_id: str, owner: str | None) -> None:
        """Forget a response. Raises as ``find_response`` does."""
        self.num_bytes -= self.find_response(response_id, owner).num_bytes
        del self._stored[response_id]

    def _check_on(self, param: str | None) -> None:
        if not self.is_on:
            message = "responses are not stored: send the whole conversation, or start with --max-stored-responses N"
            raise ApiError(400, f"{param}: {message}" if param else message, param=param, code="unsupported")
