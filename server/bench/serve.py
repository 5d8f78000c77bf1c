"""``quire bench serve``: load on a running server, any that speaks the API of OpenAI."""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from typing import Any

from quire.core.errors import ConfigError
from quire.server.bench.client import Client, Timing
from quire.server.bench.report import percentiles, print_json, print_table
from quire.server.bench.workloads import random_prompts

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Measure and print. Exit status 1 if a request failed."""
    if args.request_rate < 0 or (args.max_concurrency or 1) < 1:
        raise ConfigError("--request-rate must not be negative, and --max-concurrency must be at least 1")
    timings, wall = asyncio.run(_load(args))
    good = [t for t in timings if t.error is None]
    found = _figures(good, wall, args)
    found["failed"] = len(timings) - len(good)
    if args.json:
        print_json(found)
    else:
        print_table(_readable(found))
    for error in sorted({t.error for t in timings if t.error is not None})[:3]:
        print(f"failed: {error}")
    return 1 if found["failed"] else 0


async def _load(args: argparse.Namespace) -> tuple[list[Timing], float]:
    client = Client(args.base_url, args.api_key)
    args.model = args.model or (await client.get("/v1/models"))["data"][0]["id"]
    draw = random.Random(args.seed)
    prompts = random_prompts(draw, args.num_prompts, args.input_len, args.vocab_size)
    gate = asyncio.Semaphore(args.max_concurrency or args.num_prompts)

    async def one(prompt: list[int], after: float) -> Timing:
        await asyncio.sleep(after)
        async with gate:
            return await client.stream("/v1/completions", _body(prompt, args))

    await client.stream("/v1/completions", _body(prompts[0][:8], args) | {"max_tokens": 1})  # the first is not counted
    delays, at = [], 0.0
    for _ in prompts:
        delays.append(at)
        at += draw.expovariate(args.request_rate) if args.request_rate else 0.0
    start = time.perf_counter()
    timings = await asyncio.gather(*(one(p, d) for p, d in zip(prompts, delays, strict=True)))
    return list(timings), time.perf_counter() - start


def _body(prompt: list[int], args: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": args.model,
        "prompt": prompt,
        "max_tokens": args.output_len,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _figures(good: list[Timing], wall: float, args: argparse.Namespace) -> dict[str, Any]:
    tokens = sum(t.output_tokens for t in good)
    gaps = [b - a for t in good for a, b in zip(t.events, t.events[1:], strict=False)]
    spans = [(t.events[-1] - t.events[0]) / (t.output_tokens - 1) for t in good if t.events and t.output_tokens > 1]
    shape = {
        name: getattr(args, name) for name in ("model", "input_len", "output_len", "request_rate", "max_concurrency")
    }
    return {
        **shape,
        "successful": len(good),
        "wall_s": wall,
        "requests_s": len(good) / wall,
        "output_tok_s": tokens / wall,
        "ttft_s": percentiles([t.events[0] for t in good if t.events]),
        "tpot_s": percentiles(spans),
        "itl_s": percentiles(gaps),
        "e2e_s": percentiles([t.total for t in good]),
    }


def _readable(found: dict[str, Any]) -> dict[str, str]:
    rows = {
        "Successful requests": str(found["successful"]),
        "Failed requests": str(found["failed"]),
        "Benchmark duration (s)": f"{found['wall_s']:.2f}",
        "Request throughput (req/s)": f"{found['requests_s']:.2f}",
        "Output token throughput (tok/s)": f"{found['output_tok_s']:.2f}",
    }
    for key, name in (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("itl_s", "ITL"), ("e2e_s", "E2EL")):
        for part, label in (("mean", "Mean"), ("p50", "Median"), ("p99", "P99")):
            if part in found[key]:
                rows[f"{label} {name} (ms)"] = f"{found[key][part] * 1000:.2f}"
    return rows
