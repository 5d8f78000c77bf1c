"""``/tokenize`` and ``/detokenize``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from fastapi import APIRouter, Request, Response

from quire.server.http.errors import ApiError
from quire.server.http.openapi import describe_operation
from quire.server.http.protocol.answers import DetokenizedText, TokenizedText
from quire.server.http.protocol.reading import read_body
from quire.server.http.protocol.tokens import DetokenizeBody, TokenizeBody
from quire.server.http.state import ServerState

if TYPE_CHECKING:
    from quire.core.engine.async_llm import AsyncLLM

__all__ = ["make_router"]

_ERRORS = (400, 404, 413, 415)
_MAX_TOKENS = 65_536
"""What ``/tokenize`` takes at once, or as much as the context, if that is more."""


def make_router(state: ServerState) -> APIRouter:
    """The routes."""
    routes = APIRouter()

    @routes.post(
        "/tokenize",
        response_model=None,
        openapi_extra=describe_operation("tokenize", TokenizedText, body=TokenizeBody, errors=_ERRORS),
    )
    async def tokenize(request: Request) -> Response:
        """The token ids of a text, or of messages."""
        body = await read_body(request, TokenizeBody, state)
        state.check_model(body.model)
        if (body.prompt is None) == (not body.messages):
            raise ApiError(400, "give either prompt or messages", param="prompt")
        size = len(await request.body())
        limit = state.engine.config.model.max_model_len
        most = max(limit, _MAX_TOKENS)
        if body.prompt is not None:
            special = body.add_special_tokens is not False
            tokens = await state.run_by_size(size, state.engine.tokenize, body.prompt, special, most)
        else:
            tokens = await state.encode_conversation(size, {**body.template_arguments(), "max_tokens": most})
        is_named = bool(body.return_token_strs)
        encoded = await state.run_by_size(4 * len(tokens), _encode_tokens, state.engine, tokens, limit, is_named)
        return Response(encoded, media_type="application/json")

    @routes.post(
        "/detokenize",
        response_model=None,
        openapi_extra=describe_operation("detokenize", DetokenizedText, body=DetokenizeBody, errors=_ERRORS),
    )
    async def detokenize(request: Request) -> Response:
        """The text of token ids."""
        body = await read_body(request, DetokenizeBody, state)
        state.check_model(body.model)
        size = state.engine.config.model.vocab_size
        if max(body.tokens, default=0) >= size:
            bad = next(token for token in body.tokens if token >= size)
            raise ApiError(400, f"tokens: {bad} is not a token id; they are below {size}", param="tokens")
        text = await state.run_by_size(4 * len(body.tokens), state.engine.detokenize, body.tokens)
        return Response(msgspec.json.encode({"prompt": text}), media_type="application/json")

    return routes


def _encode_tokens(engine: AsyncLLM, token_ids: list[int], max_model_len: int, is_named: bool) -> bytes:
    texts = [engine.convert_id_to_text(token) for token in token_ids] if is_named else None
    answer = {"count": len(token_ids), "max_model_len": max_model_len, "tokens": token_ids, "token_strs": texts}
    return msgspec.json.encode(answer)
