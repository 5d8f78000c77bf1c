"""The designs of an A/B test, from the command line to what was observed."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import msgspec

from quire.core.errors import ConfigError
from quire.core.plugin.manager import PluginManager
from quire.core.plugin.options import split_key_values
from quire.server.ab.analysis import MIN_PAIRS
from quire.server.ab.equality import check_arms, describe_setup, find_differences
from quire.server.ab.run import Arm, Experiment
from quire.server.ab.simulated import (
    cut_to_blocks,
    cut_windows,
    plan_blocks,
    repeat_arrivals,
    run_paired_simulation,
    run_switchback_simulation,
)
from quire.server.simulate.capacity import TRUSTED_LOAD, describe_load, measure_load, scale_to_load
from quire.server.simulate.setup import PluginSpec, make_setup, resolve_spec
from quire.server.simulate.simulation import EngineSetup, run_simulation
from quire.server.simulate.step_model import EngineLimits
from quire.server.traces.options import load_trace
from quire.server.traces.trace import Trace

__all__ = ["run_experiment"]


def run_experiment(args: argparse.Namespace) -> Experiment:
    """Raises ``ConfigError`` for arms that cannot be compared."""
    plugins = PluginManager(args.plugins or ())
    names = (args.a, args.a if args.aa else args.b)
    policies = [resolve_spec(args.kind, name, plugins) for name in names]
    if args.url:
        return _run_live(args, policies)
    args.every_step = False
    setups = [
        _change_limits(make_setup(args, policy, plugins), changes, letter)
        for policy, changes, letter in zip(policies, (args.a_set, args.b_set), "AB", strict=True)
    ]
    engines = [describe_setup(setup) for setup in setups]
    warnings = check_arms(find_differences(*engines), allow_unequal=args.allow_unequal)
    arms = _make_arms(names, engines)
    if args.design == "switchback":
        return _simulate_switchback(args, setups, arms, warnings)
    make_again = (lambda number: _load(args, setups[0], args.seed + number)) if _is_made_up(args) else None
    trace = _load(args, setups[0], args.seed)
    windows = cut_windows(trace, args.pairs, make_again)
    stretch, washout = _measure_stretches(windows, args)
    measured = run_paired_simulation(windows, setups, washout)
    depth = [
        (at, waiting, arm)
        for arm, setup in enumerate(setups)
        for at, waiting, _ in run_simulation(windows[0], setup).queue_depth
    ]
    notes = (*trace.notes, *_note_load(trace, setups[0]))
    return Experiment("simulation", arms, measured, stretch, washout, trace.describe(), warnings, depth, notes)


def _simulate_switchback(
    args: argparse.Namespace, setups: list[EngineSetup], arms: tuple[Arm, Arm], warnings: list[str]
) -> Experiment:
    blocks = plan_blocks(args.pairs, args.block, args.seed)
    trace = _load(args, setups[0], args.seed)
    measured = run_switchback_simulation(trace, setups, blocks, args.washout)
    notes = [*trace.notes, *_note_load(trace, setups[0])]
    notes.append("a simulation in virtual time; with --url it changes a server's policy")
    return Experiment(
        "switchback", arms, measured, args.block, args.washout, trace.describe(), warnings, (), notes
    )  # fmt: skip


def _run_live(args: argparse.Namespace, policies: list[PluginSpec]) -> Experiment:
    from quire.server.ab.live import describe_server, run_live_switchback, run_paired_replay, run_split
    from quire.server.ab.live_policy import check_policies

    if args.load is not None:
        raise ConfigError("--load needs a simulated engine; give the rate with --arrivals or --time-scale")
    trace = load_trace(args)
    names = [policy.text for policy in policies]
    engines = [describe_server(url, args.api_key) for url in args.url]
    if args.design == "switchback":
        engines = [engines[0], engines[0]]
    elif args.design == "replay" and args.admin_api_key is not None:
        check_policies(args.url, args.admin_api_key, policies)
    warnings = check_arms(find_differences(*engines), allow_unequal=args.allow_unequal)
    arms = _make_arms(names, engines)
    blocks = plan_blocks(args.pairs, args.block, args.seed)
    stretch, washout = args.block, args.washout
    arrivals: list[str] = []
    if args.design != "replay":
        trace = cut_to_blocks(trace, blocks)
    if args.design == "switchback":
        whole, trace = trace, repeat_arrivals(trace, blocks)
        if trace is not whole:
            arrivals.append("both stretches of a pair have the arrivals and lengths of its first")
        live = run_live_switchback(
            trace, args.url[0], args.api_key, args.admin_api_key, policies, blocks, args.washout, args.vocab_size
        )
    elif args.design == "replay":
        windows = cut_windows(trace, args.pairs, None)
        stretch, washout = _measure_stretches(windows, args)
        live = run_paired_replay(windows, args.url, args.api_key, args.vocab_size, washout)
        if args.admin_api_key is not None:  # again: one may have been quarantined
            try:
                check_policies(args.url, args.admin_api_key, policies)
            except ConfigError as error:  # what was measured is shown all the same
                warnings.append(f"after the last stretch, {error}")
    else:
        live = run_split(trace, args.url, args.api_key, args.vocab_size, blocks, args.seed)
    notes = [*trace.notes, *live.notes, *arrivals]
    if args.design == "replay" and args.admin_api_key is None:
        notes.append("whether the servers have these policies was not asked: that takes --admin-api-key")
    if len(args.url) == 2:
        notes.append("two servers on two devices differ by 1 to 4 % by themselves: run --aa on them first")
    return Experiment(
        args.design, arms, live.measured, stretch, washout, trace.describe(), warnings, (), notes, args.pairs,
        live.interruption,
    )  # fmt: skip


def _measure_stretches(windows: list[Trace], args: argparse.Namespace) -> tuple[float, float]:
    """Seconds of a stretch, and how many of them are not measured: at most a fifth. Raises ``ConfigError``, before any
    is served, where too few have requests that are measured, as in the pauses of traffic that comes in bursts."""
    stretch = sum(window.duration_s for window in windows) / max(len(windows), 1)
    washout = round(min(args.washout, stretch / 5), 1)
    num_measured = sum(any(request.arrival_s >= washout for request in window.requests) for window in windows)
    if num_measured < MIN_PAIRS:
        raise ConfigError(
            f"{num_measured} of {args.pairs} stretches have requests after the first {washout:g} s, and a verdict "
            f"needs {MIN_PAIRS}; give a longer trace, more --pairs, or pauses (off=) that are shorter than a stretch"
        )
    return round(stretch, 1), washout


def _make_arms(names: Any, engines: list[dict[str, Any]]) -> tuple[Arm, Arm]:
    return Arm("A", names[0], engines[0]), Arm("B", names[1], engines[1])


def _change_limits(setup: EngineSetup, pairs: list[str], letter: str) -> EngineSetup:
    """What ``--a-set`` and ``--b-set`` change."""
    flag = f"--{letter.lower()}-set"
    changes: dict[str, Any] = {}
    for key, text in split_key_values(pairs, flag).items():
        if key not in EngineLimits.__struct_fields__:
            raise ConfigError(
                f"{flag} {key}: there is no such limit; choose {', '.join(EngineLimits.__struct_fields__)}"
            )
        try:
            changes[key] = msgspec.convert(text, type(getattr(setup.limits, key)), strict=False)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{flag} {key}={text}: {error}") from None
    return dataclasses.replace(setup, limits=msgspec.structs.replace(setup.limits, **changes))


def _is_made_up(args: argparse.Namespace) -> bool:
    return bool(args.trace.partition(":")[0] == "synthetic")


def _note_load(trace: Trace, setup: EngineSetup) -> list[str]:
    """What a reader has to know of a load at which simulated latencies cannot be trusted."""
    load = measure_load(trace, setup, 1)
    return [describe_load(load)] if max(load.get("mean", 0.0), load.get("peak", 0.0)) > TRUSTED_LOAD else []


def _load(args: argparse.Namespace, setup: EngineSetup, seed: int) -> Trace:
    trace = load_trace(argparse.Namespace(**{**vars(args), "seed": seed}))
    if args.load is not None:
        trace = scale_to_load(trace, setup, args.load, 1)
    return trace
