"""``quire bench serve``: load on a running server with an OpenAI-compatible API."""

from __future__ import annotations

import argparse
import gc
import sys
from typing import Any

from quire.core.errors import ConfigError
from quire.server.bench.client import LoadClient, Timing, run_async
from quire.server.bench.load import RequestGenerator, get_model_name, longest_stall, send_requests
from quire.server.bench.plot import LoadPlot
from quire.server.bench.report import compute_percentiles, make_progress_bar, print_json, print_table

__all__ = ["run"]

_REPEATED_SHARE = 0.5
"""Random prompts share next to nothing: a larger share of cached prompt tokens means that the server has seen them."""


def run(args: argparse.Namespace) -> int:
    """Measure and print, one request rate after another. Exit status 1 if a request failed."""
    _apply_vllm_names(args)
    if min(args.request_rate) < 0 or (args.max_concurrency or 1) < 1:
        raise ConfigError("--request-rate must not be negative, and --max-concurrency must be at least 1")
    plot = LoadPlot(args.plot) if args.plot else None
    runs = run_async(_run_rates(args))
    if plot is not None:
        print(f"plotted in {plot.draw(runs)}")
    return 1 if any(figures["failed"] for figures in runs) else 0


def _apply_vllm_names(args: argparse.Namespace) -> None:
    """Set what the flags of vLLM's benchmark say in other words."""
    if args.base_url and (args.host or args.port):
        raise ConfigError("give --base-url, or --host and --port")
    args.base_url = args.base_url or f"http://{args.host or '127.0.0.1'}:{args.port or 8000}"
    chat = "/v1/chat/completions"
    args.endpoint = args.endpoint or (chat if args.backend == "openai-chat" else "/v1/completions")
    if args.dataset_name in ("sharegpt", "custom") and not args.dataset:
        raise ConfigError(f"--dataset-name {args.dataset_name}: name its file with --dataset")
    if args.dataset_name == "random" and args.dataset:
        raise ConfigError("--dataset-name random takes no --dataset")


async def _run_rates(args: argparse.Namespace) -> list[dict[str, Any]]:
    client = LoadClient(args.base_url, args.api_key)
    requests = RequestGenerator.from_args(args, await get_model_name(client, args))
    runs = []
    for rate in args.request_rate:
        bar = make_progress_bar(args.num_prompts, f"{rate:g} requests/s" if rate else "requests")
        gc.collect()
        gc.freeze()  # pauses of this process would look like stalls of the server
        timings, wall = await send_requests(
            client, requests, args.num_prompts, rate=rate, concurrency=args.max_concurrency, done=bar.update
        )
        bar.close()
        figures = _summarize(timings, wall, requests, rate, args.max_concurrency)
        if args.json:
            print_json(figures)
        else:
            print_table(_format_rows(figures))
        if not requests.texts and figures["cached_prompt_share"] > _REPEATED_SHARE:
            print(_repeated_prompts_warning(figures, len(args.request_rate)), file=sys.stderr, flush=True)
        for error in sorted({t.error for t in timings if t.error is not None})[:3]:
            print(f"failed: {error}", flush=True)
        runs.append(figures)
    return runs


def _summarize(
    timings: list[Timing], wall: float, requests: RequestGenerator, rate: float, concurrency: int | None
) -> dict[str, Any]:
    successful = [t for t in timings if t.error is None]
    tokens = sum(t.output_tokens for t in successful)
    gaps = [b - a for t in successful for a, b in zip(t.events, t.events[1:], strict=False)]
    spans = [
        (t.events[-1] - t.events[0]) / (t.output_tokens - 1) for t in successful if t.events and t.output_tokens > 1
    ]
    return {
        "model": requests.model,
        "input_len": requests.input_len,
        "output_len": requests.output_len,
        "request_rate": rate,
        "max_concurrency": concurrency,
        "successful": len(successful),
        "failed": len(timings) - len(successful),
        "cached_prompt_share": _cached_prompt_share(timings),
        "wall_s": wall,
        "requests_s": len(successful) / wall,
        "output_tok_s": tokens / wall,
        "ttft_s": compute_percentiles([t.events[0] for t in successful if t.events]),
        "tpot_s": compute_percentiles(spans),
        "itl_s": compute_percentiles(gaps),
        "e2e_s": compute_percentiles([t.total for t in successful]),
        "longest_stall_s": longest_stall(successful),
    }


def _cached_prompt_share(timings: list[Timing]) -> float:
    """Share of the prompt tokens that the server found in its prefix cache. Without the first request, which
    ``send_requests`` sends once before the load."""
    counted = timings[1:]
    return sum(t.cached_tokens for t in counted) / max(1, sum(t.prompt_tokens for t in counted))


def _repeated_prompts_warning(figures: dict[str, Any], num_rates: int) -> str:
    remedy = "give each load a --seed of its own"
    if num_rates > 1:
        remedy += ", and each rate a command of its own"
    return (
        f"warning: {figures['cached_prompt_share']:.0%} of the prompt tokens were in the server's prefix cache: it has "
        f"served these prompts before, and the load measures the cache; {remedy}"
    )


def _format_rows(figures: dict[str, Any]) -> dict[str, str]:
    rows = {
        "Successful requests": str(figures["successful"]),
        "Failed requests": str(figures["failed"]),
        "Benchmark duration (s)": f"{figures['wall_s']:.2f}",
        "Request throughput (req/s)": f"{figures['requests_s']:.2f}",
        "Output token throughput (tok/s)": f"{figures['output_tok_s']:.2f}",
    }
    if figures["request_rate"]:
        rows["Request rate (req/s)"] = f"{figures['request_rate']:g}"
    for key, name in (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("itl_s", "ITL"), ("e2e_s", "E2EL")):
        for part, label in (("mean", "Mean"), ("p50", "Median"), ("p99", "P99")):
            if part in figures[key]:
                rows[f"{label} {name} (ms)"] = f"{figures[key][part] * 1000:.2f}"
    rows["Longest stall in a stream (ms)"] = f"{figures['longest_stall_s'] * 1000:.2f}"
    return rows
