"""Try third-party plugins in processes of their own, with a time limit, so that nothing they do can harm this process.

A process is started per entry point, as many at once as there are cores, and its time begins with it: no plugin is
blamed for the others. It writes one JSON line for each thing it has done, so that when it is killed or kills itself the
last line tells which stage it reached.
"""

from __future__ import annotations

import contextlib
import json
import logging
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

from quire.core.env import count_cpus
from quire.core.errors import PluginError
from quire.core.plugin.discovery import PluginEntryPoint, collect_registrations, import_entry_point, list_hooks
from quire.core.plugin.options import find_options_class
from quire.core.plugin.registry import KINDS, Registration, Requirement
from quire.core.plugin.target import find_missing_requirement, load_target

__all__ = ["SLOW_IMPORT_S", "Probe", "probe_entries"]

SLOW_IMPORT_S = 1.0
"""An entry point that takes longer than this to import is slow: it delays starts with a third-party plugin."""


@dataclass(frozen=True, slots=True)
class Probe:
    """The result for one entry point. ``problems`` are sentences with a remedy; empty means it is well."""

    entry: PluginEntryPoint
    registrations: tuple[Registration, ...] = ()
    hooks: tuple[str, ...] = ()
    """Those that ``--plugin`` turns on."""
    problems: tuple[str, ...] = ()
    import_s: float | None = None


def probe_entries(entries: Sequence[PluginEntryPoint], limit: float, *, targets: bool) -> list[Probe]:
    """Try each entry point, for ``limit`` seconds at most. With ``targets`` their classes are loaded too.

    Those refused by their metadata are not started. Never raises for what a plugin does.
    """
    with tempfile.TemporaryDirectory(prefix="quire-probe-") as folder, ThreadPoolExecutor(count_cpus()) as pool:

        def probe_entry(place: int, entry: PluginEntryPoint) -> Probe:
            if entry.refusal:
                return Probe(entry, problems=(entry.refusal,))
            return _finish_child(entry, _start_child(entry, Path(folder, str(place)), targets), limit)

        return list(pool.map(probe_entry, *zip(*enumerate(entries), strict=True))) if entries else []


def run_child(arguments: str) -> None:
    """The probing process: import, collect, load, writing each fact to the file ``facts``."""
    import numpy  # noqa: F401 - nearly every plugin imports it through a contract: not on its time

    # What takes long is said here by the time limit, and must not look like something that the plugin prints.
    logging.getLogger("quire.plugin").addFilter(lambda record: "has not ended after" not in record.msg)
    job = json.loads(arguments)
    entry = PluginEntryPoint(**job["entry"])
    with open(job["facts"], "w", encoding="utf-8") as facts_file:

        def write_fact(**fact: Any) -> None:
            facts_file.write(json.dumps(fact) + "\n")
            facts_file.flush()

        write_fact(stage=f"importing {entry.value}")
        start = time.monotonic()
        try:
            plugin = import_entry_point(entry)
            write_fact(stage="calling its hooks", import_s=time.monotonic() - start)
            registrations = collect_registrations(plugin, entry.dist, entry.version, entry.file)
        except PluginError as error:
            write_fact(problem=str(error), done=True)
            return
        write_fact(registrations=[asdict(r) for r in registrations], hooks=list_hooks(plugin))
        if not registrations:
            hint = _unmarked(plugin)
            if hint:
                write_fact(problem=f"{entry.dist} {entry.version}: {hint}")
        for registration in registrations if job["targets"] else ():
            write_fact(stage=f"loading {registration.target}")
            for problem in _target_problems(registration):
                write_fact(problem=f"{entry.dist} {entry.version}: {problem}")
        write_fact(done=True)


_BOOT = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from quire.server.cli.plugins_probe import run_child
run_child(sys.argv[2])
"""


@dataclass(slots=True)
class _Child:
    process: subprocess.Popen[bytes]
    facts_file: Path
    output: Path


def _start_child(entry: PluginEntryPoint, base: Path, targets: bool) -> _Child:
    facts, output = base.with_suffix(".facts"), base.with_suffix(".output")
    arguments = json.dumps({"entry": asdict(entry), "facts": str(facts), "targets": targets})
    with open(output, "wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, json.dumps(sys.path), arguments],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return _Child(process, facts, output)


def _finish_child(entry: PluginEntryPoint, run: _Child, limit: float) -> Probe:
    timed_out = False
    try:
        run.process.wait(limit)
    except subprocess.TimeoutExpired:
        timed_out = True
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(run.process.pid, signal.SIGKILL)
    run.process.wait()
    result, stage, done = _read_facts(entry, run.facts_file)
    dist, problems = f"{entry.dist} {entry.version}", list(result.problems)
    printed = " ".join(run.output.read_text("utf-8", "replace").split())
    if timed_out:
        problems.append(f"{dist}: {stage} took more than {limit:g} s; move heavy work out of it")
    elif not done:
        problems.append(
            f"{dist}: the process ended while {stage}, with status {run.process.returncode}"
            f"{': ' + printed[-200:] if printed else ''}; fix or uninstall it"
        )
    else:
        if result.import_s is not None and result.import_s > SLOW_IMPORT_S:
            problems.append(
                f"{dist}: importing {entry.value} took {result.import_s:.1f} s; import heavy modules in the target"
            )
        if printed:
            problems.append(f"{dist}: prints while it is imported: {printed[:120]!r}; use logging")
    return replace(result, problems=tuple(problems))


def _read_facts(entry: PluginEntryPoint, facts_file: Path) -> tuple[Probe, str, bool]:
    """What the child wrote: the facts, the last stage it entered, and whether it came to its end."""
    result, stage, done = Probe(entry), "starting", False
    with contextlib.suppress(OSError, ValueError):
        for line in facts_file.read_text("utf-8").splitlines():
            fact = json.loads(line)
            stage, done = fact.get("stage", stage), fact.get("done", done)
            result = replace(
                result,
                import_s=fact.get("import_s", result.import_s),
                problems=(*result.problems, *([fact["problem"]] if "problem" in fact else [])),
                hooks=tuple(fact.get("hooks", result.hooks)),
                registrations=tuple(map(_registration, fact.get("registrations", ()))) or result.registrations,
            )
    return result, stage, done


def _registration(fields: dict[str, Any]) -> Registration:
    requires = tuple(Requirement(**r) for r in fields.pop("requires"))
    return Registration(**{**fields, "requires": requires, "aliases": tuple(fields["aliases"])})


def _target_problems(registration: Registration) -> list[str]:
    name = f"{registration.kind}/{registration.name}"
    absent = find_missing_requirement(registration)
    if absent:
        return [f"{name}: {absent}"]
    try:
        find_options_class(load_target(registration.target, KINDS[registration.kind].contract))
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
