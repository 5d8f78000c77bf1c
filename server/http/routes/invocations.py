"""``/invocations``, under which SageMaker sends every request."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request, Response

from quire.server.http.openapi import GENERATION_ERRORS, describe_operation
from quire.server.http.protocol.answers import ChatChunk, ChatCompletion, Completion, CompletionChunk
from quire.server.http.protocol.chat import ChatBody
from quire.server.http.protocol.completion import CompletionBody
from quire.server.http.protocol.reading import read_json
from quire.server.http.routes.chat import answer_chat
from quire.server.http.routes.completions import answer_completion
from quire.server.http.state import ServerState

__all__ = ["make_router"]


def make_router(state: ServerState) -> APIRouter:
    """The route: the body of a chat, if it has messages, or else of a completion."""
    routes = APIRouter()

    @routes.post(
        "/invocations",
        response_model=None,
        openapi_extra=describe_operation(
            "invocations",
            (ChatCompletion, Completion),
            body=(ChatBody, CompletionBody),
            chunk=(ChatChunk, CompletionChunk),
            errors=GENERATION_ERRORS,
        ),
    )
    async def invocations(request: Request) -> Response:
        """Answer a conversation, or continue a prompt."""
        answer = answer_chat if _has_messages(await read_json(request)) else answer_completion
        return await answer(state, request)

    return routes


def _has_messages(data: bytes) -> bool:
    try:
        return "messages" in msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False  # the completion's own error says what is wrong
