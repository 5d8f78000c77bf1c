"""A/B tests on running servers: the same traffic to two of them, or a policy that changes back and forth in one."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import numpy as np

from quire.core.errors import ConfigError
from quire.server.ab.live_policy import LivePolicy
from quire.server.ab.observations import ArmTimes
from quire.server.ab.simulated import Block, select_measured
from quire.server.bench.client import LoadClient, Timing, run_async
from quire.server.simulate.results import RequestTimes
from quire.server.simulate.setup import PluginSpec
from quire.server.traces.trace import Trace, TraceRequest

__all__ = ["describe_server", "make_prompt", "run_live_switchback", "run_paired_replay", "run_split", "send_trace"]


def describe_server(url: str, api_key: str | None = None) -> dict[str, Any]:
    """What a server says of its engine: model, cache, what is cached already, and whether its last steps were scheduled
    while the one before ran. Raises ``ConfigError``."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=30) as client:
            model = client.get("/v1/models").raise_for_status().json()["data"][0]
            metrics = client.get("/metrics").raise_for_status().text
            trace = client.get("/trace", params={"steps": 200})
    except (httpx.HTTPError, LookupError, ValueError) as error:
        raise ConfigError(f"{url} cannot be asked what it serves: {error}; start it with quire serve") from None
    described = {"model": model["id"], "max_model_len": model.get("max_model_len")}
    for key, name in (
        ("num_blocks", "kv_blocks"),
        ("block_size", "kv_block_size"),
        ("cached_tokens", "prefix_cache_queries_total"),
    ):
        match = re.search(rf"^quire:{name}(?:\{{[^}}]*\}})? ([0-9.e+]+)$", metrics, re.M)
        described[key] = None if match is None else int(float(match[1]))
    if trace.status_code == 200:
        described["asynchronous"] = _is_asynchronous(trace.json()["traceEvents"])
    return described


def _is_asynchronous(events: Sequence[dict[str, Any]]) -> bool | None:
    """Whether most steps were scheduled before the tokens of the step before were known; None: too few steps."""
    starts = {e["name"]: e["ts"] for e in events if e.get("cat") == "schedule"}
    ends = {e["name"]: e["ts"] + e["dur"] for e in events if e.get("cat") == "device"}
    numbers = sorted(int(name.split()[-1]) for name in starts.keys() & ends.keys())
    overlaps = [starts[f"step {n + 1}"] < ends[f"step {n}"] for n in numbers if f"step {n + 1}" in starts]
    return sum(overlaps) > len(overlaps) / 2 if len(overlaps) >= 10 else None


def run_paired_replay(
    windows: Sequence[Trace], urls: Sequence[str], api_key: str | None, vocab_size: int, washout_s: float
) -> list[ArmTimes]:
    """Each stretch to both servers at once, the next when both have answered all of it."""
    measured = []
    for pair, window in enumerate(windows):

        async def send_both(window: Trace = window) -> list[RequestTimes]:
            return list(
                await asyncio.gather(*(_send(window, LoadClient(url, api_key), vocab_size, None) for url in urls))
            )

        for arm, times in enumerate(run_async(send_both())):
            end = float(times.arrival_s[-1])
            measured.append(ArmTimes(pair, arm, max(end - washout_s, 1e-9), select_measured(times, washout_s, end + 1)))
    return measured


