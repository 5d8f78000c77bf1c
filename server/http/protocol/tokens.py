"""The bodies of ``/tokenize`` and ``/detokenize``."""

from __future__ import annotations

from pydantic import Field

from quire.server.http.protocol.chat import Conversation, Message
from quire.server.http.protocol.common import Body, Int32

__all__ = ["DetokenizeBody", "TokenizeBody"]


class TokenizeBody(Conversation):
    """Text, or messages for the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(default_factory=list)  # type: ignore[assignment]
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """Token ids."""

    model: str | None = None
    tokens: list[Int32]
