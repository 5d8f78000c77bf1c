"""``/v1/chat/completions``."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from quire.core.messages import CompletionOutput, RequestOutput
from quire.server.http.errors import error_response
from quire.server.http.generation import Outputs, gather, start_stream
from quire.server.http.middleware import request_id
from quire.server.http.protocol.chat import ChatBody
from quire.server.http.protocol.common import read_body, schema_of
from quire.server.http.protocol.replies import Usage, chat_logprobs, created_now, prompt_logprobs
from quire.server.http.sse import DONE, ChunkWriter, EventStream, speaks
from quire.server.http.state import ServerState

__all__ = ["router"]


def router(state: ServerState) -> APIRouter:
    """The route."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions", openapi_extra=schema_of(ChatBody), response_model=None)
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        body = await read_body(request, ChatBody, state)
        model = state.check_model(body.model)
        params = body.params()
        size = len(await request.body())
        prompt = await state.tokenizing(size, state.engine.apply_chat_template, **body.template_arguments())
        identity = f"chatcmpl-{request_id(request.scope)}"
        if body.stream:
            writer = ChunkWriter(identity, "chat.completion.chunk", created_now(), model, body.wants_usage)
            outputs = await start_stream(state, request, [prompt], params, body)
            return EventStream(_events(state, outputs, writer, body))
        [output] = await gather(state, request, [prompt], params, body)
        return Response(_answer(state, output, identity, model, body), media_type="application/json")

    return routes


def _answer(state: ServerState, output: RequestOutput, identity: str, model: str, body: ChatBody) -> bytes:
    usage = Usage()
    usage.add(0, output)
    answer: dict[str, Any] = {
        "id": identity,
        "object": "chat.completion",
        "created": created_now(),
        "model": model,
        "choices": [_choice(state, choice, body) for choice in sorted(output.outputs, key=lambda c: c.index)],
        "usage": usage.as_json(),
        "system_fingerprint": None,
    }
    if body.prompt_logprobs is not None:
        answer["prompt_logprobs"] = prompt_logprobs(state.engine, output.prompt_logprobs)
    return msgspec.json.encode(answer)


def _choice(state: ServerState, choice: CompletionOutput, body: ChatBody) -> dict[str, Any]:
    return {
        "index": choice.index,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "logprobs": _logprobs(state, choice, body),
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
    }


def _logprobs(state: ServerState, choice: CompletionOutput, body: ChatBody) -> dict[str, Any] | None:
    return chat_logprobs(state.engine, choice.logprobs or [], body.top_logprobs or 0) if body.logprobs else None


async def _events(
    state: ServerState, outputs: Outputs, writer: ChunkWriter, body: ChatBody
) -> AsyncGenerator[bytes, None]:
    usage, started = Usage(), set[int]()
    try:
        async with contextlib.aclosing(outputs):
            async for index, output in outputs:
                usage.add(index, output)
                for choice in output.outputs:
                    data = b""
                    if choice.index not in started:
                        started.add(choice.index)
                        role = {"role": "assistant", "content": ""}
                        data = writer.choice(choice.index, delta=role, logprobs=None, finish_reason=None)
                    if speaks(choice):
                        data += writer.text(choice.index, choice.text, _logprobs(state, choice, body))
                    if choice.finish_reason is not None:
                        data += writer.choice(
                            choice.index,
                            delta={},
                            logprobs=None,
                            finish_reason=choice.finish_reason,
                            stop_reason=choice.stop_reason,
                        )
                    if data:
                        yield data
        if body.wants_usage:
            yield writer.usage(usage.as_json())
    except Exception as error:
        yield b"data: %b\n\n" % bytes(error_response(error).body)
    yield DONE
