"""A/B tests on running servers: the same traffic to two of them, or a policy that changes back and forth in one.

A test that is interrupted has measured the pairs of stretches of which every request was answered by then.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from quire.core.errors import ConfigError
from quire.server.ab.live_policy import LivePolicy
from quire.server.ab.observations import ArmTimes
from quire.server.ab.simulated import Block, select_measured
from quire.server.ab.trace_sender import TraceSender
from quire.server.bench.client import LoadClient, run_async
from quire.server.simulate.results import RequestTimes
from quire.server.simulate.setup import PluginSpec
from quire.server.traces.trace import Trace

__all__ = ["LiveRun", "describe_server", "run_live_switchback", "run_paired_replay", "run_split"]


@dataclass(frozen=True, slots=True)
class LiveRun:
    """What a test on running servers has measured."""

    measured: list[ArmTimes]
    interruption: KeyboardInterrupt | None = None
    """What ended it early, for the caller to raise again when it has reported; None: it ran to its end."""
    notes: Sequence[str] = ()
    """What a reader of the report has to know."""


def describe_server(url: str, api_key: str | None = None) -> dict[str, Any]:
    """What a server says of its engine: model, cache, what is cached already, and whether its last steps were scheduled
    while the one before ran. Raises ``ConfigError``."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=30) as client:
            model = client.get("/v1/models").raise_for_status().json()["data"][0]
            metrics = client.get("/metrics").raise_for_status().text
            trace = client.get("/trace", params={"steps": 200})
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        remedy = "give its key with --api-key" if status in (401, 403) else "is it quire serve?"
        raise ConfigError(f"{error.request.url} answered {status}; {remedy}") from None
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
) -> LiveRun:
    """Each stretch to both servers at once, the next when both have answered all of it."""
    clients = [LoadClient(url, api_key) for url in urls]
    measured: list[ArmTimes] = []
    seconds = sum(window.duration_s for window in windows)
    print(f"{len(windows)} stretches to {' and '.join(urls)}: {seconds / 60:.1f} min or more", file=sys.stderr)
    for pair, window in enumerate(windows):
        senders = [TraceSender(window, vocab_size) for _ in clients]

        async def send_both(senders: Sequence[TraceSender] = senders) -> None:
            await asyncio.gather(*(each.send(client) for each, client in zip(senders, clients, strict=True)))

        if (interruption := _run_until_interrupted(send_both())) is not None:
            return LiveRun(measured, interruption)
        for arm, sender in enumerate(senders):
            times = sender.make_times()
            end = float(times.arrival_s[-1])
            measured.append(ArmTimes(pair, arm, max(end - washout_s, 1e-9), select_measured(times, washout_s, end + 1)))
    return LiveRun(measured)


def run_split(
    trace: Trace, urls: Sequence[str], api_key: str | None, vocab_size: int, blocks: Sequence[Block], seed: int
) -> LiveRun:
    """Each request to one of two servers, by a coin. Stretches of time make the pairs."""
    coins = np.random.default_rng([seed, 5]).integers(0, 2, len(trace)).tolist()
    clients = [LoadClient(url, api_key) for url in urls]
    sender = TraceSender(trace, vocab_size)
    interruption = _run_until_interrupted(sender.send(clients[0], lambda number: clients[coins[number]]))
    times = sender.make_times()
    arms = np.array([coins[number] for number in sender.list_answered()])
    measured = []
    for pair in range(len(blocks) // 2):
        start, end = blocks[2 * pair].start_s, blocks[2 * pair + 1].end_s
        if end > sender.first_unanswered_s:
            break
        for arm in (0, 1):
            chosen = select_measured(_choose(times, arms == arm), start, end)
            measured.append(ArmTimes(pair, arm, end - start, chosen))
    return LiveRun(measured, interruption)


def run_live_switchback(
    trace: Trace,
    url: str,
    api_key: str | None,
    admin_key: str | None,
    policies: Sequence[PluginSpec],
    blocks: Sequence[Block],
    washout_s: float,
    vocab_size: int,
) -> LiveRun:
    """Send the trace while the server's policy changes at the beginning of each block. Afterwards, and where the test
    ends early, the server has the policy again that it had before. Raises ``ConfigError`` where one was quarantined."""
    policy = LivePolicy(url, admin_key)
    sender = TraceSender(trace, vocab_size)
    client = LoadClient(url, api_key)

    async def serve() -> None:
        await policy.prepare()
        await sender.prepare(client)
        switching = asyncio.create_task(policy.follow_blocks(policies, blocks))
        sending = asyncio.create_task(sender.send(client))
        try:
            await asyncio.gather(switching, sending)
        except asyncio.CancelledError:
            print(f"quire: {policy.describe_interruption(len(blocks))}", file=sys.stderr)
            raise
        finally:
            switching.cancel()
            sending.cancel()
            await asyncio.wait((switching, sending))
            await policy.give_back()

    interruption = _run_until_interrupted(serve())
    times = sender.make_times()
    measured = []
    num_pairs = _count_answered_pairs(blocks[: policy.num_switches], sender.first_unanswered_s, washout_s)
    for block in blocks[: 2 * num_pairs]:
        start, end = block.get_measured(washout_s)
        measured.append(ArmTimes(block.pair, block.arm, end - start, select_measured(times, start, end)))
    notes = []
    if policy.longest_switch_s > max(washout_s, 0.1):
        notes.append(
            f"a change of policy took {policy.longest_switch_s:.1f} s, longer than the washout: requests that were "
            "measured met the policy of the stretch before; give a longer --washout"
        )
    return LiveRun(measured, interruption, notes)


def _run_until_interrupted(work: Coroutine[Any, Any, None]) -> KeyboardInterrupt | None:
    """Run it; what interrupted it, once it has cleaned up, or None."""
    try:
        run_async(work)
    except KeyboardInterrupt as interruption:  # SIGTERM too
        return interruption
    return None


def _count_answered_pairs(blocks: Sequence[Block], first_unanswered_s: float, washout_s: float) -> int:
    ends = [block.get_measured(washout_s)[1] for block in blocks[1::2]]
    return sum(end <= first_unanswered_s for end in ends)


def _choose(times: RequestTimes, mask: np.ndarray[Any, np.dtype[np.bool_]]) -> RequestTimes:
    names = [name for name in times.__dataclass_fields__ if name != "groups"]
    groups = [group for group, kept in zip(times.groups, mask.tolist(), strict=True) if kept] if times.groups else ()
    return RequestTimes(**{name: getattr(times, name)[mask] for name in names}, groups=groups)
