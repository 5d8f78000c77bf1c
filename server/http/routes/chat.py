"""``/v1/chat/completions``."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from quire.core.messages import CompletionOutput, RequestOutput
from quire.server.http.errors import make_error_response
from quire.server.http.generation import Outputs, collect_outputs, stream_outputs
from quire.server.http.middleware import get_request_id
from quire.server.http.protocol.chat import ChatBody
from quire.server.http.protocol.common import describe_body
from quire.server.http.protocol.reading import read_body
from quire.server.http.protocol.responses import (
    LOGPROB_BYTES,
    Usage,
    current_timestamp,
    format_chat_logprobs,
    format_prompt_logprobs,
)
from quire.server.http.sse import DONE, ChunkWriter, EventStream, needs_chunk
from quire.server.http.state import ServerState

__all__ = ["answer_chat", "make_router"]

_MAX_TRUNCATED = 8
"""Contexts that a conversation may fill before ``truncate_prompt_tokens`` cuts it."""


def make_router(state: ServerState) -> APIRouter:
    """The route."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions", openapi_extra=describe_body(ChatBody), response_model=None)
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        return await answer_chat(state, request)

    return routes


async def answer_chat(state: ServerState, request: Request) -> Response:
    """The answer to a request whose body is a ``ChatBody``."""
    body = await read_body(request, ChatBody, state)
    model = state.check_model(body.model)
    params = body.to_sampling_params(state.engine.config.model.sampling_defaults)
    if body.tools and body.tool_choice != "none":
        state.log_unparsed_tools()
    size = len(await request.body())
    arguments = body.template_arguments()
    if body.truncate_prompt_tokens is not None:  # a conversation may be longer than the context, within reason
        arguments["max_tokens"] = _MAX_TRUNCATED * state.engine.config.model.max_model_len
    prompt = await state.run_by_size(size, state.engine.apply_chat_template, **arguments)
    response_id = f"chatcmpl-{get_request_id(request.scope)}"
    if body.stream:
        usage = Usage()
        writer = ChunkWriter(
            response_id,
            "chat.completion.chunk",
            current_timestamp(),
            model,
            body.include_usage,
            usage.to_dict if body.continuous_usage else None,
        )
        outputs = await stream_outputs(state, request, [prompt], params, body)
        return EventStream(_stream_events(state, outputs, writer, usage, body))
    [output] = await collect_outputs(state, request, [prompt], params, body)
    size = LOGPROB_BYTES * len(output.prompt_logprobs or ())
    encoded = await state.run_by_size(size, _encode_response, state, output, response_id, model, body)
    return Response(encoded, media_type="application/json")


def _encode_response(state: ServerState, output: RequestOutput, response_id: str, model: str, body: ChatBody) -> bytes:
    usage = Usage()
    usage.add_output(0, output)
    response: dict[str, Any] = {
        "id": response_id,
        "object": "chat.completion",
        "created": current_timestamp(),
        "model": model,
        "choices": [_format_choice(state, choice, body) for choice in sorted(output.outputs, key=lambda c: c.index)],
        "usage": usage.to_dict(),
        "system_fingerprint": None,
        "prompt_logprobs": format_prompt_logprobs(output.prompt_logprobs),
        "prompt_token_ids": output.prompt_token_ids if body.return_token_ids else None,
    }
    return msgspec.json.encode(response)


def _format_choice(state: ServerState, choice: CompletionOutput, body: ChatBody) -> dict[str, Any]:
    return {
        "index": choice.index,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "logprobs": _format_logprobs(state, choice, body),
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
        "token_ids": choice.token_ids if body.return_token_ids else None,
    }


def _format_logprobs(state: ServerState, choice: CompletionOutput, body: ChatBody) -> dict[str, Any] | None:
    if not body.logprobs:
        return None
    top = body.logprob_token_ids or body.top_logprobs or 0
    return format_chat_logprobs(state.engine, choice.logprobs or [], top, bool(body.return_tokens_as_token_ids))


async def _stream_events(
    state: ServerState, outputs: Outputs, writer: ChunkWriter, usage: Usage, body: ChatBody
) -> AsyncGenerator[bytes, None]:
    started, with_token_ids = set[int](), bool(body.return_token_ids)
    try:
        async with contextlib.aclosing(outputs):
            async for index, output in outputs:
                usage.add_output(index, output)
                for choice in output.outputs:
                    data = b""
                    if choice.index not in started:
                        started.add(choice.index)
                        role = {"role": "assistant", "content": ""}
                        prompt = {"prompt_token_ids": output.prompt_token_ids} if with_token_ids else None
                        data = writer.encode_choice(choice.index, prompt, delta=role, logprobs=None, finish_reason=None)
                    if needs_chunk(choice, with_token_ids):
                        logprobs = _format_logprobs(state, choice, body)
                        token_ids = choice.token_ids if with_token_ids else None
                        data += writer.encode_text(choice.index, choice.text, logprobs, token_ids)
                    if choice.finish_reason is not None:
                        data += writer.encode_choice(
                            choice.index,
                            delta={},
                            logprobs=None,
                            finish_reason=choice.finish_reason,
                            stop_reason=choice.stop_reason,
                        )
                    if data:
                        yield data
        if body.include_usage:
            yield writer.encode_usage(usage.to_dict())
    except Exception as error:
        yield b"data: %b\n\n" % bytes(make_error_response(error).body)
    yield DONE
