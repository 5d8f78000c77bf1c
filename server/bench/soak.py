"""``quire bench soak``: more load than a server sustains, for minutes, and how it copes."""

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
from quire.server.bench.client import LoadClient, Timing, run_async
from quire.server.bench.load import RequestGenerator, get_model_name, run_open_loop, send_requests
from quire.server.bench.report import compute_percentiles, make_progress_bar, print_json
from quire.server.bench.server_process import ServerProcess, gpu_memory_used, serve_arguments

__all__ = ["run"]

_GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


def run(engine_args: EngineArgs, args: argparse.Namespace) -> int:
    """Measure and print. Exit status 1 if a request failed other than by being refused."""
    if args.duration < 2 or args.overload <= 0 or args.minute <= 0:
        raise ConfigError("--duration must be at least 2 seconds, --overload and --minute above 0")
    with contextlib.ExitStack() as stack:
        server = None
        if args.base_url is None:
            arguments = serve_arguments(args)
            if engine_args.max_num_queued_requests is None:  # what bounds the queue, whatever comes
                arguments += ["--max-num-queued-requests", str(2 * engine_args.max_num_seqs)]
            server = stack.enter_context(ServerProcess([*arguments, "--disable-log-requests"]))
            server.wait_ready()
            print(server.ready_line, flush=True)
            args.base_url, args.model = server.url, None
        soak = run_async(_run_soak(args, engine_args.max_num_seqs, server))
    for number, minute in enumerate(soak.minutes, 1):
        print(_format_minute(number, minute))
    summary = soak.summarize()
    stall, overall_stall = 1e3 * summary["longest_stall_s"], 1e3 * summary["longest_overall_stall_s"]
    memory_growth, gpu_memory_growth = summary["memory_growth_bytes"] / 2**20, summary["gpu_growth_bytes"] / 2**20
    print(
        f"longest stall of a stream {stall:.0f} ms, of all {overall_stall:.0f} ms; "
        f"at most {summary['max_waiting']:.0f} waiting; {summary['failed']} failed; "
        f"memory {memory_growth:+.0f} MiB since the first minute, of the GPU {gpu_memory_growth:+.0f} MiB"
    )
    if "last_over_second" in summary:
        print(f"throughput of the last minute: {summary['last_over_second']:.1%} of the second")
    if args.json:
        print_json(summary)
    for error in sorted(soak.errors)[:3]:
        print(f"failed: {error}")
    return 1 if summary["failed"] else 0


async def _run_soak(args: argparse.Namespace, max_num_seqs: int, server: ServerProcess | None) -> _SoakLog:
    client = LoadClient(args.base_url, args.api_key)
    requests = RequestGenerator.from_args(args, await get_model_name(client, args))
    rate, sustained_rate = args.request_rate, None
    if not rate:
        concurrency = args.max_concurrency or max_num_seqs
        count = max(2 * concurrency, round(args.num_prompts or 4 * concurrency))
        bar = make_progress_bar(count, "sustained rate")
        timings, wall = await send_requests(client, requests, count, concurrency=concurrency, done=bar.update)
        bar.close()
        if any(t.error for t in timings):
            raise ConfigError(f"a request failed before the soak began: {next(t.error for t in timings if t.error)}")
        sustained_rate = count / wall
        rate = args.overload * sustained_rate
        print(
            f"{concurrency} at a time: {sustained_rate:.2f} requests/s, "
            f"{sum(t.output_tokens for t in timings) / wall:,.0f} tok/s"
        )
    print(f"{rate:.2f} requests/s for {args.duration:g} s", flush=True)
    soak = _SoakLog(rate, sustained_rate, args.duration, args.minute)
    gpu_before = gpu_memory_used()  # not in between: asking the driver holds up the GPU's work
    watcher = asyncio.create_task(_poll_server(soak, client, server))
    bar = make_progress_bar(round(rate * args.duration), "soak")
    gc.collect()
    gc.freeze()
    soak.start = time.perf_counter()
    async for timing in run_open_loop(client, requests, rate, args.duration):
        soak.record_timing(timing)
        bar.update()
    watcher.cancel()
    bar.close()
    soak.finish_minutes()
    soak.gpu_growth = gpu_memory_used() - gpu_before
    return soak


