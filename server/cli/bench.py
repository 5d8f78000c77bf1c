"""``quire bench``: measure the engine, a server and the machine itself."""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Callable
from typing import Any

from quire.core.engine.plugin_names import check_names
from quire.core.errors import ConfigError
from quire.server.cli.flags import ENGINE_FLAGS, add_flags, add_model, make_engine_args, parse_float, parse_int
from quire.server.cli.vllm_flags import add_vllm_flags, apply_vllm_flags

__all__ = ["add_parser", "run"]

_WORKLOADS = "nano, decode-bsN, decode-bsNxINPUTxOUTPUT, prefill, prefill-NxINPUT, latency-long; each with -sampled"
_COUNTS = ("num_prompts", "repeat", "compare_batch_size", "batch_size", "input_len", "output_len", "num_iters")
_CHAT = "/v1/chat/completions"


def add_parser(subparsers: Any) -> None:
    """Add the command and its benchmarks."""
    about = "Measure. benchmarks/README.md defines the workloads exactly."
    parser = subparsers.add_parser("bench", help="measure engine, server and machine", description=about)
    kinds = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", dest="benchmark", required=True)
    for name, (add, text) in _BENCHMARKS.items():
        subparser = kinds.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        subparser.set_defaults(run=run)
        add(subparser)


def run(args: argparse.Namespace) -> int:
    """Run a benchmark."""
    for name in _COUNTS:
        if (value := getattr(args, name, None)) is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for warning in [*args.flag_warnings, *apply_vllm_flags(args)]:
        print(warning)
    path, engine_args = f"quire.server.bench.{args.benchmark}", None
    if args.benchmark not in ("serve", "ceilings"):
        check_names(engine_args := make_engine_args(args))  # before torch is imported
    module = importlib.import_module(path)
    return int(module.run(args) if engine_args is None else module.run(engine_args, args))


