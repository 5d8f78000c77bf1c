"""``quire simulate``: policies on a trace in virtual time; ``simulate fit`` makes step models, ``simulate replay``
checks that a recording is repeated plan by plan."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quire.core.errors import ConfigError, PluginError
from quire.core.log import setup_plain_logging
from quire.server.cli.flags import parse_float

__all__ = ["add_parser", "run"]

_ABOUT = """Serve a trace in virtual time: the scheduler, allocator and policy are the engine's own, and steps take what
a step model says. The same arguments give the same figures."""


def add_parser(subparsers: Any) -> None:
    """Add the command, with ``fit`` and ``replay``."""
    from quire.server.simulate.flags import add_engine_flags
    from quire.server.traces.options import add_trace_flags

    parser = subparsers.add_parser("simulate", help="try policies on a trace, in virtual time", description=_ABOUT)
    parser.add_argument(
        "--policy",
        nargs="+",
        default=["fcfs"],
        metavar="NAME[,KEY=VALUE]",
        help="scheduling policies, each with its options, to compare on one trace (default: fcfs)",
    )
    add_trace_flags(parser)
    add_engine_flags(parser)
    group = parser.add_argument_group("load and report")
    group.add_argument("--load", type=parse_float, metavar="X", help="play the trace at this share of the capacity")
    group.add_argument("--no-capacity", action="store_true", help="do not measure which load the trace is")
    group.add_argument("--slo-ttft-ms", type=parse_float, metavar="MS", help="objective for the first token")
    group.add_argument("--slo-tpot-ms", type=parse_float, metavar="MS", help="objective for each further token")
    group.add_argument("--json", action="store_true", help="a JSON line for each policy")
    group.add_argument("--record", metavar="FILE", help="write a recording of one replica, as quire serve does")
    parser.set_defaults(run=run)
    commands = parser.add_subparsers(metavar="COMMAND", dest="simulate_command")
    _add_fit(commands)
    _add_replay(commands)


def run(args: argparse.Namespace) -> int:
    """Simulate, and print a table or JSON."""
    from quire.core.plugin.manager import PluginManager
    from quire.core.traces.recorder import choose_recording_path
    from quire.server.simulate.capacity import describe_load, measure_load, scale_to_load
    from quire.server.simulate.results import Objectives
    from quire.server.simulate.routing import make_assignment
    from quire.server.simulate.setup import list_policies, make_setup, resolve_spec
    from quire.server.simulate.simulation import run_simulation
    from quire.server.traces.options import load_trace

    setup_plain_logging()
    _check_arguments(args)
    plugins = PluginManager(args.plugins or ())
    policies = list_policies(args.policy, plugins)
    setups = [make_setup(args, policy, plugins) for policy in policies]
    router = resolve_spec("router", ",".join([args.router, *(args.router_option or ())]), plugins)
    trace = load_trace(args)
    if args.load is not None:
        trace = scale_to_load(trace, setups[0], args.load, args.replicas)
    load = {} if args.no_capacity else measure_load(trace, setups[0], args.replicas)
    record_to = None if args.record is None else choose_recording_path(args.record)
    objectives = Objectives(args.slo_ttft_ms, args.slo_tpot_ms)
    has_objectives = objectives != Objectives()
    model = setups[0].model
    if not args.json:
        print(trace.describe())
        for note in trace.notes:
            print(f"note: {note}")
        print(f"step model: {model.name}: {model.device}, {model.model}; {model.source}")
        if (drafts := setups[0].drafts) is not None:
            print(f"drafts: {drafts.num_speculative_tokens} at most, each right with {drafts.acceptance:.1%}")
        if not args.no_capacity:
            print(describe_load(load))
    results = []
    for setup in setups:
        assign = make_assignment(router.make(), trace) if args.replicas > 1 else None
        result = run_simulation(trace, setup, num_replicas=args.replicas, assign=assign, record_to=record_to)
        results.append(dataclasses.replace(result, load=load))
        figures = results[-1].summarize(objectives if has_objectives else None)
        if args.json:
            named = {"trace": trace.name, "step_model": model.name, "seed": args.seed, "replicas": args.replicas}
            if setup.drafts is not None:
                named |= {"num_speculative_tokens": setup.drafts.num_speculative_tokens}
                named |= {"draft_acceptance": setup.drafts.acceptance}
            if args.replicas > 1:
                named["router"] = router.text
            print(json.dumps(_replace_nan({**named, **figures})))
    if not args.json:
        from quire.server.simulate.report import format_results

        print(format_results(results, objectives if has_objectives else None))
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    if not args.trace:
        raise ConfigError(
            "--trace is missing: name a file, or write synthetic:requests=1000 and --arrivals poisson:rate=8"
        )
    if args.replicas < 1:
        raise ConfigError(f"--replicas must be at least 1, got {args.replicas}")
    if args.record is not None and (args.replicas > 1 or len(args.policy) > 1):
        raise ConfigError("--record records one engine: give one --policy and one replica")
    if args.load is not None and not 0 < args.load <= 10:
        raise ConfigError(f"--load is a share of the capacity, such as 0.7, got {args.load:g}")


def _replace_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _replace_nan(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _add_fit(commands: Any) -> None:
    parser = commands.add_parser(
        "fit", help="make a step model of recorded steps", description="Make a step model of recorded steps."
    )
    parser.add_argument("recordings", nargs="+", metavar="RECORDING", help="files of quire serve --record")
    parser.add_argument("--out", required=True, metavar="FILE", help="the step model to write")
    parser.add_argument("--test", nargs="+", default=[], metavar="RECORDING", help="say how far off it is on these too")
    parser.set_defaults(run=_run_fit)


def _run_fit(args: argparse.Namespace) -> int:
    from quire.server.simulate.fit import fit_step_model, measure_errors
    from quire.server.simulate.step_model import check_writable, save_step_model
    from quire.server.traces.recording import read_recording

    check_writable(Path(args.out))
    recordings = [read_recording(Path(path)) for path in args.recordings]
    source = f"fitted to recorded steps by quire simulate fit: {', '.join(r.name for r in recordings)}"
    with _as_bad_recording(", ".join(args.recordings)):
        model = fit_step_model(recordings, Path(args.out).stem, source)
    save_step_model(model, Path(args.out))
    for recording in (*recordings, *(read_recording(Path(path)) for path in args.test)):
        report = measure_errors(model, [recording])
        print(
            f"{recording.name}: {report.num_steps:,} steps, median error {report.median_error:.1%}, p95 "
            f"{report.p95_error:.1%}, sum {report.bias:+.1%}"
        )
    print(f"wrote {args.out}; use it with --step-model {args.out}")
    return 0


def _add_replay(commands: Any) -> None:
    about = "Replay a recording: the policy must plan what it planned in the server, step for step."
    parser = commands.add_parser("replay", help="check that a recording is repeated plan by plan", description=about)
    parser.add_argument("recording", metavar="RECORDING", help="file of quire serve --record")
    parser.add_argument(
        "--policy", metavar="NAME[,KEY=VALUE]", help="another policy than the recorded one, to see where it differs"
    )
    parser.add_argument(
        "--plugin", action="append", metavar="DIST", dest="plugins", help="turn on a distribution's hooks"
    )
    parser.set_defaults(run=_run_replay)


def _run_replay(args: argparse.Namespace) -> int:
    from quire.core.plugin.manager import PluginManager
    from quire.server.simulate.replay import PlanDifference, replay_recording
    from quire.server.simulate.setup import resolve_spec
    from quire.server.traces.recording import read_recording

    setup_plain_logging()
    recording = read_recording(Path(args.recording))
    plugins = PluginManager(args.plugins or ())
    recorded = recording.header.policy
    with _as_bad_recording(args.recording):
        options = "".join(f",{key}={value}" for key, value in dict(recorded.get("options", {})).items())
        class_name = str(recorded["target"]).rpartition(":")[2]
    try:
        policy = resolve_spec("policy", args.policy or f"{recorded['target']}{options}", plugins)
    except PluginError as error:
        if args.policy:
            raise
        raise PluginError(f"{error}; if it was a file's, name that: --policy FILE.py:{class_name}") from None
    fallback = resolve_spec("policy", "fcfs", plugins)
    allocator = plugins.load_class(plugins.resolve_plugin("kv", "auto", {"device": "cpu"}, announce=False))
    num_equal = 0
    with _as_bad_recording(args.recording):
        outcomes = replay_recording(
            recording, policy.make(), fallback.make(), allocator, follow_switches=args.policy is None
        )
        for outcome in outcomes:
            if isinstance(outcome, PlanDifference):
                equal = f"{num_equal} steps are equal"
                print(f"{recording.name}: {equal}, then {policy.name} plans something else; {outcome}")
                return 1
            num_equal += 1
    print(f"{recording.name}: {policy.name} planned all {num_equal} steps as recorded")
    return 0


@contextmanager
def _as_bad_recording(path: str) -> Iterator[None]:
    """What goes wrong with numbers that no engine recorded is the recording's fault. A policy's faults do not arrive
    here."""
    try:
        yield
    except (ConfigError, PluginError):
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{path} is not as an engine records ({reason:.200}); record it again") from None
