"""``quire plugins``: what is installed, what is active and why, what is wrong and how to fix it. Imports no torch."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.core.errors import PluginError, QuireError
from quire.core.plugin.manager import PluginManager
from quire.core.plugin.registry import KINDS
from quire.server.cli.plugins_aot import compile_report, format_compile_report
from quire.server.cli.plugins_bench import add_bench_flags, run_bench, split_or_find
from quire.server.cli.plugins_diff import add_diff_flags, format_diff, make_diff_report, write_record
from quire.server.cli.plugins_new import NEW_KINDS, NewPackage
from quire.server.cli.plugins_report import doctor_report, explain_report, is_editable_finder, list_report

if TYPE_CHECKING:
    from quire.core.testing.conformance import CheckResult

__all__ = ["add_parser", "main", "run"]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Mount ``plugins`` and its commands; the parsed arguments carry ``run``."""
    parser: argparse.ArgumentParser = subparsers.add_parser("plugins", help="list, explain and check plugins")
    parser.set_defaults(run=run)
    commands = parser.add_subparsers(
        dest="plugins_command", required=True, metavar="{list,doctor,explain,check,bench,diff,record,new}"
    )
    listing = commands.add_parser("list", help="what is installed, from where, what is active and why")
    listing.add_argument("kind", nargs="?", help=f"one kind alone: {', '.join(KINDS)}")
    doctor = commands.add_parser("doctor", help="try every plugin; exit 1 and name those that are broken")
    doctor.add_argument("--timeout", type=_parse_seconds, default=30.0, help="seconds a plugin may take (default: 30)")
    explain = commands.add_parser("explain", help="all there is to know of one plugin")
    check = commands.add_parser("check", help="run the conformance checks of its kind on one plugin")
    check.add_argument("--only", metavar="TEXT", help="the checks whose name has TEXT in it")
    check.add_argument(
        "--aot",
        metavar="TARGETS",
        help="only compile its Triton kernels, for GPUs such as sm_80,sm_90,sm_100, and say what they take",
    )
    bench = commands.add_parser("bench", help="time one plugin beside every other of its kind")
    add_bench_flags(bench)
    diff = commands.add_parser("diff", help="what another version changes for a package; exit 1 if something breaks")
    record = commands.add_parser("record", help="write the contracts of this version, for diff")
    add_diff_flags(diff, record)
    new = commands.add_parser("new", help="write a package for one plugin, which works and passes its test")
    new.add_argument("new_kind", metavar="KIND", help=f"one of {', '.join(NEW_KINDS)}")
    new.add_argument("name", metavar="NAME", help="for example shortest-first; of a model, its architecture")
    new.add_argument(
        "--into", type=Path, default=Path(), metavar="DIR", help="folder of the package (default: this one)"
    )
    for command in (explain, check):
        command.add_argument(
            "subject", metavar="KIND/NAME", help="for example policy/fcfs, attention/auto, or FILE.py:Class"
        )
    for command in (listing, explain):
        command.add_argument("--device", choices=("cpu", "cuda"), help="as if on this device (default: this machine's)")
    for command in (listing, doctor, explain, check):
        command.add_argument("--json", action="store_true", help="print one JSON document")
    for command in (listing, explain, check):
        command.add_argument("--plugin", action="append", default=[], metavar="DIST", help="turn a distribution on")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command. Returns 0, or 1 if the doctor found a problem or a check failed. PluginError: a wrong name."""
    if args.plugins_command == "new":
        package = NewPackage.from_words(args.new_kind, args.name)
        print(package.format_next_steps(package.write(args.into)))
        return 0
    if args.plugins_command == "record":
        print(write_record(args.file))
        return 0
    if args.plugins_command == "diff":
        report = make_diff_report(args.old, args.new, args.package)
        return _print_report(args, report, format_diff) or int(report["breaking"] > 0)
    manager = PluginManager(getattr(args, "plugin", ()))
    if args.plugins_command == "list":
        return _print_report(args, list_report(manager, args.device, args.kind), _format_list)
    if args.plugins_command == "explain":
        return _print_report(args, explain_report(manager, args.subject, args.device), _format_explanation)
    if args.plugins_command == "bench":
        return run_bench(manager, args)
    if args.plugins_command == "doctor":
        report = doctor_report(manager, args.timeout)
        return _print_report(args, report, _format_doctor) or (1 if report["problems"] else 0)
    if args.aot is not None:
        report = compile_report(manager, args.subject, args.aot)
        return _print_report(args, report, format_compile_report) or (1 if report["failed"] else 0)
    report = _check_plugin(manager, args.subject, args.only)
    return _print_report(args, report, _format_checks) or (1 if report["failed"] else 0)


def main(argv: list[str] | None = None) -> int:
    """``python -m quire.server.cli.plugins list``: the same command on its own."""
    parser = argparse.ArgumentParser(prog="quire")
    add_parser(parser.add_subparsers(required=True))
    try:
        return run(parser.parse_args(["plugins", *(sys.argv[1:] if argv is None else argv)]))
    except QuireError as error:
        print(f"quire: {error}", file=sys.stderr)
        return 2


def _check_plugin(manager: PluginManager, subject: str, only: str | None) -> dict[str, Any]:
    """Load the class and run its kind's checks; this one command imports what it checks."""
    from quire.core.testing.conformance import checks_for, run_check, run_checks

    kind, name = split_or_find(subject)
    resolution = manager.resolve_plugin(kind, name)
    cls = manager.load_class(resolution)
    if only is None:
        results = run_checks(cls, kind)
    else:
        names = [check.__name__ for check in checks_for(kind) if only in check.__name__]
        if not names:
            raise PluginError(f"--only {only}: no check of {kind} has that in its name")
        results = [run_check(cls, name, kind) for name in names]
    return {
        "subject": subject,
        "target": resolution.target,
        "results": [{"check": r.name, "outcome": r.outcome, "reason": r.reason} for r in results],
        "failed": sum(r.outcome == "failed" for r in results),
        "skipped": sum(r.outcome == "skipped" for r in results),
        "hint": _find_hint(results),
    }