async def _poll_server(soak: _SoakLog, client: LoadClient, server: ServerProcess | None) -> None:
    """Once a second: the gauges of the server, and the memory of its processes."""
    while True:
        await asyncio.sleep(min(1.0, soak.minute / 4))
        figures: dict[str, float] = {}
        with contextlib.suppress(ConfigError):
            text = await client.get_text("/metrics")
            for name in _GAUGES:  # under any server's prefix
                match = re.search(rf"^\w+:{name}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
                figures |= {name: float(match.group(1))} if match else {}
        if server is not None:
            figures["resident_bytes"] = float(server.resident_bytes())
        soak.record_figures(figures)


@dataclass(slots=True)
class _SoakLog:
    """The events of a soak, minute by minute."""

    rate: float
    sustained_rate: float | None
    duration: float
    minute: float
    start: float = 0.0
    gpu_growth: int = 0
    minutes: list[dict[str, Any]] = field(default_factory=list)
    errors: set[str] = field(default_factory=set)
    _minute_figures: dict[int, dict[str, Any]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))
    _event_times: dict[int, array[float]] = field(default_factory=lambda: defaultdict(lambda: array("d")))
    _first_token_times: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))

    def record_timing(self, timing: Timing) -> None:
        """Count an answer, each of its events in the minute in which it arrived."""
        sent = timing.sent_at - self.start
        minute = self._minute_figures[int(sent // self.minute)]
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
            minute = self._minute_figures[number]
            minute["output_tokens"] += share
            self._event_times[number].append(at)
            if before is not None:
                minute["longest_stall_s"] = max(minute["longest_stall_s"], at - before)
            before = at
        if timing.events:
            self._first_token_times[int(sent // self.minute)].append(timing.events[0])

    def record_figures(self, figures: dict[str, float]) -> None:
        """Keep the largest of each in its minute."""
        if self.start:
            minute = self._minute_figures[int((time.perf_counter() - self.start) // self.minute)]
            for name, value in figures.items():
                minute[name] = max(minute[name], value)

    def finish_minutes(self) -> None:
        """Whole minutes only: after the last, requests no longer come."""
        last: list[float] = []
        for number in range(max(1, int(self.duration // self.minute))):
            minute, times = dict(self._minute_figures[number]), np.sort(np.array(self._event_times.pop(number, ())))
            gaps = np.diff(np.concatenate((last, times)))
            minute["longest_overall_stall_s"] = float(gaps.max()) if len(gaps) else self.minute
            minute["output_tok_s"] = minute.pop("output_tokens", 0.0) / min(self.minute, self.duration)
            minute["ttft_s"] = compute_percentiles(self._first_token_times[number])
            self.minutes.append(minute)
            last = times[-1:].tolist() or last

    def summarize(self) -> dict[str, Any]:
        """The JSON line."""
        first, last = self.minutes[0], self.minutes[-1]

        def largest(name: str) -> float:
            return float(max(minute.get(name, 0.0) for minute in self.minutes))

        summary: dict[str, Any] = {
            "request_rate": self.rate,
            "sustained_requests_s": self.sustained_rate,
            "duration_s": self.duration,
            "minutes": self.minutes,
            "failed": int(sum(minute.get("failed", 0) for minute in self._minute_figures.values())),
            "refused": int(sum(minute.get("refused", 0) for minute in self._minute_figures.values())),
            "longest_stall_s": largest("longest_stall_s"),
            "longest_overall_stall_s": largest("longest_overall_stall_s"),
            "max_waiting": largest("num_requests_waiting"),
            "memory_growth_bytes": last.get("resident_bytes", 0) - first.get("resident_bytes", 0),
            "gpu_growth_bytes": self.gpu_growth,
        }
        if len(self.minutes) > 2:
            summary["last_over_second"] = last["output_tok_s"] / max(self.minutes[1]["output_tok_s"], 1e-9)
        return summary


def _format_minute(number: int, minute: dict[str, Any]) -> str:
    memory = f", {minute['resident_bytes'] / 2**30:.2f} GiB" if minute.get("resident_bytes") else ""
    ttft = f", first token p50 {minute['ttft_s']['p50'] * 1e3:.0f} ms" if minute["ttft_s"] else ""
    return (
        f"minute {number}: {minute['output_tok_s']:,.0f} tok/s; {minute.get('sent', 0):.0f} sent, "
        f"{minute.get('refused', 0):.0f} refused, {minute.get('failed', 0):.0f} failed; longest stall "
        f"{minute.get('longest_stall_s', 0) * 1e3:.0f} ms, of all {minute['longest_overall_stall_s'] * 1e3:.0f} ms; "
        f"{minute.get('num_requests_running', 0):.0f} running, {minute.get('num_requests_waiting', 0):.0f} waiting"
        f"{ttft}{memory}"
    )
