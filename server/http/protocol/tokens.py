"""The bodies of ``/tokenize`` and ``/detokenize``."""

from __future__ import annotations

from pydantic import Field

from quire.server.http.protocol.chat import Conversation, Message
from quire.server.http.protocol.common import MAX_ITEMS, Body, Int32

__all__ = ["DetokenizeBody", "TokenizeBody"]

MAX_DETOKENIZED = 1_048_576


class TokenizeBody(Conversation):
    """Text, or messages for the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(default_factory=list, max_length=MAX_ITEMS)  # type: ignore[assignment]
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """Token ids."""

    model: str | None = None
    tokens: list[Int32] = Field(max_length=MAX_DETOKENIZED)
