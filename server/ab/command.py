"""``quire ab``: which of two policies is better, and how sure that is."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.core.errors import ConfigError
from quire.core.log import setup_plain_logging
from quire.server.cli.flags import parse_float, parse_int

if TYPE_CHECKING:
    from quire.server.ab.analysis import Verdict
    from quire.server.ab.run import Experiment
    from quire.server.simulate.results import Objectives

__all__ = ["add_parser", "run"]

_LEAST_REPORTED_PAIRS = 2

_ABOUT = """Compare two policies on equal traffic: in virtual time (the default), on two servers, or on one server whose
policy changes back and forth. Prints a report in Markdown."""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command; its parser."""
    from quire.server.simulate.flags import add_model_flags
    from quire.server.traces.options import add_trace_flags

    parser: argparse.ArgumentParser = subparsers.add_parser(
        "ab", help="compare two policies, with a verdict", description=_ABOUT
    )
    group = parser.add_argument_group("arms")
    group.add_argument("--a", metavar="NAME[,KEY=VALUE]", help="policy A")
    group.add_argument("--b", metavar="NAME[,KEY=VALUE]", help="policy B")
    group.add_argument("--aa", action="store_true", help="A against itself: the noise floor")
    for letter in "ab":
        group.add_argument(
            f"--{letter}-set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help=f"limit of arm {letter.upper()}'s simulated engine alone, such as max_in_flight_steps=1",
        )
    group.add_argument("--allow-unequal", action="store_true", help="report arms whose engines differ, with a warning")
    group.add_argument(
        "--kind", choices=("policy", "sampler"), default="policy", help="what the arms are (default: policy)"
    )
    group = parser.add_argument_group("design")
    group.add_argument(
        "--design",
        choices=("simulation", "switchback", "replay", "split"),
        default="simulation",
        help="simulation: both arms on the same stretches, in virtual time; switchback: one server (--url), or one "
        "simulated, whose policy changes; replay: the same stretches to two servers; split: each request to one of two",
    )
    group.add_argument("--url", nargs="+", default=[], metavar="URL", help="the server, or those of A and B")
    group.add_argument("--api-key", metavar="KEY", help="key of the servers")
    group.add_argument(
        "--admin-api-key",
        "--admin-key",
        metavar="KEY",
        help="the key that the servers were started with: for a switchback, and for a replay to ask for their policies",
    )
    group.add_argument("--vocab-size", type=parse_int, default=4096, metavar="N", help="token ids sent (default: 4096)")
    group.add_argument("--pairs", type=parse_int, default=20, metavar="N", help="pairs of stretches (default: 20)")
    group.add_argument(
        "--block", type=parse_float, default=30.0, metavar="S", help="stretch of a switchback (default: 30)"
    )
    group.add_argument(
        "--washout", type=parse_float, default=5.0, metavar="S", help="not measured of each (default: 5)"
    )
    add_trace_flags(parser)
    add_model_flags(parser)
    group = parser.add_argument_group("report")
    group.add_argument(
        "--plugin", action="append", metavar="DIST", dest="plugins", help="turn on a distribution's hooks"
    )
    group.add_argument(
        "--load", type=parse_float, metavar="X", help="simulated: play the trace at this share of capacity"
    )
    group.add_argument("--slo-ttft-ms", type=parse_float, metavar="MS", help="objective for the first token")
    group.add_argument("--slo-tpot-ms", type=parse_float, metavar="MS", help="objective for each further token")
    group.add_argument("--primary", default="ttft_p50", metavar="METRIC", help="named first (default: ttft_p50)")
    group.add_argument("--out", metavar="DIR", help="write report.md and its plots here")
    group.add_argument("--json", action="store_true", help="a JSON line in place of the report")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the test, and print its report: a partial one where it was interrupted."""
    from quire.server.ab.analysis import MIN_PAIRS, analyze_pairs
    from quire.server.ab.designs import run_experiment
    from quire.server.ab.observations import combine_arms
    from quire.server.simulate.results import Objectives

    setup_plain_logging()
    objectives = Objectives(args.slo_ttft_ms, args.slo_tpot_ms)
    _check_arguments(args)
    _check_report(args, objectives)
    experiment = run_experiment(args)
    observations = combine_arms(experiment.measured)
    min_pairs = MIN_PAIRS
    if experiment.interruption is not None:
        min_pairs = _LEAST_REPORTED_PAIRS
        if observations.num_pairs < min_pairs:
            print(f"quire: {_describe_no_report(experiment, observations.num_pairs)}", file=sys.stderr)
            raise experiment.interruption
    verdict = analyze_pairs(observations, objectives, 2 * experiment.stretch_s, args.seed, min_pairs)
    verdict.get_effect(args.primary)
    experiment = _note_short_stretches(experiment, observations)
    if args.json:
        print(json.dumps(_to_json(experiment, verdict)))
    text = _write_report(args, experiment, observations, verdict)
    if not args.json:
        print(text)
    if experiment.interruption is not None:
        raise experiment.interruption
    return 0


def _describe_no_report(experiment: Experiment, num_pairs: int) -> str:
    from quire.server.ab.analysis import MIN_PAIRS

    minutes = 2 * experiment.stretch_s / 60
    return (
        f"no report: {num_pairs} of {experiment.planned_pairs} pairs of stretches were measured; a partial report "
        f"needs {_LEAST_REPORTED_PAIRS}, and a verdict {MIN_PAIRS}, {MIN_PAIRS * minutes:,.1f} min in all"
    )


def _note_short_stretches(experiment: Experiment, observations: Any) -> Experiment:
    """Queues need several requests' time to settle."""
    import numpy as np

    median = float(np.nanmedian(observations.e2e_s))
    if experiment.stretch_s >= 4 * median:
        return experiment
    note = f"stretches are short beside a request's {median:.1f} s, so that queues do not settle; make them longer"
    return dataclasses.replace(experiment, notes=(*experiment.notes, note))


