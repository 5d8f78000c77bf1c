"""``/v1/chat/completions``."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from quire.core.messages import CompletionOutput, RequestOutput
from quire.core.parsing.answer_parser import AnswerParser
from quire.core.parsing.events import ArgumentsDelta, ContentDelta, ReasoningDelta, ToolCallStart
from quire.core.parsing.message import AssistantMessage
from quire.server.http.errors import make_error_response
from quire.server.http.generation import Outputs, collect_outputs, stream_outputs
from quire.server.http.middleware import get_request_id
from quire.server.http.openapi import GENERATION_ERRORS, describe_operation
from quire.server.http.protocol.answers import ChatChunk, ChatCompletion
from quire.server.http.protocol.chat import ChatBody
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

__all__ = ["MAX_TRUNCATED", "answer_chat", "make_router"]

MakeParser = Callable[[], AnswerParser | None]

MAX_TRUNCATED = 8
"""Contexts that a conversation may fill before ``truncate_prompt_tokens`` cuts it."""


def make_router(state: ServerState) -> APIRouter:
    """The route."""
    routes = APIRouter()

    @routes.post(
        "/v1/chat/completions",
        response_model=None,
        openapi_extra=describe_operation(
            "chat_completions", ChatCompletion, body=ChatBody, chunk=ChatChunk, errors=GENERATION_ERRORS
        ),
    )
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        return await answer_chat(state, request)

    return routes


async def answer_chat(state: ServerState, request: Request) -> Response:
    """The answer to a request whose body is a ``ChatBody``."""
    body = await read_body(request, ChatBody, state)
    model = state.check_model(body.model)
    params = body.to_sampling_params(state.engine.config.model.sampling_defaults)
    parsers, use = state.engine.answer_parsers, body.read_tool_use()
    if use.choice != "none" and not parsers.find_calls_in(use):
        state.log_unparsed_tools()
    size = len(await request.body())
    arguments = body.template_arguments()
    if body.truncate_prompt_tokens is not None:  # a conversation may be longer than the context, within reason
        arguments["max_tokens"] = MAX_TRUNCATED * state.engine.config.model.max_model_len
    prompt = await state.encode_conversation(size, arguments)
    params = parsers.constrain_params(use, prompt, params)
    make_parser = partial(parsers.make_parser, use, prompt)
    shown = parsers.find_shown_tokens(use)
    response_id = f"chatcmpl-{get_request_id(request.scope, body.request_id)}"
    if body.stream:
        usage = Usage()
        writer = ChunkWriter(
            response_id,
            "chat.completion.chunk",
            current_timestamp(),
            model,
            state.settings.enable_force_include_usage or body.include_usage,
            usage.to_dict if body.continuous_usage else None,
        )
        outputs = await stream_outputs(state, request, [prompt], params, body, shown)
        return EventStream(_stream_events(state, outputs, writer, usage, body, make_parser))
    [output] = await collect_outputs(state, request, [prompt], params, body, shown)
    size = LOGPROB_BYTES * len(output.prompt_logprobs or ())
    encoded = await state.run_by_size(size, _encode_response, state, output, response_id, model, body, make_parser)
    return Response(encoded, media_type="application/json")


def _encode_response(
    state: ServerState, output: RequestOutput, response_id: str, model: str, body: ChatBody, make_parser: MakeParser
) -> bytes:
    usage = Usage()
    usage.add_output(0, output)
    response: dict[str, Any] = {
        "id": response_id,
        "object": "chat.completion",
        "created": current_timestamp(),
        "model": model,
        "choices": [
            _format_choice(state, choice, body, make_parser())
            for choice in sorted(output.outputs, key=lambda each: each.index)
        ],
        "usage": usage.to_dict(),
        "system_fingerprint": None,
        "prompt_logprobs": format_prompt_logprobs(output.prompt_logprobs),
        "prompt_token_ids": output.prompt_token_ids if body.return_token_ids else None,
    }
    return msgspec.json.encode(response)


def _format_choice(
    state: ServerState, choice: CompletionOutput, body: ChatBody, parser: AnswerParser | None
) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    if parser is not None:
        parsed = AssistantMessage.from_events([*parser.feed(choice.text), *parser.finish()])
        message |= parsed.to_dict() | _name_reasoning(parsed.reasoning_content)
    return {
        "index": choice.index,
        "message": message,
        "logprobs": _format_logprobs(state, choice, body),
        "finish_reason": _find_finish_reason(choice, parser),
        "stop_reason": choice.stop_reason,
        "token_ids": choice.token_ids if body.return_token_ids else None,
    }


def _format_logprobs(state: ServerState, choice: CompletionOutput, body: ChatBody) -> dict[str, Any] | None:
    if not body.logprobs:
        return None
    top = body.logprob_token_ids or body.top_logprobs or 0
    return format_chat_logprobs(state.engine, choice.logprobs or [], top, bool(body.return_tokens_as_token_ids))


async def _stream_events(
    state: ServerState,
    outputs: Outputs,
    writer: ChunkWriter,
    usage: Usage,
    body: ChatBody,
    make_parser: MakeParser,
) -> AsyncGenerator[bytes, None]:
    parsers: dict[int, AnswerParser | None] = {}
    with_token_ids = bool(body.return_token_ids)
    try:
        async with contextlib.aclosing(outputs):
            async for index, output in outputs:
                usage.add_output(index, output)
                for choice in output.outputs:
                    data = b""
                    if choice.index not in parsers:
                        parsers[choice.index] = make_parser()
                        role = {"role": "assistant", "content": None if parsers[choice.index] else ""}
                        prompt = {"prompt_token_ids": output.prompt_token_ids} if with_token_ids else None
                        data = writer.encode_choice(choice.index, prompt, delta=role, logprobs=None, finish_reason=None)
                    parser, is_due = parsers[choice.index], needs_chunk(choice, with_token_ids)
                    logprobs = _format_logprobs(state, choice, body)
                    token_ids = choice.token_ids if with_token_ids else None
                    if parser is not None:
                        data += _encode_events(writer, choice, parser, is_due, logprobs, token_ids)
                    elif is_due:
                        data += writer.encode_text(choice.index, choice.text, logprobs, token_ids)
                    if choice.finish_reason is not None:
                        data += writer.encode_choice(
                            choice.index,
                            delta={},
                            logprobs=None,
                            finish_reason=_find_finish_reason(choice, parser),
                            stop_reason=choice.stop_reason,
                        )
                    if data:
                        yield data
        if writer.ends_with_usage:
            yield writer.encode_usage(usage.to_dict())
    except Exception as error:
        yield b"data: %b\n\n" % bytes(make_error_response(error).body)
    yield DONE


def _encode_events(
    writer: ChunkWriter,
    choice: CompletionOutput,
    parser: AnswerParser,
    is_due: bool,
    logprobs: dict[str, Any] | None,
    token_ids: list[int] | None,
) -> bytes:
    """A chunk for each thing that the parser found in new text; an empty one where a chunk is due and its text is held
    back. The first of them has what is told of the step's tokens."""
    events = parser.feed(choice.text)
    if choice.finish_reason is not None:
        events += parser.finish()
    data = b""
    for event in events:
        if isinstance(event, ContentDelta):
            data += writer.encode_text(choice.index, event.text, logprobs, token_ids)
        else:
            data += writer.encode_delta(choice.index, _format_delta(event), logprobs, token_ids)
        logprobs = token_ids = None
    if not data and is_due:
        data = writer.encode_delta(choice.index, {}, logprobs, token_ids)
    return data


def _format_delta(event: ReasoningDelta | ToolCallStart | ArgumentsDelta) -> dict[str, Any]:
    if isinstance(event, ReasoningDelta):
        return _name_reasoning(event.text)
    if isinstance(event, ToolCallStart):
        function = {"name": event.name, "arguments": ""}
        return {"tool_calls": [{"index": event.index, "id": event.call_id, "type": "function", "function": function}]}
    return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}


def _name_reasoning(text: str | None) -> dict[str, str | None]:
    """Both names: ``reasoning_content`` is DeepSeek's and older clients', ``reasoning`` that of newer ones."""
    return {"reasoning_content": text, "reasoning": text}


def _find_finish_reason(choice: CompletionOutput, parser: AnswerParser | None) -> str | None:
    """``tool_calls`` where the model stopped to have its calls answered."""
    if choice.finish_reason == "stop" and parser is not None and parser.num_calls:
        return "tool_calls"
    return choice.finish_reason
