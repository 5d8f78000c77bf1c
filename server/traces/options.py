"""The flags that name and shape a trace, for every command that takes one."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from quire.core.errors import ConfigError
from quire.server.cli.flags import parse_float, parse_int

if TYPE_CHECKING:
    from quire.server.traces.trace import Trace

__all__ = ["add_trace_flags", "load_trace"]


def add_trace_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--trace`` and what shapes it."""
    group = parser.add_argument_group("trace")
    group.add_argument(
        "--trace",
        metavar="FILE",
        help="recording of quire serve --record, Mooncake, Azure, BurstGPT or ShareGPT file, or "
        "synthetic:requests=1000,input=lognormal/1024/0.8,output=lognormal/128/0.8",
    )
    group.add_argument(
        "--arrivals",
        metavar="SPEC",
        help="other times: poisson:rate=8, gamma:rate=8,cv=3, onoff:rate=16,on=10,off=10, "
        "diurnal:rate=8,period=600,swing=0.8, uniform:rate=8 or burst",
    )
    group.add_argument("--start", type=parse_float, metavar="S", help="leave out what arrives before S seconds")
    group.add_argument("--duration", type=parse_float, metavar="S", help="only S seconds of it")
    group.add_argument("--num-requests", type=parse_int, metavar="N", help="only the first N requests")
    group.add_argument("--time-scale", type=parse_float, metavar="X", help="arrivals X times as fast")
    group.add_argument("--length-scale", type=parse_float, metavar="X", help="prompts and answers X times as long")
    group.add_argument("--tokenizer", metavar="NAME", help="counts the tokens of conversations (default: estimated)")
    group.add_argument("--seed", type=parse_int, default=0, metavar="N", help="of all that is random (default: 0)")


def load_trace(args: argparse.Namespace) -> Trace:
    """The trace of a command line. Raises ``ConfigError``."""
    from quire.server.traces.read import read_trace
    from quire.server.traces.synthetic import make_arrivals

    trace = read_trace(args.trace, seed=args.seed, count_tokens=_make_counter(args.tokenizer))
    if args.num_requests is not None:
        if args.num_requests < 1:
            raise ConfigError(f"--num-requests must be at least 1, got {args.num_requests}")
        trace = trace.limit_requests(args.num_requests)
    if args.start or args.duration is not None:
        start = args.start or 0.0
        trace = trace.cut_window(start, start + (float("inf") if args.duration is None else args.duration))
    if args.arrivals:
        trace = trace.replace_arrivals(make_arrivals(args.arrivals, len(trace), args.seed))
    elif not trace.has_times:
        # With a load, the rate is found later.
        if getattr(args, "load", None) is None:
            raise ConfigError(f"{trace.name} has no times; give them with --arrivals, as in poisson:rate=8, or --load")
        trace = trace.replace_arrivals(make_arrivals("poisson:rate=1", len(trace), args.seed))
    if args.time_scale is not None:
        trace = trace.scale_time(args.time_scale)
    return trace if args.length_scale is None else trace.scale_lengths(args.length_scale)


def _make_counter(name: str | None) -> Callable[[str], int] | None:
    if name is None:
        return None
    from quire.core.engine.tokenizer import Tokenizer
    from quire.core.loading.hub import resolve_model

    tokenizer: Any = Tokenizer(str(resolve_model(name)))
    return lambda text: len(tokenizer.encode(text))
