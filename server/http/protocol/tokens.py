"""The bodies of ``/tokenize`` and ``/detokenize``."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from quire.server.http.protocol.chat import Conversation, Message
from quire.server.http.protocol.common import MAX_ITEMS, TOKEN_IDS_SCHEMA, Body, check_token_ids

__all__ = ["DetokenizeBody", "TokenizeBody"]

MAX_DETOKENIZED = 524_288
_TOKENS_SCHEMA = {**TOKEN_IDS_SCHEMA, "maxItems": MAX_DETOKENIZED}


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
    tokens: Annotated[
        list[Any], BeforeValidator(check_token_ids), Field(max_length=MAX_DETOKENIZED), WithJsonSchema(_TOKENS_SCHEMA)
    ]