def _find_hint(results: Sequence[CheckResult]) -> str:
    """How more of the checks could be run, where most of them were not; empty if enough were."""
    if 2 * sum(result.outcome == "skipped" for result in results) < len(results):
        return ""
    import torch

    kernels = [result for result in results if result.outcome == "skipped" and "triton" in result.reason.lower()]
    if kernels and not torch.cuda.is_available():
        return "run it on a machine with a GPU, or with TRITON_INTERPRET=1, which runs Triton kernels on the CPU"
    return "the reasons above say what they need"


def _print_report(args: argparse.Namespace, report: dict[str, Any], text: Any) -> int:
    print(json.dumps(report, indent=2, default=str) if args.json else text(report))
    return 0


def _format_list(report: dict[str, Any]) -> str:
    lines = []
    for key, kind in KINDS.items():
        plugins = [p for p in report["plugins"] if p["kind"] == key]
        if not plugins:
            continue
        lines.append(f"{key}: {kind.title} ({kind.flag or 'by the checkpoint'})")
        for p in plugins:
            mark = "*" if p["active"] else " "
            origin = f"{p['dist']} {p['version']}"
            lines.append(f"  {mark} {p['spelling']:<22} {origin:<18} {p['summary']}")
            if p["active"] or p["dist"] != "quire":
                lines.append(f"      {p['why']}" + ("" if p["dist"] == "quire" else f"; from {p['file']}"))
    if report["packages"]:
        lines.append("packages: what --plugin turns on")
    for package in report["packages"]:
        lines.append(f"    {package['dist']:<22} {package['version']:<18} {', '.join(package['hooks'])}")
    if report["refused"]:
        lines.append("refused (see quire plugins doctor):")
        lines.extend(f"  ! {r['refusal']}" for r in report["refused"])
    lines.append(f"* active by default on this device ({report['device']})")
    return "\n".join(lines)


