"""Try third-party plugins in processes of their own, with a time limit, so that nothing they do can hurt ours.

A process is started per entry point, as many at once as there are cores, and its time begins with it: no plugin is
blamed for the others. It writes one JSON line for each thing it has done, so that when it is killed or kills itself the
last line says how far it came.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from quire.core.errors import PluginError
from quire.core.plugin.discovery import PluginEntry, collect, import_entry
from quire.core.plugin.options import options_of
from quire.core.plugin.registry import KINDS, Registration, Requirement
from quire.core.plugin.target import load_target, missing_requirement

__all__ = ["SLOW_S", "Probe", "probe"]

SLOW_S = 1.0
"""An entry point that takes longer than this to import is slow: it delays whoever names a foreign plugin."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What happened to one entry point. ``problems`` are sentences with a remedy; empty means it is well."""

    entry: PluginEntry
    registrations: tuple[Registration, ...] = ()
    problems: tuple[str, ...] = ()
    import_s: float | None = None


def probe(entries: Sequence[PluginEntry], limit: float, *, targets: bool) -> list[Probe]:
    """Try each entry point, for ``limit`` seconds at most. With ``targets`` their classes are loaded too.

    Those refused by their metadata are not started. Never raises for what a plugin does.
    """
    with tempfile.TemporaryDirectory(prefix="quire-probe-") as folder, ThreadPoolExecutor(os.cpu_count() or 1) as pool:

        def one(place: int, entry: PluginEntry) -> Probe:
            if entry.refusal:
                return Probe(entry, problems=(entry.refusal,))
            return _finish(entry, _start(entry, Path(folder, str(place)), targets), limit)

        return list(pool.map(one, *zip(*enumerate(entries), strict=True))) if entries else []


def child(arguments: str) -> None:
    """The probing process: import, collect, load, noting each in the file ``notes``."""
    import numpy  # noqa: F401 - nearly every plugin imports it through a contract: not on its time

    given = json.loads(arguments)
    entry = PluginEntry(**given["entry"])
    with open(given["notes"], "w", encoding="utf-8") as notes:

        def note(**fact: Any) -> None:
            notes.write(json.dumps(fact) + "\n")
            notes.flush()

        note(stage=f"importing {entry.value}")
        start = time.monotonic()
        try:
            plugin = import_entry(entry)
            note(stage="calling its hooks", import_s=time.monotonic() - start)
            registrations = collect(plugin, entry.dist, entry.version, entry.file)
        except PluginError as error:
            note(problem=str(error), done=True)
            return
        note(registrations=[asdict(r) for r in registrations])
        if not registrations:
            hint = _unmarked(plugin)
            if hint:
                note(problem=f"{entry.dist} {entry.version}: {hint}")
        for registration in registrations if given["targets"] else ():
            note(stage=f"loading {registration.target}")
            for problem in _target_problems(registration):
                note(problem=f"{entry.dist} {entry.version}: {problem}")
        note(done=True)


_BOOT = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from quire.server.cli.plugins_probe import child
child(sys.argv[2])
"""


@dataclass(slots=True)
class _Run:
    process: subprocess.Popen[bytes]
    notes: Path
    output: Path


def _start(entry: PluginEntry, base: Path, targets: bool) -> _Run:
    notes, output = base.with_suffix(".notes"), base.with_suffix(".output")
    arguments = json.dumps({"entry": asdict(entry), "notes": str(notes), "targets": targets})
    with open(output, "wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, json.dumps(sys.path), arguments],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return _Run(process, notes, output)


def _finish(entry: PluginEntry, run: _Run, limit: float) -> Probe:
    timed_out = False
    try:
        run.process.wait(limit)
    except subprocess.TimeoutExpired:
        timed_out = True
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(run.process.pid, signal.SIGKILL)
    run.process.wait()
    result, stage, done = _read(entry, run.notes)
    who, problems = f"{entry.dist} {entry.version}", list(result.problems)
    printed = " ".join(run.output.read_text("utf-8", "replace").split())
    if timed_out:
        problems.append(f"{who}: {stage} took more than {limit:g} s; move heavy work out of it")
    elif not done:
        problems.append(
            f"{who}: the process ended while {stage}, with status {run.process.returncode}"
            f"{': ' + printed[-200:] if printed else ''}; mend or uninstall it"
        )
    else:
        if result.import_s is not None and result.import_s > SLOW_S:
            problems.append(
                f"{who}: importing {entry.value} took {result.import_s:.1f} s; import heavy modules in the target"
            )
        if printed:
            problems.append(f"{who}: prints while it is imported: {printed[:120]!r}; use logging")
    return replace(result, problems=tuple(problems))


def _read(entry: PluginEntry, notes: Path) -> tuple[Probe, str, bool]:
    """What the child noted: the facts, the last stage it entered, and whether it came to its end."""
    result, stage, done = Probe(entry), "starting", False
    with contextlib.suppress(OSError, ValueError):
        for line in notes.read_text("utf-8").splitlines():
            fact = json.loads(line)
            stage, done = fact.get("stage", stage), fact.get("done", done)
            result = replace(
                result,
                import_s=fact.get("import_s", result.import_s),
                problems=(*result.problems, *([fact["problem"]] if "problem" in fact else [])),
                registrations=tuple(map(_registration, fact.get("registrations", ()))) or result.registrations,
            )
    return result, stage, done


def _registration(fields: dict[str, Any]) -> Registration:
    requires = tuple(Requirement(**r) for r in fields.pop("requires"))
    return Registration(**{**fields, "requires": requires, "aliases": tuple(fields["aliases"])})


def _target_problems(registration: Registration) -> list[str]:
    name = f"{registration.kind}/{registration.name}"
    absent = missing_requirement(registration)
    if absent:
        return [f"{name}: {absent}"]
    try:
        options_of(load_target(registration.target, KINDS[registration.kind].contract))
    except PluginError as error:
        return [f"{name}: {error}"]
    return []


def _unmarked(plugin: Any) -> str | None:
    """Why a plugin that registers nothing may have meant to."""
    functions = [n for n in dir(plugin) if n.startswith("quire_") and callable(getattr(plugin, n))]
    unmarked = [n for n in functions if not hasattr(getattr(plugin, n), "quire_impl")]
    if unmarked:
        return f"{', '.join(unmarked)} is not marked; decorate it with @quire.hookimpl"
    return None if functions else "its entry point defines no hooks; add quire_register_<kind>, or uninstall it"
