"""``/tokenize`` and ``/detokenize``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from quire.server.http.errors import ApiError
from quire.server.http.protocol.common import describe_body, read_body
from quire.server.http.protocol.tokens import DetokenizeBody, TokenizeBody
from quire.server.http.state import ServerState

__all__ = ["make_router"]

_MAX_TOKENS = 65_536
"""What ``/tokenize`` takes at once, or as much as the context, if that is more."""


def make_router(state: ServerState) -> APIRouter:
    """The routes."""
    routes = APIRouter()

    @routes.post("/tokenize", openapi_extra=describe_body(TokenizeBody))
    async def tokenize(request: Request) -> dict[str, Any]:
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
            tokens = await state.run_tokenizer(size, state.engine.tokenize, body.prompt, special, most)
        else:
            arguments = body.template_arguments()
            tokens = await state.run_tokenizer(size, state.engine.apply_chat_template, max_tokens=most, **arguments)
        texts = [state.engine.convert_id_to_text(token) for token in tokens] if body.return_token_strs else None
        return {"count": len(tokens), "max_model_len": limit, "tokens": tokens, "token_strs": texts}

    @routes.post("/detokenize", openapi_extra=describe_body(DetokenizeBody))
    async def detokenize(request: Request) -> dict[str, str]:
        """The text of token ids."""
        body = await read_body(request, DetokenizeBody, state)
        state.check_model(body.model)
        size = state.engine.config.model.vocab_size
        bad = next((token for token in body.tokens if not 0 <= token < size), None)
        if bad is not None:
            raise ApiError(400, f"tokens: {bad} is not a token id; they are below {size}", param="tokens")
        size = len(await request.body())
        return {"prompt": await state.run_tokenizer(size, state.engine.detokenize, body.tokens)}

    return routes
