"""``quire bench startup``: from an empty process to an answer, with a cold and with a warm kernel cache."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from typing import Any

from quire.core.engine.args import EngineArgs
from quire.server.bench.client import LoadClient, run_async
from quire.server.bench.report import make_progress_bar, print_json
from quire.server.bench.server_process import ServerProcess, serve_arguments

__all__ = ["run"]


def run(engine_args: EngineArgs, args: argparse.Namespace) -> int:
    """Measure and print: one cold start, and ``--repeat`` warm ones."""
    arguments = serve_arguments(args)
    bar = make_progress_bar(1 + args.repeat, "starts", "start")
    with tempfile.TemporaryDirectory(prefix="quire-kernels-") as cache:
        cold, *warm = [_time_start(arguments, cache, bar) for _ in range(1 + args.repeat)]
    bar.close()
    figures: dict[str, Any] = {
        "model": engine_args.model,
        "ready": cold.pop("ready"),
        "cold": cold,
        "warm": _median_start(warm),
    }
    print(figures["ready"])
    for cache_state in ("cold", "warm"):
        times = figures[cache_state]
        parts = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in times["phases_s"].items())
        print(
            f"ready after {times['ready_s']:.2f} s with a {cache_state} kernel cache ({parts}); "
            f"first token {times['first_token_s']:.3f} s after its request"
        )
    if args.json:
        print_json(figures)
    return 0


def _time_start(arguments: list[str], cache: str, bar: Any) -> dict[str, Any]:
    with ServerProcess(arguments, {"TRITON_CACHE_DIR": cache}) as server:
        ready = server.wait_ready()
        phases = server.phases
        first = run_async(_time_first_token(server.url))
        bar.update()
        rest = {"imports, settings, HTTP": ready - sum(phases.values())}
        return {"ready": server.ready_line, "ready_s": ready, "phases_s": phases | rest, "first_token_s": first}


def _median_start(starts: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians."""
    return {
        "ready_s": statistics.median(each["ready_s"] for each in starts),
        "phases_s": {
            phase: statistics.median(each["phases_s"].get(phase, 0.0) for each in starts)
            for phase in starts[0]["phases_s"]
        },
        "first_token_s": statistics.median(each["first_token_s"] for each in starts),
    }


async def _time_first_token(url: str) -> float:
    client = LoadClient(url)
    model = (await client.get_json("/v1/models"))["data"][0]["id"]
    body = {"model": model, "prompt": [1, 2, 3, 4], "max_tokens": 1, "ignore_eos": True, "stream": True}
    timing = await client.time_stream("/v1/completions", body)
    return timing.total
