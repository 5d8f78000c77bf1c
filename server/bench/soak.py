"""``quire bench soak``: more load than a server can bear, for minutes, and what becomes of it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import re
import time
from array import array
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from quire.core.engine.args import EngineArgs
from quire.core.errors import ConfigError
from quire.server.bench.client import Client, Timing, run_async
from quire.server.bench.load import Requests, model_of, run_open, send_all
from quire.server.bench.report import percentiles, print_json, progress
from quire.server.bench.server_process import ServerProcess, gpu_bytes, serve_words

__all__ = ["run"]

_GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


def run(engine_args: EngineArgs, args: argparse.Namespace) -> int:
    """Measure and print. Exit status 1 if a request failed other than by being refused."""
    if args.duration < 2 or args.overload <= 0 or args.minute <= 0:
        raise ConfigError("--duration must be at least 2 seconds, --overload and --minute above 0")
    with contextlib.ExitStack() as stack:
        server = None
        if args.base_url is None:
            words = serve_words(args)
            if engine_args.max_num_queued_requests is None:  # what bounds the queue, whatever comes
                words += ["--max-num-queued-requests", str(2 * engine_args.max_num_seqs)]
            server = stack.enter_context(ServerProcess([*words, "--disable-log-requests"]))
            server.wait_ready()
            print(server.ready_line, flush=True)
            args.base_url, args.model = server.url, None
        soak = run_async(_soak(args, engine_args.max_num_seqs, server))
    for number, minute in enumerate(soak.minutes, 1):
        print(_line(number, minute))
    found = soak.summary()
    stall, silence = 1e3 * found["longest_stall_s"], 1e3 * found["longest_silence_s"]
    grown, grown_gpu = found["memory_growth_bytes"] / 2**20, found["gpu_growth_bytes"] / 2**20
    print(
        f"longest stall of a stream {stall:.0f} ms, of all {silence:.0f} ms; "
        f"at most {found['most_waiting']:.0f} waiting; {found['failed']} failed; "
        f"memory {grown:+.0f} MiB since the first minute, of the GPU {grown_gpu:+.0f} MiB"
    )
    if "last_over_second" in found:
        print(f"throughput of the last minute: {found['last_over_second']:.1%} of the second")
    if args.json:
        print_json(found)
    for error in sorted(soak.errors)[:3]:
        print(f"failed: {error}")
    return 1 if found["failed"] else 0


async def _soak(args: argparse.Namespace, most_running: int, server: ServerProcess | None) -> _Soak:
    client = Client(args.base_url, args.api_key)
    requests = Requests.of(args, await model_of(client, args))
    rate, bearable = args.request_rate, None
    if not rate:
        concurrency = args.max_concurrency or most_running
        count = max(2 * concurrency, round(args.num_prompts or 4 * concurrency))
        bar = progress(count, "what it can bear")
        timings, wall = await send_all(client, requests, count, concurrency=concurrency, done=bar.update)
        bar.close()
        if any(t.error for t in timings):
            raise ConfigError(f"a request failed before the soak began: {next(t.error for t in timings if t.error)}")
        bearable = count / wall
        rate = args.overload * bearable
        print(
            f"{concurrency} at a time: {bearable:.2f} requests/s, "
            f"{sum(t.output_tokens for t in timings) / wall:,.0f} tok/s"
        )
    print(f"{rate:.2f} requests/s for {args.duration:g} s", flush=True)
    soak = _Soak(rate, bearable, args.duration, args.minute)
    gpu_before = gpu_bytes()  # not in between: asking the driver holds up the GPU's work
    watcher = asyncio.create_task(_watch(soak, client, server))
    bar = progress(round(rate * args.duration), "soak")
    gc.collect()
    gc.freeze()
    soak.start = time.perf_counter()
    async for timing in run_open(client, requests, rate, args.duration):
        soak.take(timing)
        bar.update()
    watcher.cancel()
    bar.close()
    soak.close()
    soak.gpu_growth = gpu_bytes() - gpu_before
    return soak


async def _watch(soak: _Soak, client: Client, server: ServerProcess | None) -> None:
    """Once a second: what the server says of itself, and what its processes hold."""
    while True:
        await asyncio.sleep(min(1.0, soak.minute / 4))
        figures: dict[str, float] = {}
        with contextlib.suppress(ConfigError):
            text = await client.text("/metrics")
            for name in _GAUGES:  # under any server's prefix
                match = re.search(rf"^\w+:{name}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
                figures |= {name: float(match.group(1))} if match else {}
        if server is not None:
            figures["resident_bytes"] = float(server.resident_bytes())
        soak.note(figures)


@dataclass(slots=True)
class _Soak:
    """What happened, minute by minute."""

    rate: float
    bearable: float | None
    duration: float
    minute: float
    start: float = 0.0
    gpu_growth: int = 0
    minutes: list[dict[str, Any]] = field(default_factory=list)
    errors: set[str] = field(default_factory=set)
    _seen: dict[int, dict[str, Any]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))
    _times: dict[int, array[float]] = field(default_factory=lambda: defaultdict(lambda: array("d")))
    _firsts: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))

    def take(self, timing: Timing) -> None:
        """Book an answer, each of its pieces in the minute in which it came."""
        sent = timing.sent_at - self.start
        minute = self._seen[int(sent // self.minute)]
        minute["sent"] += 1
        if timing.error is not None:
            minute["refused" if timing.refused else "failed"] += 1
            if not timing.refused:
                self.errors.add(timing.error)
            return
        share = timing.output_tokens / max(len(timing.events), 1)
        before: float | None = None
        for event in timing.events:
            at = sent + event
            number = int(at // self.minute)
            minute = self._seen[number]
            minute["output_tokens"] += share
            self._times[number].append(at)
            if before is not None:
                minute["longest_stall_s"] = max(minute["longest_stall_s"], at - before)
            before = at
        if timing.events:
            self._firsts[int(sent // self.minute)].append(timing.events[0])

    def note(self, figures: dict[str, float]) -> None:
        """Keep the largest of each in its minute."""
        if self.start:
            minute = self._seen[int((time.perf_counter() - self.start) // self.minute)]
            for name, value in figures.items():
                minute[name] = max(minute[name], value)

    def close(self) -> None:
        """Whole minutes only: after the last, requests no longer come."""
        last: list[float] = []
        for number in range(max(1, int(self.duration // self.minute))):
            minute, times = dict(self._seen[number]), np.sort(np.array(self._times.pop(number, ())))
            gaps = np.diff(np.concatenate((last, times)))
            minute["longest_silence_s"] = float(gaps.max()) if len(gaps) else self.minute
            minute["output_tok_s"] = minute.pop("output_tokens", 0.0) / min(self.minute, self.duration)
            minute["ttft_s"] = percentiles(self._firsts[number])
            self.minutes.append(minute)
            last = times[-1:].tolist() or last

    def summary(self) -> dict[str, Any]:
        """The JSON line."""
        first, last = self.minutes[0], self.minutes[-1]

        def most(name: str) -> float:
            return max(minute.get(name, 0.0) for minute in self.minutes)

        found: dict[str, Any] = {
            "request_rate": self.rate,
            "bearable_requests_s": self.bearable,
            "duration_s": self.duration,
            "minutes": self.minutes,
            "failed": int(sum(minute.get("failed", 0) for minute in self._seen.values())),
            "refused": int(sum(minute.get("refused", 0) for minute in self._seen.values())),
            "longest_stall_s": most("longest_stall_s"),
            "longest_silence_s": most("longest_silence_s"),
            "most_waiting": most("num_requests_waiting"),
            "memory_growth_bytes": last.get("resident_bytes", 0) - first.get("resident_bytes", 0),
            "gpu_growth_bytes": self.gpu_growth,
        }
        if len(self.minutes) > 2:
            found["last_over_second"] = last["output_tok_s"] / max(self.minutes[1]["output_tok_s"], 1e-9)
        return found


def _line(number: int, minute: dict[str, Any]) -> str:
    memory = f", {minute['resident_bytes'] / 2**30:.2f} GiB" if minute.get("resident_bytes") else ""
    ttft = f", first token p50 {minute['ttft_s']['p50'] * 1e3:.0f} ms" if minute["ttft_s"] else ""
    return (
        f"minute {number}: {minute['output_tok_s']:,.0f} tok/s; {minute.get('sent', 0):.0f} sent, "
        f"{minute.get('refused', 0):.0f} refused, {minute.get('failed', 0):.0f} failed; longest stall "
        f"{minute.get('longest_stall_s', 0) * 1e3:.0f} ms, of all {minute['longest_silence_s'] * 1e3:.0f} ms; "
        f"{minute.get('num_requests_running', 0):.0f} running, {minute.get('num_requests_waiting', 0):.0f} waiting"
        f"{ttft}{memory}"
    )
