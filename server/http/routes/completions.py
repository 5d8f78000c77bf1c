"""``/v1/completions``."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from quire.core.messages import CompletionOutput, Logprob, RequestOutput
from quire.server.http.errors import make_error_response
from quire.server.http.generation import Outputs, collect_outputs, stream_outputs
from quire.server.http.middleware import get_request_id
from quire.server.http.openapi import GENERATION_ERRORS, describe_operation
from quire.server.http.protocol.answers import Completion, CompletionChunk
from quire.server.http.protocol.completion import CompletionBody
from quire.server.http.protocol.reading import read_body
from quire.server.http.protocol.responses import (
    LOGPROB_BYTES,
    Usage,
    current_timestamp,
    format_completion_logprobs,
    format_prompt_logprobs,
    mean_logprob,
)
from quire.server.http.sse import DONE, ChunkWriter, EventStream, needs_chunk
from quire.server.http.state import ServerState
from quire.server.http.text_offsets import TextOffsets, locate_prompt_tokens

__all__ = ["answer_completion", "make_router"]


def make_router(state: ServerState) -> APIRouter:
    """The route."""
    routes = APIRouter()

    @routes.post(
        "/v1/completions",
        response_model=None,
        openapi_extra=describe_operation(
            "completions", Completion, body=CompletionBody, chunk=CompletionChunk, errors=GENERATION_ERRORS
        ),
    )
    async def completions(request: Request) -> Response:
        """Continue one or several prompts."""
        return await answer_completion(state, request)

    return routes


async def answer_completion(state: ServerState, request: Request) -> Response:
    """The answer to a request whose body is a ``CompletionBody``."""
    body = await read_body(request, CompletionBody, state)
    model = state.check_model(body.model)
    params = body.to_sampling_params(state.engine.config.model.sampling_defaults)
    response_id = f"cmpl-{get_request_id(request.scope, body.request_id)}"
    if body.stream:
        usage = Usage()
        writer = ChunkWriter(
            response_id,
            "text_completion",
            current_timestamp(),
            model,
            state.settings.enable_force_include_usage or body.include_usage,
            usage.to_dict if body.continuous_usage else None,
        )
        outputs = await stream_outputs(state, request, body.prompt, params, body)
        return EventStream(_stream_events(state, outputs, writer, usage, body))
    results = await collect_outputs(state, request, body.prompt, params, body)
    size = LOGPROB_BYTES * sum(len(output.prompt_logprobs or ()) for output in results)
    encoded = await state.run_by_size(size, _encode_response, state, results, response_id, model, body)
    return Response(encoded, media_type="application/json")


def _encode_response(
    state: ServerState, results: Sequence[RequestOutput], response_id: str, model: str, body: CompletionBody
) -> bytes:
    usage, choices = Usage(), []
    n = body.n or 1
    for index, output in enumerate(results):
        usage.add_output(index, output)
        if body.echo_only:
            usage.completion = 0
        best = sorted(output.outputs, key=lambda c: c.index)
        if len(best) > n:
            best = sorted(best, key=mean_logprob, reverse=True)[:n]
        for rank, choice in enumerate(best):
            choices.append(_format_choice(state, index * n + rank, body.prompt[index], output, choice, body))
    response = {
        "id": response_id,
        "object": "text_completion",
        "created": current_timestamp(),
        "model": model,
        "choices": choices,
        "usage": usage.to_dict(),
        "system_fingerprint": None,
    }
    return msgspec.json.encode(response)


def _format_choice(
    state: ServerState,
    index: int,
    prompt: str | list[int],
    output: RequestOutput,
    choice: CompletionOutput,
    body: CompletionBody,
) -> dict[str, Any]:
    echoed = _prompt_text(state, prompt) if body.echo else ""
    sampled = [] if body.echo_only else (choice.logprobs or [])
    logprobs = None
    if body.logprobs is not None:
        logprobs = _format_logprobs(state, sampled, _follow_offsets(state, output, body, len(echoed)), body)
        if body.echo:
            of_prompt = _format_echoed_logprobs(state, output, echoed, body)
            logprobs = {name: of_prompt[name] + values for name, values in logprobs.items()}
    sampled_token_ids = [] if body.echo_only else choice.token_ids
    asked_prompt_logprobs = output.prompt_logprobs if body.prompt_logprobs is not None else None  # not those of echo
    return {
        "index": index,
        "text": echoed + ("" if body.echo_only else choice.text),
        "logprobs": logprobs,
        "finish_reason": "length" if body.echo_only else choice.finish_reason,
        "stop_reason": None if body.echo_only else choice.stop_reason,
        "prompt_logprobs": format_prompt_logprobs(asked_prompt_logprobs),
        "prompt_token_ids": output.prompt_token_ids if body.return_token_ids else None,
        "token_ids": sampled_token_ids if body.return_token_ids else None,
    }


async def _stream_events(
    state: ServerState, outputs: Outputs, writer: ChunkWriter, usage: Usage, body: CompletionBody
) -> AsyncGenerator[bytes, None]:
    n = body.n or 1
    offsets: dict[int, TextOffsets] = {}
    started, with_token_ids = set[int](), bool(body.return_token_ids)
    try:
        async with contextlib.aclosing(outputs):
            async for prompt, output in outputs:
                if body.echo_only:
                    _remove_completion(output)
                usage.add_output(prompt, output)
                for choice in output.outputs:
                    index = prompt * n + choice.index
                    data = b""
                    if index not in started:
                        started.add(index)
                        echoed = _prompt_text(state, body.prompt[prompt]) if body.echo else ""
                        if body.logprobs is not None:
                            offsets[index] = _follow_offsets(state, output, body, len(echoed))
                        data = _encode_start(state, output, writer, index, echoed, body)
                    if needs_chunk(choice, with_token_ids):
                        logprobs = None
                        if body.logprobs is not None:
                            logprobs = _format_logprobs(state, choice.logprobs or [], offsets[index], body)
                        token_ids = choice.token_ids if with_token_ids else None
                        data += writer.encode_text(index, choice.text, logprobs, token_ids)
                    if choice.finish_reason is not None:
                        data += writer.encode_choice(
                            index,
                            text="",
                            logprobs=None,
                            finish_reason=choice.finish_reason,
                            stop_reason=choice.stop_reason,
                        )
                    if data:
                        yield data
        if writer.ends_with_usage:
            yield writer.encode_usage(usage.to_dict())
    except Exception as error:
        yield b"data: %b\n\n" % bytes(make_error_response(error).body)
    yield DONE


def _encode_start(
    state: ServerState, output: RequestOutput, writer: ChunkWriter, index: int, echoed: str, body: CompletionBody
) -> bytes:
    """What comes before the first token of a choice: the prompt, as text and as token ids, where these are wanted."""
    if not (body.echo or body.return_token_ids):
        return b""
    logprobs = None
    if body.echo and body.logprobs is not None:
        logprobs = _format_echoed_logprobs(state, output, echoed, body)
    fields: dict[str, Any] = {}
    if body.return_token_ids:
        fields = {"prompt_token_ids": output.prompt_token_ids, "token_ids": []}
    return writer.encode_choice(index, text=echoed, logprobs=logprobs, finish_reason=None, **fields)


def _format_echoed_logprobs(
    state: ServerState, output: RequestOutput, echoed: str, body: CompletionBody
) -> dict[str, Any]:
    offsets = locate_prompt_tokens(state.engine.tokenizer, output.prompt_token_ids, echoed)
    positions, as_ids = output.prompt_logprobs or [], bool(body.return_tokens_as_token_ids)
    return format_completion_logprobs(state.engine, positions, offsets, output.prompt_token_ids[0], as_ids)


def _format_logprobs(
    state: ServerState, positions: Sequence[dict[int, Logprob]], offsets: TextOffsets, body: CompletionBody
) -> dict[str, Any]:
    located = offsets.locate(next(iter(position)) for position in positions)
    return format_completion_logprobs(state.engine, positions, located, None, bool(body.return_tokens_as_token_ids))


def _follow_offsets(state: ServerState, output: RequestOutput, body: CompletionBody, start: int) -> TextOffsets:
    skip_special_tokens = body.skip_special_tokens is not False
    return TextOffsets(state.engine.tokenizer, output.prompt_token_ids, skip_special_tokens, start)


def _prompt_text(state: ServerState, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else state.engine.detokenize(prompt)


def _remove_completion(output: RequestOutput) -> None:
    for choice in output.outputs:
        choice.text, choice.token_ids, choice.logprobs, choice.stop_reason = "", [], None, None
        choice.finish_reason = choice.finish_reason and "length"
