"""``quire bench startup``: from an empty process to an answer, with a cold and with a warm kernel cache."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from typing import Any

from quire.core.engine.args import EngineArgs
from quire.server.bench.client import Client, run_async
from quire.server.bench.report import print_json, progress
from quire.server.bench.server_process import ServerProcess, serve_words

__all__ = ["run"]


def run(engine_args: EngineArgs, args: argparse.Namespace) -> int:
    """Measure and print: one cold start, and ``--repeat`` warm ones."""
    words = serve_words(args)
    bar = progress(1 + args.repeat, "starts", "start")
    with tempfile.TemporaryDirectory(prefix="quire-kernels-") as cache:
        cold, *warm = [_start(words, cache, bar) for _ in range(1 + args.repeat)]
    bar.close()
    found: dict[str, Any] = {
        "model": engine_args.model,
        "ready": cold.pop("ready"),
        "cold": cold,
        "warm": _middle(warm),
    }
    print(found["ready"])
    for cache_state in ("cold", "warm"):
        times = found[cache_state]
        parts = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in times["phases_s"].items())
        print(
            f"ready after {times['ready_s']:.2f} s with a {cache_state} kernel cache ({parts}); "
            f"first token {times['first_token_s']:.3f} s after its request"
        )
    if args.json:
        print_json(found)
    return 0


def _start(words: list[str], cache: str, bar: Any) -> dict[str, Any]:
    with ServerProcess(words, {"TRITON_CACHE_DIR": cache}) as server:
        ready = server.wait_ready()
        phases = server.phases
        first = run_async(_first_token(server.url))
        bar.update()
        rest = {"imports, settings, HTTP": ready - sum(phases.values())}
        return {"ready": server.ready_line, "ready_s": ready, "phases_s": phases | rest, "first_token_s": first}


def _middle(starts: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians."""
    return {
        "ready_s": statistics.median(each["ready_s"] for each in starts),
        "phases_s": {
            phase: statistics.median(each["phases_s"].get(phase, 0.0) for each in starts)
            for phase in starts[0]["phases_s"]
        },
        "first_token_s": statistics.median(each["first_token_s"] for each in starts),
    }


async def _first_token(url: str) -> float:
    client = Client(url)
    model = (await client.get("/v1/models"))["data"][0]["id"]
    body = {"model": model, "prompt": [1, 2, 3, 4], "max_tokens": 1, "ignore_eos": True, "stream": True}
    timing = await client.stream("/v1/completions", body)
    return timing.total