def _add_throughput(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("benchmark")
    group.add_argument(
        "--workload", nargs="+", metavar="NAME", help=f"one or more, in one engine: {_WORKLOADS} (default: nano)"
    )
    _add_dataset_flag(group)
    group.add_argument(
        "--num-prompts", type=parse_int, metavar="N", help="only the first N requests (default: all; 16 on a CPU)"
    )
    group.add_argument(
        "--input-len", type=parse_int, metavar="N", help="instead of a workload: random prompts of N tokens"
    )
    group.add_argument(
        "--output-len", type=parse_int, metavar="N", help="with --input-len or --dataset: tokens of an answer"
    )
    group.add_argument(
        "--scale", type=parse_float, default=1.0, metavar="X", help="multiply prompt and answer lengths by X"
    )
    group.add_argument(
        "--temperature", type=parse_float, metavar="T", help="(default: 0, and 0.8 where a name has -sampled)"
    )
    group.add_argument(
        "--top-p", type=parse_float, metavar="P", help="(default: 1, and 0.95 where a name has -sampled)"
    )
    group.add_argument(
        "--repeat", type=parse_int, default=1, metavar="N", help="runs; the median is reported (default: 1)"
    )
    group.add_argument(
        "--compare",
        choices=("auto", "transformers", "none"),
        default="auto",
        help="what to compare with (default: transformers on a CPU, nothing on a GPU)",
    )
    group.add_argument(
        "--no-compare", dest="compare", action="store_const", const="none", help="the same as --compare none"
    )
    group.add_argument(
        "--compare-batch-size",
        type=parse_int,
        default=8,
        metavar="N",
        help="batch of transformers.generate (default: 8)",
    )
    _add_ceilings_flag(group)
    _add_engine_flags(parser, group)


def _add_latency(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("benchmark")
    group.add_argument("--batch-size", type=parse_int, default=1, metavar="N", help="prompts at once (default: 1)")
    group.add_argument("--input-len", type=parse_int, default=32, metavar="N", help="tokens of a prompt (default: 32)")
    group.add_argument(
        "--output-len", type=parse_int, default=128, metavar="N", help="tokens of an answer (default: 128)"
    )
    group.add_argument(
        "--num-iters-warmup", type=parse_int, default=2, metavar="N", help="runs not counted (default: 2)"
    )
    group.add_argument("--num-iters", type=parse_int, default=10, metavar="N", help="runs (default: 10)")
    _add_ceilings_flag(group)
    _add_engine_flags(parser, group)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base-url", metavar="URL", help="(default: http://127.0.0.1:8000)")
    parser.add_argument("--host", metavar="HOST", help="in place of --base-url, as in vLLM")
    parser.add_argument("--port", type=parse_int, metavar="N", help="in place of --base-url, as in vLLM")
    parser.add_argument(
        "--backend", choices=("vllm", "openai", "openai-chat"), help="as in vLLM; openai-chat: --endpoint of chats"
    )
    parser.add_argument(
        "--dataset-name", choices=("random", "sharegpt", "custom"), help="as in vLLM; all but random need --dataset"
    )
    parser.add_argument("--model", metavar="NAME", help="model name to ask for (default: the first that is served)")
    parser.add_argument("--num-prompts", type=parse_int, default=64, metavar="N", help="requests (default: 64)")
    parser.add_argument(
        "--request-rate",
        type=_parse_rate,
        nargs="+",
        default=[0.0],
        metavar="R",
        help="requests/s, Poisson; several: one run each (default: all at once, also inf)",
    )
    parser.add_argument("--max-concurrency", type=parse_int, metavar="N", help="requests at once (default: no limit)")
    parser.add_argument("--plot", metavar="FILE", help="draw latency against load as a PNG; needs quire[plot]")
    parser.add_argument("--json", action="store_true", help="a JSON line for each rate instead of the table")
    parser.add_argument("--seed", type=parse_int, default=0, metavar="N", help="of prompts and gaps (default: 0)")
    _add_request_flags(parser, 1024, 128, 0.0, endpoint=None)


def _add_soak(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("benchmark")
    group.add_argument("--base-url", metavar="URL", help="a running server (default: start one with the flags below)")
    group.add_argument("--duration", type=parse_float, default=480.0, metavar="SECONDS", help="(default: 480)")
    group.add_argument(
        "--overload",
        type=parse_float,
        default=2.0,
        metavar="X",
        help="times the rate that it sustains, measured first (default: 2)",
    )
    group.add_argument(
        "--request-rate", type=parse_float, default=0.0, metavar="R", help="requests/s instead of --overload"
    )
    group.add_argument(
        "--num-prompts", type=parse_int, metavar="N", help="requests of the run that measures the sustained rate"
    )
    group.add_argument(
        "--max-concurrency", type=parse_int, metavar="N", help="of these at once (default: the server's --max-num-seqs)"
    )
    group.add_argument(
        "--minute",
        type=parse_float,
        default=60.0,
        metavar="SECONDS",
        help="length of a reported interval (default: 60)",
    )
    _add_request_flags(group, 512, 128, 0.5)
    _add_engine_flags(parser, group)


def _add_startup(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("benchmark")
    group.add_argument("--repeat", type=parse_int, default=1, metavar="N", help="warm starts (default: 1)")
    _add_engine_flags(parser, group)


def _add_steps(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("benchmark")
    group.add_argument("--out", required=True, metavar="FILE", help="the step model to write, for quire simulate")
    group.add_argument(
        "--seconds",
        type=parse_float,
        default=120.0,
        metavar="S",
        help="begin no point of the grid after it, if a fit has enough (default: 120)",
    )
    _add_engine_flags(parser, group)


def _add_ceilings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: a GPU if any)")
    parser.add_argument(
        "--cpu-threads", type=parse_int, metavar="N", help="threads, as of the engine (default: all cores but one)"
    )
    parser.add_argument("--out", metavar="FILE", help="where to keep them (default: ~/.cache/quire/ceilings.json)")
    parser.add_argument("--json", action="store_true", help="one JSON line after the readable ones")


_BENCHMARKS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str]] = {
    "throughput": (_add_throughput, "tokens per second, offline"),
    "latency": (_add_latency, "time of one batch, repeated"),
    "serve": (_add_serve, "load on a running server"),
    "soak": (_add_soak, "more load than a server sustains, for minutes"),
    "steps": (_add_steps, "a step model for quire simulate: steps by tokens, requests and context"),
    "startup": (_add_startup, "from an empty process to an answer"),
    "ceilings": (_add_ceilings, "memory bandwidth and matrix throughput of this machine"),
}


def _add_request_flags(
    group: Any, input_len: int, output_len: int, spread: float, endpoint: str | None = "/v1/completions"
) -> None:
    """Flags for requests to a server, in vLLM's spellings too."""
    group.add_argument("--api-key", metavar="KEY", help="key of the server, if it asks for one")
    group.add_argument(
        "--endpoint", choices=("/v1/completions", _CHAT), default=endpoint, help="(default: /v1/completions)"
    )
    for name, default, what in (("input", input_len, "a prompt"), ("output", output_len, "an answer")):
        group.add_argument(
            f"--{name}-len",
            f"--random-{name}-len",
            type=parse_int,
            default=default,
            metavar="N",
            help=f"tokens of {what} (default: {default})",
        )
    group.add_argument(
        "--random-range-ratio",
        type=parse_float,
        default=spread,
        metavar="X",
        help=f"lengths vary by this share up and down (default: {spread:g})",
    )
    _add_dataset_flag(group)
    group.add_argument("--temperature", type=parse_float, default=0.0, metavar="T", help="(default: 0)")
    group.add_argument(
        "--vocab-size", type=parse_int, default=4096, metavar="N", help="sample token ids below N (default: 4096)"
    )


def _add_dataset_flag(group: Any) -> None:
    group.add_argument(
        "--dataset",
        "--dataset-path",
        metavar="FILE",
        help="prompts from a file: ShareGPT's .json, .jsonl with prompt and completion, or a text line each",
    )


def _add_ceilings_flag(group: Any) -> None:
    group.add_argument(
        "--ceilings", metavar="FILE", help="for the roofline bound: a file of quire bench ceilings --out"
    )


def _add_engine_flags(parser: argparse.ArgumentParser, group: Any) -> None:
    group.add_argument("--json", action="store_true", help="a JSON line for each result after the readable ones")
    add_model(parser)
    add_flags(parser, ENGINE_FLAGS)
    add_vllm_flags(parser)


def _parse_rate(text: str) -> float:
    """Requests a second; ``inf``, as in vLLM, sends all at once."""
    value = parse_float(text)
    return 0.0 if math.isinf(value) else value
