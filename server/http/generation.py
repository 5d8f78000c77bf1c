"""Start the generations of one HTTP request, gather or merge their outputs, and stop them all together."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any, Literal

from starlette.requests import Request

from quire.core.messages import RequestOutput
from quire.core.sampling_params import SamplingParams
from quire.server.http.errors import ApiError
from quire.server.http.middleware import get_request_id
from quire.server.http.protocol.common import GenerationBody
from quire.server.http.protocol.responses import raise_if_failed
from quire.server.http.scheduling import read_scheduling
from quire.server.http.sse import cancel_on_disconnect
from quire.server.http.state import ServerState

__all__ = ["Outputs", "collect_outputs", "stream_outputs"]

Prompt = str | list[int]
Outputs = AsyncGenerator[tuple[int, RequestOutput], None]
"""(index of the prompt, what it gained), in the order things happen."""
_MAX_PROMPT_TOKENS = 2_000_000
_MIN_CONTEXTS = 16
"""Sequences that may have as long a prompt as the context holds."""
_STARTED_AT_ONCE = 16
_THREAD_ABOVE_BYTES = 16_384


async def collect_outputs(
    state: ServerState,
    request: Request,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    body: GenerationBody,
    shown_token_ids: frozenset[int] = frozenset(),
) -> list[RequestOutput]:
    """The finished outputs, one per prompt. If the client leaves or one fails, all are aborted and it raises."""
    streams = await _start_generations(state, request, prompts, params, body, "final", shown_token_ids)
    results = await cancel_on_disconnect(request.receive, _gather_final(streams))
    for result in results:
        raise_if_failed(result.outputs)
    return results


async def stream_outputs(
    state: ServerState,
    request: Request,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    body: GenerationBody,
    shown_token_ids: frozenset[int] = frozenset(),
) -> Outputs:
    """New text as it comes. Returns once the first has come, so that a refusal still gets its HTTP status."""
    started = await _start_generations(state, request, prompts, params, body, "delta", shown_token_ids)
    outputs = _merge_streams(started)
    first = await cancel_on_disconnect(request.receive, _await_first(outputs))
    return _chain_first(first, outputs)


async def _start_generations(
    state: ServerState,
    request: Request,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    body: GenerationBody,
    mode: Literal["delta", "final"],
    shown_token_ids: frozenset[int],
) -> list[AsyncIterator[RequestOutput]]:
    state.check_alive()
    encode = partial(state.engine.encode_prompt, sampling_params=params)
    size = len(await request.body())
    if size < _THREAD_ABOVE_BYTES:
        encoded = list(map(encode, prompts))
    else:
        encoded = await cancel_on_disconnect(request.receive, _encode_in_threads(encode, prompts))
    _check_prompt_tokens(sum(map(len, encoded)), params.n, state.engine.config.model.max_model_len)
    unique = uuid.uuid4().hex[:8]
    priority, scheduling = read_scheduling(state, request, body)
    options: dict[str, Any] = {"priority": priority, "scheduling": scheduling}
    options["lora_request"] = state.find_adapter(body.model)
    options |= {"cache_salt": body.cache_salt, "stream": mode, "shown_token_ids": shown_token_ids}
    name = f"{get_request_id(request.scope, body.request_id)}-{unique}"
    return [state.engine.generate(p, params, f"{name}-{i}", **options) for i, p in enumerate(encoded)]


async def _encode_in_threads(encode: Callable[[Prompt], list[int]], prompts: Sequence[Prompt]) -> list[list[int]]:
    """Prompt by prompt, so that others are served meanwhile and a client that leaves ends it."""
    return [await asyncio.to_thread(encode, prompt) for prompt in prompts]


def _check_prompt_tokens(num_tokens: int, n: int, max_model_len: int) -> None:
    """Each sequence keeps its prompt, and has it computed where it is preempted."""
    limit = max(_MAX_PROMPT_TOKENS, _MIN_CONTEXTS * max_model_len)
    if num_tokens * n > limit:
        message = f"n: {n} answers to prompts of {num_tokens} tokens are {num_tokens * n} prompt tokens, the limit is"
        raise ApiError(400, f"{message} {limit}; ask for fewer answers or send several requests", param="n")


async def _await_final(stream: Any) -> RequestOutput:
    last: RequestOutput | None = None
    async with contextlib.aclosing(stream):
        async for output in stream:
            last = output
    if last is None:
        raise ApiError(500, "the engine ended this request without an answer", code="engine_error")
    return last


async def _gather_final(streams: Sequence[Any]) -> list[RequestOutput]:
    tasks: list[asyncio.Future[RequestOutput]] = []
    try:
        for stream in streams:
            tasks.append(asyncio.ensure_future(_await_final(stream)))
            if len(tasks) % _STARTED_AT_ONCE == 0:
                await asyncio.sleep(0)  # others are served, too
        return list(await asyncio.gather(*tasks))
    finally:
        await _cancel_tasks(tasks)


async def _await_first(outputs: Outputs) -> tuple[int, RequestOutput]:
    try:
        return await anext(outputs)
    except StopAsyncIteration:
        raise ApiError(500, "the engine ended this request without an answer", code="engine_error") from None


async def _chain_first(first: tuple[int, RequestOutput], rest: Outputs) -> Outputs:
    async with contextlib.aclosing(rest):
        raise_if_failed(first[1].outputs)
        yield first
        async for item in rest:
            raise_if_failed(item[1].outputs)
            yield item


async def _merge_streams(streams: Sequence[Any]) -> Outputs:
    if len(streams) == 1:
        async with contextlib.aclosing(streams[0]):
            async for output in streams[0]:
                yield 0, output
        return
    queue: asyncio.Queue[tuple[int, RequestOutput | BaseException | None]] = asyncio.Queue(maxsize=len(streams))
    tasks: list[asyncio.Future[None]] = []
    running = len(streams)
    try:
        for i, stream in enumerate(streams):
            tasks.append(asyncio.ensure_future(_forward_outputs(i, stream, queue)))
            if len(tasks) % _STARTED_AT_ONCE == 0:
                await asyncio.sleep(0)
        while running:
            index, item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield index, item
    finally:
        await _cancel_tasks(tasks)


async def _forward_outputs(
    index: int, stream: Any, queue: asyncio.Queue[tuple[int, RequestOutput | BaseException | None]]
) -> None:
    try:
        async with contextlib.aclosing(stream):
            async for output in stream:
                await queue.put((index, output))
        await queue.put((index, None))
    except Exception as error:
        await queue.put((index, error))


async def _cancel_tasks(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
