"""Start the generations of one HTTP request, gather or merge their outputs, and stop them all together."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, Literal

from starlette.requests import Request

from quire.core.messages import RequestOutput
from quire.core.sampling_params import SamplingParams
from quire.server.http.errors import ApiError
from quire.server.http.middleware import request_id
from quire.server.http.protocol.common import GenerationBody
from quire.server.http.protocol.replies import check_finished
from quire.server.http.sse import unless_gone
from quire.server.http.state import ServerState

__all__ = ["Outputs", "gather", "start_stream"]

Prompt = str | list[int]
Outputs = AsyncGenerator[tuple[int, RequestOutput], None]
"""(index of the prompt, what it gained), in the order things happen."""


async def gather(
    state: ServerState, request: Request, prompts: Sequence[Prompt], params: SamplingParams, body: GenerationBody
) -> list[RequestOutput]:
    """The finished outputs, one per prompt. If the client leaves or one fails, all are aborted and it raises."""
    streams = _streams(state, request, prompts, params, body, "final")
    results = await unless_gone(request.receive, _all(streams))
    for result in results:
        check_finished(result.outputs)
    return results


async def start_stream(
    state: ServerState, request: Request, prompts: Sequence[Prompt], params: SamplingParams, body: GenerationBody
) -> Outputs:
    """New text as it comes. Returns once the first has come, so that a refusal still gets its HTTP status."""
    outputs = _merged(_streams(state, request, prompts, params, body, "delta"))
    first = await unless_gone(request.receive, _first(outputs))
    return _resumed(first, outputs)


def _streams(
    state: ServerState,
    request: Request,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    body: GenerationBody,
    mode: Literal["delta", "final"],
) -> list[AsyncIterator[RequestOutput]]:
    state.check_alive()
    unique = uuid.uuid4().hex[:8]
    more: dict[str, Any] = {"priority": body.priority or 0, "cache_salt": body.cache_salt, "stream": mode}
    name = f"{request_id(request.scope)}-{unique}"
    return [state.engine.generate(p, params, f"{name}-{i}", **more) for i, p in enumerate(prompts)]


async def _last(stream: Any) -> RequestOutput:
    last: RequestOutput | None = None
    async with contextlib.aclosing(stream):
        async for output in stream:
            last = output
    if last is None:
        raise ApiError(500, "the engine ended this request without an answer", code="engine_error")
    return last


async def _all(streams: Sequence[Any]) -> list[RequestOutput]:
    tasks = [asyncio.ensure_future(_last(stream)) for stream in streams]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        await _cancel(tasks)


async def _first(outputs: Outputs) -> tuple[int, RequestOutput]:
    try:
        return await anext(outputs)
    except StopAsyncIteration:
        raise ApiError(500, "the engine ended this request without an answer", code="engine_error") from None


async def _resumed(first: tuple[int, RequestOutput], rest: Outputs) -> Outputs:
    async with contextlib.aclosing(rest):
        check_finished(first[1].outputs)
        yield first
        async for item in rest:
            check_finished(item[1].outputs)
            yield item


async def _merged(streams: Sequence[Any]) -> Outputs:
    if len(streams) == 1:
        async with contextlib.aclosing(streams[0]):
            async for output in streams[0]:
                yield 0, output
        return
    queue: asyncio.Queue[tuple[int, RequestOutput | BaseException | None]] = asyncio.Queue(maxsize=len(streams))
    tasks = [asyncio.ensure_future(_pump(i, stream, queue)) for i, stream in enumerate(streams)]
    running = len(tasks)
    try:
        while running:
            index, item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield index, item
    finally:
        await _cancel(tasks)


async def _pump(
    index: int, stream: Any, queue: asyncio.Queue[tuple[int, RequestOutput | BaseException | None]]
) -> None:
    try:
        async with contextlib.aclosing(stream):
            async for output in stream:
                await queue.put((index, output))
        await queue.put((index, None))
    except Exception as error:
        await queue.put((index, error))


async def _cancel(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
