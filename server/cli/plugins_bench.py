"""``quire plugins bench``: one plugin beside every other of its kind, and beside the device's bound."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from quire.core.errors import ConfigError, PluginError
from quire.core.plugin.manager import PluginManager
from quire.core.plugin.quarantine import class_path
from quire.core.plugin.registry import KINDS
from quire.core.plugin.target import load_target, resolve_file
from quire.server.cli.flags import parse_float, parse_int
from quire.server.cli.plugins_report import split_subject

__all__ = ["BENCH_KINDS", "add_bench_flags", "run_bench", "split_or_find"]

BENCH_KINDS = ("attention", "quant", "op", "sampler", "logits_processor", "spec_decode", "kv", "policy")
"""Kinds whose work in a step can be timed."""
_ON_HOST = ("spec_decode", "kv", "policy")
_SETTINGS = {
    "attention": "attention_backend",
    "quant": "quantization",
    "sampler": "sampler",
    "spec_decode": "spec_method",
    "kv": "kv_allocator",
    "policy": "scheduling_policy",
}
"""The argument of ``LLM`` that names a plugin of a kind."""


def add_bench_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("subject", metavar="KIND/NAME", help="or FILE.py:Class")
    parser.add_argument(
        "--beside", action="append", metavar="NAME", help="measure only this one beside it; may repeat (default: all)"
    )
    parser.add_argument(
        "--shapes", metavar="FILE", help="attention: steps that quire serve --capture-shapes FILE wrote, not the grid"
    )
    parser.add_argument("--only", metavar="TEXT", help="cases whose name has TEXT in it")
    parser.add_argument("--rounds", type=parse_int, default=15, metavar="N", help="measurements (default: 15)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--ceilings", metavar="FILE", help="of quire bench ceilings, for the bounds")
    parser.add_argument("--text", metavar="FILE", help="proposers: a text whose documents are parted by blank lines")
    parser.add_argument("--tokenizer", default="quire-tiny", metavar="MODEL", help="of that text")
    for name, default in (("running", 256), ("waiting", 10_000)):
        parser.add_argument(
            f"--{name}",
            type=parse_int,
            default=default,
            metavar="N",
            help=f"policies, allocators: (default: {default})",
        )
    parser.add_argument("--end-to-end", metavar="MODEL", help="then measure an engine with it and with the default")
    parser.add_argument("--runs", type=parse_int, default=5, metavar="N", help="alternating runs (default: 5)")
    parser.add_argument("--workload", default="nano", metavar="NAME", help="of quire bench (default: nano)")
    parser.add_argument(
        "--scale", type=parse_float, default=1.0, metavar="X", help="multiplies lengths of the workload"
    )
    parser.add_argument("--num-prompts", type=parse_int, metavar="N", help="only so many requests of the workload")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the microseconds")
    parser.add_argument("--plugin", action="append", default=[], metavar="DIST", help="turn a distribution on")


def run_bench(manager: PluginManager, args: argparse.Namespace) -> int:
    """Measure and print. Raises a ``QuireError`` for what cannot be measured."""
    kind, name = split_or_find(args.subject)
    subject = manager.load_class(manager.resolve_plugin(kind, name, announce=False))
    if kind not in BENCH_KINDS:
        raise ConfigError(f"{KINDS[kind].title} is not a kind that is timed; those are {', '.join(BENCH_KINDS)}")
    if args.rounds < 3:
        raise ConfigError(f"--rounds {args.rounds}: at least 3")
    implementations = {name: subject, **_list_rivals(manager, kind, subject, args.beside)}
    report = _Report(args, kind, name)
    report.measure(implementations)
    if args.end_to_end:
        report.compare_engines(subject)
    print(report.to_json() if args.json else report.format_text())
    return 0 if report.rows_of_subject else 1


class _Report:
    """What one run of the command measured."""

    def __init__(self, args: argparse.Namespace, kind: str, name: str) -> None:
        from quire.server.plugin_bench.end_to_end import MIN_RUNS
        from quire.server.plugin_bench.report import BenchPlot

        if args.runs < MIN_RUNS:
            raise ConfigError(f"--runs {args.runs}: at least {MIN_RUNS} alternating runs make an interval")
        self._args, self._kind, self._name = args, kind, name
        self._plot = BenchPlot(args.plot) if args.plot else None
        self._device = _choose_device(args.device, kind)
        self._rows: list[Any] = []
        self._end_to_end: Any = None
        self._notes: list[str] = []

    @property
    def rows_of_subject(self) -> list[Any]:
        """Cases that the subject ran."""
        return [row for row in self._rows if row.implementation == self._name and row.microseconds is not None]

    def measure(self, implementations: Mapping[str, type]) -> None:
        """Every case."""
        import torch

        from quire.server.bench.report import get_device_name
        from quire.server.bench.roofline import load_ceilings
        from quire.server.plugin_bench.measurement import measure_case

        bench = self._make_bench()
        subject = implementations[self._name]
        device_name = get_device_name(self._device)
        ceilings = load_ceilings(device_name, self._args.ceilings and _path(self._args.ceilings))
        on_host = self._kind in _ON_HOST
        if on_host:
            self._notes.append("CPU time of the thread, which a busy machine does not lengthen much")
        elif self._device == "cpu":
            self._notes.append(
                "on a CPU: eager launches by the wall clock, small sizes. It cannot say what a GPU takes: no CUDA "
                "graph, no memory bandwidth, kernels in the interpreter where they are Triton's"
            )
        if ceilings is None and not on_host:
            self._notes.append(
                f"no share of the bound: no ceilings of {device_name}; quire bench ceilings measures them"
            )
        cases = bench.list_cases(subject)
        if self._args.shapes:
            from quire.server.plugin_bench.shapes import read_shape_cases

            if self._kind != "attention":
                raise ConfigError("--shapes goes with attention backends, whose time depends on lengths")
            cases = read_shape_cases(self._args.shapes)
        kept = [case for case in cases if not self._args.only or self._args.only in case.name]
        if not kept:
            names = "; ".join(case.name for case in cases)
            raise ConfigError(f"--only {self._args.only}: no case has that in its name; there are {names}")
        with torch.inference_mode():
            for case in kept:
                self._rows += measure_case(
                    bench,
                    case,
                    implementations,
                    num_rounds=self._args.rounds,
                    ceilings=ceilings,
                    progress=_show_progress,
                )
        _show_progress("")

    def compare_engines(self, subject: type) -> None:
        """``--end-to-end``: the subject against what an engine chooses by itself."""
        from quire.server.plugin_bench.end_to_end import compare_engines

        args, target = self._args, class_path(subject)
        if self._kind == "op":
            changed: dict[str, Any] = {"op": [f"all={target}"]}
        elif self._kind == "logits_processor":
            changed = {"logits_processors": [target]}
        else:
            changed = {_SETTINGS[self._kind]: target}
        if self._kind == "spec_decode":
            changed["num_speculative_tokens"] = 4
        common: dict[str, Any] = {"plugins": args.plugin, "device": self._device}
        if self._device == "cuda":
            common["gpu_memory_utilization"] = 0.42  # two engines hold the GPU, one of them at work
        self._end_to_end = compare_engines(
            args.end_to_end,
            args.workload,
            {**common, **changed},
            common,
            rival_name="the default",
            num_runs=args.runs,
            scale=args.scale,
            num_prompts=args.num_prompts,
        )

    def format_text(self) -> str:
        """A Markdown table, notes below it."""
        from quire.server.plugin_bench.report import format_end_to_end, format_table
        from quire.server.plugin_bench.timer import MIN_ROUNDS

        lines = [format_table(self._rows, self._name), "", *self._notes]
        if any(row.ratio is not None for row in self._rows):
            interval = "95 % interval" if self._args.rounds >= MIN_ROUNDS else f"range of {self._args.rounds} rounds"
            lines.append(f"~: the {interval} of the ratio holds 1")
        if self._end_to_end is not None:
            lines.append(format_end_to_end(self._end_to_end, self._name))
        if self._plot is not None:
            lines.append(f"plot: {self._plot.draw(self._rows, f'{self._kind}/{self._name}')}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """One document."""
        from dataclasses import asdict

        document: dict[str, Any] = {
            "kind": self._kind,
            "subject": self._name,
            "device": self._device,
            "notes": self._notes,
            "rows": [row.to_dict() for row in self._rows],
        }
        if self._end_to_end is not None:
            document["end_to_end"] = asdict(self._end_to_end)
        if self._plot is not None:
            document["plot"] = str(self._plot.draw(self._rows, f"{self._kind}/{self._name}"))
        return json.dumps(document, indent=2)

    def _make_bench(self) -> Any:
        import torch

        from quire.server.plugin_bench import attention_bench, host_benches, linear_bench, sampler_bench, step_benches

        device = torch.device(self._device)
        load = host_benches.HostLoad(self._args.running, self._args.waiting)
        makers: dict[str, Callable[[], Any]] = {
            "attention": lambda: attention_bench.AttentionBench(device),
            "quant": lambda: linear_bench.LinearBench(device),
            "op": lambda: step_benches.OperationBench(device),
            "sampler": lambda: sampler_bench.SamplerBench(device),
            "logits_processor": lambda: step_benches.LogitsBench(device),
            "kv": lambda: host_benches.KVBench(load),
            "policy": lambda: host_benches.PolicyBench(load),
            "spec_decode": self._make_proposer_bench,
        }
        return makers[self._kind]()

    def _make_proposer_bench(self) -> Any:
        from quire.core.engine.tokenizer import Tokenizer
        from quire.core.loading.hub import resolve_model
        from quire.server.plugin_bench.host_benches import ProposerBench, read_recorded_text

        tokenizer = Tokenizer(str(resolve_model(self._args.tokenizer)))
        return ProposerBench(read_recorded_text(self._args.text, tokenizer.encode))


def split_or_find(subject: str) -> tuple[str, str]:
    """(kind, name) of ``KIND/NAME``, or of ``FILE.py:Class``, whose kind is that of its contract."""
    kind, slash, _ = subject.partition("/")
    if ".py:" not in subject or (slash and kind in KINDS):
        return split_subject(subject)
    from quire.core.testing.conformance import find_kind

    return find_kind(load_target(resolve_file(subject))), subject


def _list_rivals(manager: PluginManager, kind: str, subject: type, beside: list[str] | None) -> dict[str, type]:
    """Every other implementation that can be loaded, by name."""
    if beside is None:
        manager.discover_plugins()
        names = [manager.registry.command_line_name(each) for each in manager.registry.list_kind(kind)]
    else:
        names = beside
    rivals: dict[str, type] = {}
    for name in names:
        try:
            target = manager.load_class(kind, name)
        except PluginError:
            if beside is not None:
                raise
            continue
        if target is not subject:
            rivals[name] = target
    return rivals


def _choose_device(requested: str, kind: str) -> str:
    import torch

    if requested == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA GPU; use --device cpu")
    if requested == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return requested


def _path(text: str) -> Any:
    from pathlib import Path

    return Path(text)


def _show_progress(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
