"""``quire bench``: throughput and latency of the engine, and load on a running server."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from quire.core.errors import ConfigError
from quire.server.flags import ENGINE_FLAGS, add_flags, add_model, engine_arguments, real, whole
from quire.server.legacy import add_old_flags, apply_old_flags

__all__ = ["add_parser", "run"]

_WORKLOADS = "nano, decode-bsN, decode-bsNxINPUTxOUTPUT, prefill, latency-long"


def add_parser(subparsers: Any) -> None:
    """Add the command and its three benchmarks."""
    about = "Measure. Workloads are defined draw for draw in benchmarks/README.md."
    parser = subparsers.add_parser("bench", help="measure throughput, latency and serving", description=about)
    kinds = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", dest="benchmark", required=True)
    _throughput(
        kinds.add_parser("throughput", help="tokens per second, offline", description="Tokens per second, offline.")
    )
    _latency(kinds.add_parser("latency", help="time of one batch", description="Time of one batch, repeated."))
    _serve(kinds.add_parser("serve", help="load on a running server", description="Load on a running server."))


def run(args: argparse.Namespace) -> int:
    """Run the benchmark that was asked for."""
    for name in ("num_prompts", "repeat", "compare_batch_size", "batch_size", "input_len", "output_len", "num_iters"):
        if (value := getattr(args, name, None)) is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for note in [*args.notes, *apply_old_flags(args)]:
        print(note)
    module = importlib.import_module(f"quire.server.bench.{args.benchmark}")
    return module.run(args) if args.benchmark == "serve" else module.run(engine_arguments(args), args)


def _throughput(parser: argparse.ArgumentParser) -> None:
    mine = parser.add_argument_group("benchmark")
    mine.add_argument("--workload", default="nano", metavar="NAME", help=f"{_WORKLOADS} (default: nano)")
    mine.add_argument(
        "--num-prompts", type=whole, metavar="N", help="only the first N requests (default: all; 16 on a CPU)"
    )
    mine.add_argument("--scale", type=real, default=1.0, metavar="X", help="multiply prompt and answer lengths by X")
    mine.add_argument("--temperature", type=real, default=0.0, metavar="T", help="(default: 0)")
    mine.add_argument("--top-p", type=real, default=1.0, metavar="P", help="(default: 1)")
    mine.add_argument("--repeat", type=whole, default=1, metavar="N", help="runs; the median is reported (default: 1)")
    mine.add_argument(
        "--compare",
        choices=("transformers", "none"),
        default="transformers",
        help="beside what (default: transformers)",
    )
    mine.add_argument(
        "--no-compare", dest="compare", action="store_const", const="none", help="the same as --compare none"
    )
    mine.add_argument(
        "--compare-batch-size", type=whole, default=8, metavar="N", help="batch of transformers.generate (default: 8)"
    )
    _common(parser, mine)


def _latency(parser: argparse.ArgumentParser) -> None:
    mine = parser.add_argument_group("benchmark")
    mine.add_argument("--batch-size", type=whole, default=1, metavar="N", help="prompts at once (default: 1)")
    mine.add_argument("--input-len", type=whole, default=32, metavar="N", help="tokens of a prompt (default: 32)")
    mine.add_argument("--output-len", type=whole, default=128, metavar="N", help="tokens of an answer (default: 128)")
    mine.add_argument("--num-iters-warmup", type=whole, default=2, metavar="N", help="runs not counted (default: 2)")
    mine.add_argument("--num-iters", type=whole, default=10, metavar="N", help="runs (default: 10)")
    _common(parser, mine)


def _serve(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", metavar="URL", help="(default: %(default)s)")
    parser.add_argument("--model", metavar="NAME", help="model name to ask for (default: the first that is served)")
    parser.add_argument("--api-key", metavar="KEY", help="key of the server, if it asks for one")
    parser.add_argument("--num-prompts", type=whole, default=64, metavar="N", help="requests (default: 64)")
    parser.add_argument("--input-len", type=whole, default=1024, metavar="N", help="tokens of a prompt (default: 1024)")
    parser.add_argument("--output-len", type=whole, default=128, metavar="N", help="tokens of an answer (default: 128)")
    parser.add_argument(
        "--vocab-size", type=whole, default=10_000, metavar="N", help="draw token ids below N (default: 10000)"
    )
    parser.add_argument("--max-concurrency", type=whole, metavar="N", help="requests at once (default: no limit)")
    parser.add_argument(
        "--request-rate", type=real, default=0.0, metavar="R", help="requests/s, Poisson (default: all at once)"
    )
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help="(default: 0)")
    parser.add_argument("--json", action="store_true", help="one JSON line instead of the table")


def _common(parser: argparse.ArgumentParser, mine: Any) -> None:
    parser.set_defaults(run=run)
    mine.add_argument("--json", action="store_true", help="one JSON line after the readable ones")
    add_model(parser)
    add_flags(parser, ENGINE_FLAGS)
    add_old_flags(parser)
