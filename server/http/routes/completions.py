"""``/v1/completions``."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from quire.core.messages import CompletionOutput, RequestOutput
from quire.server.http.errors import error_response
from quire.server.http.generation import Outputs, gather, start_stream
from quire.server.http.middleware import request_id
from quire.server.http.protocol.common import read_body, schema_of
from quire.server.http.protocol.completion import CompletionBody
from quire.server.http.protocol.replies import Usage, completion_logprobs, created_now, prompt_logprobs, score
from quire.server.http.sse import DONE, ChunkWriter, EventStream, speaks
from quire.server.http.state import ServerState

__all__ = ["router"]


def router(state: ServerState) -> APIRouter:
    """The route."""
    routes = APIRouter()

    @routes.post("/v1/completions", openapi_extra=schema_of(CompletionBody), response_model=None)
    async def completions(request: Request) -> Response:
        """Continue one or several prompts."""
        body = await read_body(request, CompletionBody, state)
        model = state.check_model(body.model)
        params = body.params()
        identity = f"cmpl-{request_id(request.scope)}"
        if body.stream:
            writer = ChunkWriter(identity, "text_completion", created_now(), model, body.wants_usage)
            outputs = await start_stream(state, request, body.prompt, params, body)
            return EventStream(_events(state, outputs, writer, body))
        results = await gather(state, request, body.prompt, params, body)
        return Response(_answer(state, results, identity, model, body), media_type="application/json")

    return routes


def _answer(
    state: ServerState, results: Sequence[RequestOutput], identity: str, model: str, body: CompletionBody
) -> bytes:
    usage, choices = Usage(), []
    n = body.n or 1
    for index, output in enumerate(results):
        usage.add(index, output)
        if body.prompt_only:
            usage.completion = 0
        best = sorted(output.outputs, key=lambda c: c.index)
        if len(best) > n:
            best = sorted(best, key=score, reverse=True)[:n]
        for rank, choice in enumerate(best):
            choices.append(_choice(state, index * n + rank, body.prompt[index], output, choice, body))
    answer = {
        "id": identity,
        "object": "text_completion",
        "created": created_now(),
        "model": model,
        "choices": choices,
        "usage": usage.as_json(),
        "system_fingerprint": None,
    }
    return msgspec.json.encode(answer)


def _choice(
    state: ServerState,
    index: int,
    prompt: str | list[int],
    output: RequestOutput,
    choice: CompletionOutput,
    body: CompletionBody,
) -> dict[str, Any]:
    echoed = _text_of(state, prompt) if body.echo else ""
    drawn = [] if body.prompt_only else (choice.logprobs or [])
    logprobs = None
    if body.logprobs is not None:
        rows = [*((output.prompt_logprobs or []) if body.echo else []), *drawn]
        first = output.prompt_token_ids[0] if output.prompt_token_ids else None
        logprobs = completion_logprobs(state.engine, rows, 0, first)
    found = {
        "index": index,
        "text": echoed + ("" if body.prompt_only else choice.text),
        "logprobs": logprobs,
        "finish_reason": "length" if body.prompt_only else choice.finish_reason,
        "stop_reason": None if body.prompt_only else choice.stop_reason,
    }
    if body.prompt_logprobs is not None:
        found["prompt_logprobs"] = prompt_logprobs(state.engine, output.prompt_logprobs)
    return found


async def _events(
    state: ServerState, outputs: Outputs, writer: ChunkWriter, body: CompletionBody
) -> AsyncGenerator[bytes, None]:
    usage, n = Usage(), body.n or 1
    lengths: dict[int, int] = {}
    try:
        async with contextlib.aclosing(outputs):
            async for prompt, output in outputs:
                if body.prompt_only:
                    _without_answer(output)
                usage.add(prompt, output)
                for choice in output.outputs:
                    index = prompt * n + choice.index
                    data = b""
                    if index not in lengths:
                        lengths[index] = 0
                        if body.echo:
                            data = writer.text(index, _text_of(state, body.prompt[prompt]))
                    if speaks(choice):
                        data += writer.text(index, choice.text, _logprobs(state, choice, lengths[index], body))
                        lengths[index] += len(choice.text)
                    if choice.finish_reason is not None:
                        data += writer.choice(
                            index,
                            text="",
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


def _logprobs(state: ServerState, choice: CompletionOutput, offset: int, body: CompletionBody) -> dict[str, Any] | None:
    return None if body.logprobs is None else completion_logprobs(state.engine, choice.logprobs or [], offset)


def _text_of(state: ServerState, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else state.engine.detokenize(prompt)


def _without_answer(output: RequestOutput) -> None:
    for choice in output.outputs:
        choice.text, choice.token_ids, choice.logprobs = "", [], None
