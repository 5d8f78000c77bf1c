"""``quire bench serve``: load on a running server, any that speaks the API of OpenAI."""

from __future__ import annotations

import argparse
import gc
from typing import Any

from quire.core.errors import ConfigError
from quire.server.bench.client import Client, Timing, run_async
from quire.server.bench.load import Requests, longest_gap, model_of, send_all
from quire.server.bench.plot import LoadPlot
from quire.server.bench.report import percentiles, print_json, print_table, progress

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Measure and print, one request rate after another. Exit status 1 if a request failed."""
    if min(args.request_rate) < 0 or (args.max_concurrency or 1) < 1:
        raise ConfigError("--request-rate must not be negative, and --max-concurrency must be at least 1")
    plot = LoadPlot(args.plot) if args.plot else None
    every = run_async(_rates(args))
    if plot is not None:
        print(f"drawn in {plot.draw(every)}")
    return 1 if any(found["failed"] for found in every) else 0


async def _rates(args: argparse.Namespace) -> list[dict[str, Any]]:
    client = Client(args.base_url, args.api_key)
    requests = Requests.of(args, await model_of(client, args))
    every = []
    for rate in args.request_rate:
        bar = progress(args.num_prompts, f"{rate:g} requests/s" if rate else "requests")
        gc.collect()
        gc.freeze()  # pauses of our own would look like stalls of the server
        timings, wall = await send_all(
            client, requests, args.num_prompts, rate=rate, concurrency=args.max_concurrency, done=bar.update
        )
        bar.close()
        found = _figures(timings, wall, requests, rate, args.max_concurrency)
        if args.json:
            print_json(found)
        else:
            print_table(_readable(found))
        for error in sorted({t.error for t in timings if t.error is not None})[:3]:
            print(f"failed: {error}", flush=True)
        every.append(found)
    return every


def _figures(
    timings: list[Timing], wall: float, requests: Requests, rate: float, concurrency: int | None
) -> dict[str, Any]:
    good = [t for t in timings if t.error is None]
    tokens = sum(t.output_tokens for t in good)
    gaps = [b - a for t in good for a, b in zip(t.events, t.events[1:], strict=False)]
    spans = [(t.events[-1] - t.events[0]) / (t.output_tokens - 1) for t in good if t.events and t.output_tokens > 1]
    return {
        "model": requests.model,
        "input_len": requests.input_len,
        "output_len": requests.output_len,
        "request_rate": rate,
        "max_concurrency": concurrency,
        "successful": len(good),
        "failed": len(timings) - len(good),
        "wall_s": wall,
        "requests_s": len(good) / wall,
        "output_tok_s": tokens / wall,
        "ttft_s": percentiles([t.events[0] for t in good if t.events]),
        "tpot_s": percentiles(spans),
        "itl_s": percentiles(gaps),
        "e2e_s": percentiles([t.total for t in good]),
        "longest_stall_s": longest_gap(good),
    }


def _readable(found: dict[str, Any]) -> dict[str, str]:
    rows = {
        "Successful requests": str(found["successful"]),
        "Failed requests": str(found["failed"]),
        "Benchmark duration (s)": f"{found['wall_s']:.2f}",
        "Request throughput (req/s)": f"{found['requests_s']:.2f}",
        "Output token throughput (tok/s)": f"{found['output_tok_s']:.2f}",
    }
    if found["request_rate"]:
        rows["Request rate asked for (req/s)"] = f"{found['request_rate']:g}"
    for key, name in (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("itl_s", "ITL"), ("e2e_s", "E2EL")):
        for part, label in (("mean", "Mean"), ("p50", "Median"), ("p99", "P99")):
            if part in found[key]:
                rows[f"{label} {name} (ms)"] = f"{found[key][part] * 1000:.2f}"
    rows["Longest stall in a stream (ms)"] = f"{found['longest_stall_s'] * 1000:.2f}"
    return rows