def _format_package(report: dict[str, Any]) -> str:
    """What ``explain`` says of a distribution."""
    lines = [f"{report['dist']} {report['version']} ({report['file']})"]
    lines.append(f"  use              --plugin {report['dist']}")
    lines.extend(f"  hook             {name}: {meaning}" for name, meaning in report["hooks"].items())
    lines.extend(f"  offers           {name}" for name in report["plugins"])
    lines.extend(f"  !                {problem}" for problem in report["problems"])
    return "\n".join(lines)


def _format_explanation(report: dict[str, Any]) -> str:
    if "hooks" in report:
        return _format_package(report)
    is_registered = "dist" in report
    status = "active by default: " if report.get("active") else "not active by default: "
    rows = [
        ("summary", report.get("summary")),
        ("class", report["target"]),
        ("file", report["target_file"]),
        ("kind", f"{report['title']}, contract {report['contract']}"),
        ("from", f"{report['dist']} {report['version']} ({report['file']})" if is_registered else None),
        ("use", report["flag"] or "by the checkpoint's architecture"),
        ("also", ", ".join(report.get("aliases", ()))),
        ("options", "\n".join(_format_options(report)) or None),
        ("extra_args", "\n".join(report["arguments"]) or None),
        ("status", (status if is_registered else "") + report["why"]),
        ("missing", report.get("missing")),
        *((f"not {name}", reason) for name, reason in report.get("rejected", {}).items()),
    ]
    width = max(shutil.get_terminal_size((120, 24)).columns, 60)
    lines = [f"{report['kind']}/{report.get('spelling', report['name'])}"]
    for label, value in rows:
        for i, part in enumerate(str(value).splitlines() if value else ()):
            lead = f"  {label if i == 0 else '':<16} "
            lines.extend(textwrap.wrap(part, width, initial_indent=lead, subsequent_indent=" " * len(lead)))
    return "\n".join(lines)


def _format_options(report: dict[str, Any]) -> list[str]:
    """A line an option: the flag as it is written, and what it means."""
    prefix = f"{report['spelling']}." if KINDS[report["kind"]].several else ""
    return [
        f"{report['option_flag']} {prefix}{declaration}" + (f"  # {meaning}" if meaning else "")
        for declaration, meaning in zip(report["options"] or (), report["option_meanings"] or (), strict=True)
    ]


def _format_doctor(report: dict[str, Any]) -> str:
    host = report["host"]
    lines = [f"quire {report['version']}, plugin API {report['api']}"]
    if host["device"] == "cuda":
        lines.append(f"CUDA GPU found; C compiler: {host['c_compiler']}; Python headers: {host['python_headers']}")
    else:
        lines.append("no CUDA GPU found; Triton's compiler is not needed")
    for entry in report["third_party"]:
        offers = ", ".join([*entry["plugins"], *(f"the hook {hook}" for hook in entry["hooks"])]) or "nothing"
        took = "" if entry["import_s"] is None else f", imported in {entry['import_s']:.2f} s"
        lines.append(f"{entry['dist']} {entry['version']} ({entry['name']} = {entry['value']}): offers {offers}{took}")
        for line in entry["start_code"]:
            is_finder = is_editable_finder(line)
            shown = "the finder of setuptools: it is installed with pip install -e" if is_finder else line
            lines.append(f"    runs at every start of Python: {shown}")
    lines.extend(f"! {p['problem']}" for p in report["problems"])
    count = len(report["problems"])
    lines.append("no problems" if not count else f"{count} problem{'s' if count > 1 else ''}")
    return "\n".join(lines)


def _format_checks(report: dict[str, Any]) -> str:
    lines = [f"{report['subject']} ({report['target']})"]
    for r in report["results"]:
        lines.append(f"  {r['outcome']:<8} {r['check']}" + (f": {r['reason']}" if r["reason"] else ""))
    skipped = f", {report['skipped']} skipped" if report["skipped"] else ""
    lines.append(f"{report['failed']} of {len(report['results'])} checks failed{skipped}")
    if report["hint"]:
        lines.append(f"most were skipped, and say nothing about it: {report['hint']}")
    return "\n".join(lines)


def _parse_seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 3600 seconds")
    return value


if __name__ == "__main__":
    sys.exit(main())
