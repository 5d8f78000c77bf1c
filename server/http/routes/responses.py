"""``/v1/responses``."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncGenerator, Iterable
from functools import partial
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from quire.core.messages import CompletionOutput, RequestOutput
from quire.core.parsing.answer_parser import AnswerParser
from quire.server.http.errors import make_error_response
from quire.server.http.generation import Outputs, collect_outputs, stream_outputs
from quire.server.http.middleware import get_key
from quire.server.http.openapi import GENERATION_ERRORS, describe_operation
from quire.server.http.parsed_text import ParsedText
from quire.server.http.protocol.answers import DeletedResponse, ResponseAnswer, ResponseEvent
from quire.server.http.protocol.reading import read_body
from quire.server.http.protocol.response_body import ResponseBody
from quire.server.http.protocol.response_input import list_chat_messages
from quire.server.http.protocol.responses import current_timestamp, format_chat_logprobs
from quire.server.http.response_builder import ResponseBuilder
from quire.server.http.routes.chat import MAX_TRUNCATED
from quire.server.http.sse import EventStream, encode
from quire.server.http.state import ServerState
from quire.server.http.text_offsets import TextOffsets

__all__ = ["make_router"]


def make_router(state: ServerState) -> APIRouter:
    """The routes."""
    routes = APIRouter()

    @routes.post(
        "/v1/responses",
        response_model=None,
        openapi_extra=describe_operation(
            "create_response", ResponseAnswer, body=ResponseBody, chunk=ResponseEvent, errors=GENERATION_ERRORS
        ),
    )
    async def create_response(request: Request) -> Response:
        """Answer a conversation, with calls and reasoning as items of their own."""
        return await _answer(state, request)

    @routes.get(
        "/v1/responses/{response_id}",
        response_model=None,
        openapi_extra=describe_operation("get_response", ResponseAnswer, errors=(400, 404)),
    )
    async def get_response(request: Request, response_id: str) -> Response:
        """A response that was stored."""
        stored = state.responses.find_response(response_id, get_key(request.scope))
        return Response(stored.response, media_type="application/json")

    @routes.delete(
        "/v1/responses/{response_id}",
        openapi_extra=describe_operation("delete_response", DeletedResponse, errors=(400, 404)),
    )
    async def delete_response(request: Request, response_id: str) -> dict[str, Any]:
        """Forget a response that was stored."""
        state.responses.delete_response(response_id, get_key(request.scope))
        return {"id": response_id, "object": "response", "deleted": True}

    return routes


class _Answer:
    """One response while it is made: its items, its tokens, and the conversation that it ends."""

    def __init__(
        self, state: ServerState, request: Request, body: ResponseBody, model: str, messages: list[dict[str, Any]]
    ) -> None:
        self._state, self._body, self._messages = state, body, messages
        self._owner = get_key(request.scope)
        self._is_stored = state.responses.is_on and body.store is not False
        fields = _describe_request(body, f"resp_{uuid.uuid4().hex}", model, self._is_stored)
        self.builder = ResponseBuilder(fields)
        self.text = ParsedText(None, None)
        self._num_output_tokens = 0

    def add_output(self, output: RequestOutput, choice: CompletionOutput) -> Iterable[dict[str, Any]]:
        """The events that new text makes; with the last of it the answer is complete."""
        self._num_output_tokens += len(choice.token_ids)
        yield from self.builder.add_events(self.text.add_output(choice, self._format_logprobs(choice)))
        if choice.finish_reason is not None:
            *events, last = self.builder.finish(choice.finish_reason, partial(self._count_usage, output))
            if self._is_stored:
                response, output_items = self.builder.response, self.builder.response["output"]
                answered = list_chat_messages(output_items) if output_items else []
                encoded, conversation = msgspec.json.encode(response), [*self._messages, *answered]
                self._state.responses.add_response(response["id"], self._owner, encoded, conversation)
            yield from (*events, last)

    def follow_text(self, prompt: list[int], parser: AnswerParser | None, shown: frozenset[int]) -> None:
        """Read the answer to ``prompt`` with ``parser``, which sees the special tokens ``shown``."""
        offsets = None
        if self._body.wants_logprobs:
            is_skipping = self._body.skip_special_tokens is not False
            offsets = TextOffsets(self._state.engine.tokenizer, prompt, is_skipping, 0, shown)
        self.text = ParsedText(parser, offsets)

    def _format_logprobs(self, choice: CompletionOutput) -> list[dict[str, Any]]:
        if not self._body.wants_logprobs:
            return []
        top = self._body.logprob_token_ids or self._body.top_logprobs or 0
        as_ids = bool(self._body.return_tokens_as_token_ids)
        formatted = format_chat_logprobs(self._state.engine, choice.logprobs or [], top, as_ids)
        return [] if formatted is None else formatted["content"]

    def _count_usage(self, output: RequestOutput, reasoning: str) -> dict[str, Any]:
        num_reasoning_tokens = len(self._state.engine.tokenize(reasoning, False)) if reasoning else 0
        return {
            "input_tokens": len(output.prompt_token_ids),
            "input_tokens_details": {"cached_tokens": output.num_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": self._num_output_tokens,
            "output_tokens_details": {"reasoning_tokens": min(num_reasoning_tokens, self._num_output_tokens)},
            "total_tokens": len(output.prompt_token_ids) + self._num_output_tokens,
        }


async def _answer(state: ServerState, request: Request) -> Response:
    body = await read_body(request, ResponseBody, state)
    model = state.check_model(body.model)
    params = body.to_sampling_params(state.engine.config.model.sampling_defaults)
    parsers, use = state.engine.answer_parsers, body.read_tool_use()
    messages = body.list_messages()
    if body.previous_response_id is not None:
        before = state.responses.find_response(
            body.previous_response_id, get_key(request.scope), "previous_response_id"
        )
        messages = [*before.list_messages(), *messages]
    arguments = body.template_arguments(messages)
    if body.truncation == "auto":  # a conversation may be longer than the context, within reason
        arguments["max_tokens"] = MAX_TRUNCATED * state.engine.config.model.max_model_len
    size = len(await request.body()) + sum(len(str(message.get("content"))) for message in messages)
    prompt = await state.encode_conversation(size, arguments)
    params = parsers.constrain_params(use, prompt, params)
    answer = _Answer(state, request, body, model, messages)
    shown = parsers.find_shown_tokens(use)
    answer.follow_text(prompt, parsers.make_parser(use, prompt), shown)
    if body.stream:
        outputs = await stream_outputs(state, request, [prompt], params, body, shown)
        return EventStream(_stream_events(outputs, answer))
    [output] = await collect_outputs(state, request, [prompt], params, body, shown)
    for _ in answer.add_output(output, output.outputs[0]):
        pass
    return Response(msgspec.json.encode(answer.builder.response), media_type="application/json")


async def _stream_events(outputs: Outputs, answer: _Answer) -> AsyncGenerator[bytes, None]:
    yield _encode_events(answer.builder.start())
    try:
        async with contextlib.aclosing(outputs):
            async for _, output in outputs:
                if data := _encode_events(answer.add_output(output, output.outputs[0])):
                    yield data
    except Exception as error:
        shown = msgspec.json.decode(make_error_response(error).body)["error"]
        yield _encode_events(answer.builder.fail(shown["message"], "server_error"))


def _encode_events(events: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(b"event: %b\ndata: %b\n\n" % (event["type"].encode(), encode(event)) for event in events)


def _describe_request(body: ResponseBody, response_id: str, model: str, is_stored: bool) -> dict[str, Any]:
    """The fields of a response that say what was asked for."""
    return {
        "id": response_id,
        "object": "response",
        "created_at": current_timestamp(),
        "model": model,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": body.reasoning or {"effort": None, "summary": None},
        "store": is_stored,
        "temperature": body.temperature,
        "text": body.text or {"format": {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p,
        "truncation": body.truncation or "disabled",
        "usage": None,
        "user": body.user,
    }