def _write_report(args: argparse.Namespace, experiment: Experiment, observations: Any, verdict: Verdict) -> str:
    from quire.server.ab.plots import draw_plots
    from quire.server.ab.report import format_report

    plots: list[tuple[str, str]] = []
    folder = None if args.out is None else Path(args.out)
    if folder is not None:
        plots = draw_plots(folder, experiment, observations, verdict)
    text = format_report(experiment, verdict, args.primary, _repeat_command(args), plots)
    if folder is not None:
        (folder / "report.md").write_text(text)
    return text


def _check_arguments(args: argparse.Namespace) -> None:
    if not args.a or not (args.b or args.aa):
        raise ConfigError("name the arms: --a fcfs --b sjf, or --a fcfs --aa for the noise floor")
    if args.aa and args.b:
        raise ConfigError("--aa compares A with itself; leave out --b")
    if not args.trace:
        raise ConfigError("--trace is missing: name a file, or synthetic:requests=1000 with --arrivals poisson:rate=8")
    if args.design == "split" and args.kind == "policy":
        raise ConfigError(
            "policies cannot be compared by a split of requests: those of both arms would share steps, blocks and the "
            "queue, so that each arm's requests feel the other's policy; use --design switchback, replay or simulation"
        )
    if args.kind == "sampler" and args.design != "split":
        raise ConfigError("samplers are compared by --design split, on two servers; a simulation samples nothing")
    wanted = {"simulation": (0,), "switchback": (0, 1), "replay": (2,), "split": (2,)}[args.design]
    if len(args.url) not in wanted:
        needs = {0: "no --url", 1: "one --url", 2: "two: --url URL_A URL_B"}
        raise ConfigError(f"--design {args.design} takes {' or '.join(needs[n] for n in wanted)}, got {len(args.url)}")
    if args.pairs < 2 or args.washout < 0 or args.block <= 2 * args.washout:
        raise ConfigError("give 2 --pairs or more, and a --block of more than twice the --washout")


def _check_report(args: argparse.Namespace, objectives: Objectives) -> None:
    """What the report needs, before a test of many minutes is run for it."""
    from quire.server.ab.analysis import MIN_PAIRS, import_packages
    from quire.server.ab.metrics import list_metric_names
    from quire.server.ab.plots import import_matplotlib

    if args.pairs < MIN_PAIRS:
        raise ConfigError(f"--pairs {args.pairs}: a verdict needs {MIN_PAIRS} or more")
    names = list_metric_names(objectives)
    if args.primary not in names:
        raise ConfigError(f"--primary {args.primary} is not measured; choose from {', '.join(names)}")
    import_packages()
    if args.out is not None:
        import_matplotlib()
        try:
            Path(args.out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out {args.out}: {error.strerror}; name a folder that can be made") from None


def _to_json(experiment: Experiment, verdict: Verdict) -> dict[str, Any]:
    def clean(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    effects = {}
    for effect in verdict.effects:
        values = {k: clean(v) for k, v in dataclasses.asdict(effect).items() if k != "metric"}
        effects[effect.metric.name] = {**values, "significant": effect.is_significant, "better": effect.is_better}
    return {
        "design": experiment.design,
        "a": experiment.arms[0].name,
        "b": experiment.arms[1].name,
        "pairs": verdict.num_pairs,
        "requests": verdict.num_requests,
        "partial": experiment.interruption is not None,
        "identical": verdict.is_identical,
        "verdict": verdict.summarize(),
        "warnings": list(experiment.warnings),
        "effects": effects,
    }


def _repeat_command(args: argparse.Namespace) -> str:
    """What repeats the test, without keys: every flag that is not at its default, in the order of ``--help``."""
    words = ["quire", "ab"]
    for action in _make_parser()._actions:
        value = getattr(args, action.dest, None)
        if not action.option_strings or value in (action.default, None) or action.dest in ("api_key", "admin_api_key"):
            continue
        flag = action.option_strings[0]
        if isinstance(action, argparse._AppendAction):
            words += [word for each in value for word in (flag, str(each))]
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        else:
            words += [flag] if value is True else [flag, str(value)]
    return shlex.join(words)


def _make_parser() -> argparse.ArgumentParser:
    return add_parser(argparse.ArgumentParser().add_subparsers())
