"""Sends the requests of a trace to running servers, and times the answers."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from quire.core.errors import ConfigError
from quire.server.bench.client import LoadClient, Timing, run_async
from quire.server.simulate.results import RequestTimes
from quire.server.traces.trace import Trace, TraceRequest

__all__ = ["TraceSender", "make_prompt", "send_trace"]


def send_trace(trace: Trace, url: str, api_key: str | None = None, vocab_size: int = 4096) -> RequestTimes:
    """Send the requests of a trace at their times, and time the answers."""
    sender = TraceSender(trace, vocab_size)
    run_async(sender.send(LoadClient(url, api_key)))
    return sender.make_times()


class TraceSender:
    """Sends the requests of a trace at their times, and keeps the answers that came, whatever ends it."""

    def __init__(self, trace: Trace, vocab_size: int) -> None:
        self._trace = trace
        self._prompts = [
            make_prompt(request, number, trace.hash_block_size, vocab_size)
            for number, request in enumerate(trace.requests)
        ]  # before the clock runs, or the first requests would be late
        self._timings: dict[int, Timing] = {}
        self._model: str | None = None

    async def prepare(self, client: LoadClient) -> None:
        """Ask the server for its model, so that ``send`` begins at once."""
        self._model = (await client.get_json("/v1/models"))["data"][0]["id"]

    async def send(self, client: LoadClient, choose: Callable[[int], LoadClient] | None = None) -> None:
        """Send all of it, each request with ``client`` or with the one that ``choose`` names."""
        if self._model is None:
            await self.prepare(client)
        start = time.perf_counter()

        async def send_one(number: int, request: TraceRequest) -> None:
            body = {
                "model": self._model, "prompt": self._prompts[number], "max_tokens": request.output_len,
                "temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
                "priority": request.priority, **request.scheduling,
            }  # fmt: skip
            await asyncio.sleep(max(start + request.arrival_s - time.perf_counter(), 0))
            chosen = client if choose is None else choose(number)
            self._timings[number] = await chosen.time_stream("/v1/completions", body)

        await asyncio.gather(*(send_one(number, request) for number, request in enumerate(self._trace.requests)))
        failed = [timing.error for timing in self._timings.values() if timing.error]
        if len(failed) == len(self._timings):
            raise ConfigError(f"no request was answered, the first because: {str(failed[0])[:200]}")

    @property
    def first_unanswered_s(self) -> float:
        """When the first request arrived that has no answer yet; infinite if all have one."""
        open_requests = [r.arrival_s for number, r in enumerate(self._trace.requests) if number not in self._timings]
        return min(open_requests, default=math.inf)

    def list_answered(self) -> list[int]:
        """Which requests have an answer, in order."""
        return sorted(self._timings)

    def make_times(self) -> RequestTimes:
        """The times of those that have an answer."""
        answered = self.list_answered()
        return _make_times(
            [self._trace.requests[number] for number in answered], [self._timings[number] for number in answered]
        )


def _make_times(requests: Sequence[TraceRequest], timings: Sequence[Timing]) -> RequestTimes:
    served = np.array([timing.error is None and bool(timing.events) for timing in timings], bool)
    first = np.array([timing.events[0] if timing.events else np.nan for timing in timings])
    last = np.array([timing.events[-1] if timing.events else np.nan for timing in timings])
    counts = np.array([timing.output_tokens for timing in timings], np.int64)
    with np.errstate(divide="ignore", invalid="ignore"):
        tpot = np.where(served & (counts > 1), (last - first) / (counts - 1), np.nan)
    groups = [str(request.scheduling.get("group", "")) for request in requests]
    return RequestTimes(
        arrival_s=np.array([request.arrival_s for request in requests]),
        ttft_s=np.where(served, first, np.nan),
        tpot_s=tpot,
        e2e_s=np.where(served, last, np.nan),
        prompt_len=np.array([timing.prompt_tokens for timing in timings], np.int64),
        output_len=counts,
        num_cached=np.array([timing.cached_tokens for timing in timings], np.int64),
        num_preemptions=np.zeros(len(timings), np.int64),
        is_served=served,
        groups=groups if any(groups) else (),
    )


def make_prompt(request: TraceRequest, number: int, hash_block_size: int, vocab_size: int) -> list[int]:
    """Random tokens: those of a known block are drawn from its hash, so that equal prefixes are equal."""
    tokens: list[int] = []
    if hash_block_size:
        for block_hash in request.block_hashes[: request.prompt_len // hash_block_size]:
            tokens += np.random.default_rng([block_hash, 6]).integers(4, vocab_size, hash_block_size).tolist()
    rest = request.prompt_len - len(tokens)
    tokens += np.random.default_rng([number, 7]).integers(4, vocab_size, rest).tolist()
    return tokens