def run_split(
    trace: Trace, urls: Sequence[str], api_key: str | None, vocab_size: int, blocks: Sequence[Block], seed: int
) -> list[ArmTimes]:
    """Each request to one of two servers, by a coin. Stretches of time make the pairs."""
    coins = np.random.default_rng([seed, 5]).integers(0, 2, len(trace)).tolist()
    clients = [LoadClient(url, api_key) for url in urls]
    times = run_async(_send(trace, clients[0], vocab_size, lambda number: clients[coins[number]]))
    arms = np.array(coins)
    measured = []
    for pair in range(len(blocks) // 2):
        start, end = blocks[2 * pair].start_s, blocks[2 * pair + 1].end_s
        for arm in (0, 1):
            chosen = select_measured(_choose(times, arms == arm), start, end)
            measured.append(ArmTimes(pair, arm, end - start, chosen))
    return measured


def run_live_switchback(
    trace: Trace,
    url: str,
    api_key: str | None,
    admin_key: str | None,
    policies: Sequence[PluginSpec],
    blocks: Sequence[Block],
    washout_s: float,
    vocab_size: int,
) -> list[ArmTimes]:
    """Send the trace while the server's policy changes at the beginning of each block. Afterwards, and where the test
    ends early, the server has the policy again that it had before. Raises ``ConfigError`` where one was quarantined."""
    policy = LivePolicy(url, admin_key)

    async def serve() -> RequestTimes:
        switching = asyncio.create_task(policy.follow_blocks(policies, blocks))
        sending = asyncio.create_task(_send(trace, LoadClient(url, api_key), vocab_size, None))
        try:
            await asyncio.gather(switching, sending)
            return sending.result()
        except asyncio.CancelledError:
            print(f"quire: {policy.describe_interruption(len(blocks))}", file=sys.stderr)
            raise
        finally:
            switching.cancel()
            sending.cancel()
            await asyncio.wait((switching, sending))
            await policy.give_back()

    times = run_async(serve())
    measured = []
    for block in blocks:
        start, end = block.get_measured(washout_s)
        measured.append(ArmTimes(block.pair, block.arm, end - start, select_measured(times, start, end)))
    return measured


def send_trace(trace: Trace, url: str, api_key: str | None = None, vocab_size: int = 4096) -> RequestTimes:
    """Send the requests of a trace at their times, and time the answers."""
    return run_async(_send(trace, LoadClient(url, api_key), vocab_size, None))


def make_prompt(request: TraceRequest, number: int, hash_block_size: int, vocab_size: int) -> list[int]:
    """Random tokens: those of a known block are drawn from its hash, so that equal prefixes are equal."""
    tokens: list[int] = []
    if hash_block_size:
        for block_hash in request.block_hashes[: request.prompt_len // hash_block_size]:
            tokens += np.random.default_rng([block_hash, 6]).integers(4, vocab_size, hash_block_size).tolist()
    rest = request.prompt_len - len(tokens)
    tokens += np.random.default_rng([number, 7]).integers(4, vocab_size, rest).tolist()
    return tokens


async def _send(
    trace: Trace, client: LoadClient, vocab_size: int, choose: Callable[[int], LoadClient] | None
) -> RequestTimes:
    model = (await client.get_json("/v1/models"))["data"][0]["id"]
    prompts = [
        make_prompt(request, number, trace.hash_block_size, vocab_size) for number, request in enumerate(trace.requests)
    ]  # before the clock runs, or the first requests would be late
    start = time.perf_counter()

    async def send_one(number: int, request: TraceRequest) -> Timing:
        body = {
            "model": model, "prompt": prompts[number], "max_tokens": request.output_len, "temperature": 0,
            "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}, "priority": request.priority,
            **request.scheduling,
        }  # fmt: skip
        await asyncio.sleep(max(start + request.arrival_s - time.perf_counter(), 0))
        chosen = client if choose is None else choose(number)
        return await chosen.time_stream("/v1/completions", body)

    timings = await asyncio.gather(*(send_one(number, request) for number, request in enumerate(trace.requests)))
    failed = [timing.error for timing in timings if timing.error]
    if len(failed) == len(timings):
        raise ConfigError(f"no request was answered, the first because: {str(failed[0])[:200]}")
    return _make_times(trace, timings)


def _make_times(trace: Trace, timings: Sequence[Timing]) -> RequestTimes:
    served = np.array([timing.error is None and bool(timing.events) for timing in timings], bool)
    first = np.array([timing.events[0] if timing.events else np.nan for timing in timings])
    last = np.array([timing.events[-1] if timing.events else np.nan for timing in timings])
    counts = np.array([timing.output_tokens for timing in timings], np.int64)
    with np.errstate(divide="ignore", invalid="ignore"):
        tpot = np.where(served & (counts > 1), (last - first) / (counts - 1), np.nan)
    groups = [str(request.scheduling.get("group", "")) for request in trace.requests]
    return RequestTimes(
        arrival_s=np.array([request.arrival_s for request in trace.requests]),
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


def _choose(times: RequestTimes, mask: np.ndarray[Any, np.dtype[np.bool_]]) -> RequestTimes:
    names = [name for name in times.__dataclass_fields__ if name != "groups"]
    groups = [group for group, kept in zip(times.groups, mask.tolist(), strict=True) if kept] if times.groups else ()
    return RequestTimes(**{name: getattr(times, name)[mask] for name in names}, groups=groups)
