"""What ``quire plugins`` prints, as plain data: the list, the explanation of one plugin, the doctor's findings."""

from __future__ import annotations

import re
import shutil
import sysconfig
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quire.core.errors import PluginError
from quire.core.plugin import hookspecs
from quire.core.plugin.discovery import PluginEntryPoint, find_module_file, list_start_code
from quire.core.plugin.manager import IMPORT_LIMIT_S, PluginManager
from quire.core.plugin.registry import GROUP, KINDS, Kind, Registration, suggest_names
from quire.core.plugin.source import list_classes, read_bases, read_options
from quire.core.plugin.target import Resolution, find_missing_requirement, resolve_file
from quire.core.version import __version__
from quire.server.cli.plugins_probe import Probe, probe_entries

__all__ = ["doctor_report", "explain_report", "inspect_host", "is_editable_finder", "list_report", "split_subject"]

_KINDS_OF_OTHER_CONTRACTS = {"HostProposer": "spec_decode", "DeviceProposer": "spec_decode"}


def list_report(manager: PluginManager, device: str | None = None, kind: str | None = None) -> dict[str, Any]:
    """Every plugin by kind, whether it is active by default, and why; and what was refused."""
    probes = _probe_unseen(manager)
    kinds = [Kind.from_name(kind).key] if kind else list(KINDS)
    context = {"device": device or inspect_host()["device"]}
    return {
        "version": __version__,
        "api": GROUP,
        "device": context["device"],
        "plugins": [entry for key in kinds for entry in _describe_kind(manager, key, context)],
        "packages": [] if kind else [_describe_package(probe) for probe in probes if probe.hooks],
        "refused": [_describe_refusal(entry, reason) for entry, reason in manager.refused.items()],
    }


def explain_report(manager: PluginManager, subject: str, device: str | None = None) -> dict[str, Any]:
    """Everything known about one plugin, ``KIND/NAME`` or ``FILE.py:Class``, without importing it. PluginError if there
    is none."""
    if ":" in subject and subject.partition("/")[0] not in KINDS:
        subject = f"{_find_kind(subject)}/{subject}"
    if "/" not in subject:
        return _explain_package(manager, subject)
    kind, name = split_subject(subject)
    if name.lower() != "auto" and ":" not in name and not manager.registry.find_by_name(kind, name):
        _probe_unseen(manager)
    context = {"device": device or inspect_host()["device"]}
    resolution = manager.resolve_plugin(kind, name, context)
    registrations = [
        r for r in manager.registry.list_kind(kind) if (r.dist, r.name) == (resolution.dist, resolution.name)
    ]
    if not registrations:
        named = {"kind": kind, "name": name, "spelling": name, "target": resolution.target, "why": resolution.why}
        return named | _describe_class(kind, name, resolution.target)
    registration = registrations[0]
    report = _describe_plugin(manager, registration, _active_plugins(manager, kind, context))
    if name.lower() == "auto":
        report["why"] = resolution.why
    return report | {
        **_describe_class(kind, report["spelling"], registration.target),
        "missing": find_missing_requirement(registration),
        "rejected": dict(resolution.rejected),
    }


def _describe_class(kind: str, spelling: str, target: str) -> dict[str, Any]:
    """What its source says, and how it is used."""
    options, flag = read_options(target), KINDS[kind].flag
    return {
        "title": KINDS[kind].title,
        "contract": KINDS[kind].contract_name,
        "flag": flag and f"{flag} {'all=' if kind == 'op' else ''}{spelling}",
        "target_file": find_module_file(target.partition(":")[0]),
        "options": None if options is None else [option.declaration for option in options],
        "option_meanings": None if options is None else [option.meaning for option in options],
        "option_flag": KINDS[kind].option_flag,
        "arguments": [
            argument.declaration + (f"  # {argument.meaning}" if argument.meaning else "")
            for argument in read_options(target, "Arguments") or ()
        ],
    }


def _find_kind(name: str) -> str:
    """The kind of a class that is named by itself, by the contract that its source derives it from."""
    bases = read_bases(resolve_file(name) if ".py:" in name else name)
    kinds = {**{kind.contract_class: kind.key for kind in KINDS.values()}, **_KINDS_OF_OTHER_CONTRACTS}
    for base in bases:
        if base in kinds:
            return kinds[base]
    raise PluginError(f"{name}: its source does not say of which kind it is; write KIND/{name}")


def doctor_report(manager: PluginManager, limit: float) -> dict[str, Any]:
    """Try everything that is installed. ``problems`` is empty if there are none; each names the distribution, the
    reason and the remedy."""
    problems: list[dict[str, str]] = []
    for registration in (r for key in KINDS for r in manager.registry.list_kind(key) if r.is_bundled):
        if find_module_file(registration.target.partition(":")[0]) is None:
            reason = (
                f"quire: {registration.kind}/{registration.name}: {registration.target} is missing; reinstall quire"
            )
            problems.append({"dist": "quire", "problem": reason})
    probes = probe_entries(manager.entry_points, limit, targets=True)
    for result in probes:
        manager.record_entry_point(result.entry, result.registrations)
        problems.extend({"dist": result.entry.dist, "problem": text} for text in result.problems)
    for result in probes:
        for registration in result.registrations:
            problems.extend(
                {"dist": registration.dist, "problem": text} for text in _describe_clashes(manager, registration)
            )
    start_code = {result.entry.dist: list_start_code(result.entry.dist) for result in probes}
    for entry in {result.entry.dist: result.entry for result in probes}.values():
        texts = _describe_start_code(f"{entry.dist} {entry.version}", start_code[entry.dist])
        problems.extend({"dist": entry.dist, "problem": text} for text in texts)
    host = inspect_host()
    problems.extend({"dist": "this machine", "problem": text} for text in _find_host_problems(host))
    checked = [
        asdict(p.entry)
        | {"file": p.entry.file, "import_s": p.import_s, "hooks": list(p.hooks)}
        | {"plugins": [_format_name(r) for r in p.registrations], "start_code": start_code[p.entry.dist]}
        for p in probes
    ]
    return {"version": __version__, "api": GROUP, "host": host, "third_party": checked, "problems": problems}


def split_subject(subject: str) -> tuple[str, str]:
    """``"policy/fcfs"`` -> ``("policy", "fcfs")``; the name may itself be ``dist/name`` or ``module:Class``."""
    kind, slash, name = subject.partition("/")
    if not slash or not name or subject.endswith(".py"):
        raise _refuse_subject(subject, "FILE.py:Class")
    return Kind.from_name(kind).key, name


def _refuse_subject(subject: str, other_form: str) -> PluginError:
    classes = list_classes(subject) if subject.endswith(".py") else []
    if classes:
        names = " or ".join(f"{subject}:{each}" for each in classes)
        return PluginError(f"{subject} names a file, and no class in it; write {names}")
    return PluginError(f"{subject!r} is not of the form KIND/NAME; write for example policy/fcfs, or {other_form}")


def is_editable_finder(line: str) -> bool:
    """Whether code that runs at every start is what setuptools writes for an editable install, and nothing else."""
    return re.fullmatch(r"__editable__\.\S+\.pth: import (__editable___\w+_finder); \1\.install\(\)", line) is not None


def _describe_start_code(dist: str, lines: Sequence[str]) -> list[str]:
    """Of what it runs at every start, all but the finder of an editable install."""
    return [
        f"{dist}: runs code in every Python process: {line:.160}; read it, and uninstall what you did not expect"
        for line in lines
        if not is_editable_finder(line)
    ]


def _probe_unseen(manager: PluginManager) -> list[Probe]:
    """Collect the registrations of third parties, each in a process of its own, without importing them here."""
    entries = manager.list_unseen()
    probes = probe_entries(entries, IMPORT_LIMIT_S, targets=False) if entries else []
    for result in probes:
        fatal = result.problems[0] if result.problems and not (result.registrations or result.hooks) else None
        manager.record_entry_point(result.entry, result.registrations, fatal)
    return probes


def _explain_package(manager: PluginManager, dist: str) -> dict[str, Any]:
    """What ``--plugin DIST`` would turn on."""
    entries = [entry for entry in manager.entry_points if entry.is_of_dist(dist)]
    if not entries:
        known = [entry.dist for entry in manager.entry_points]
        raise _refuse_subject(dist, f"a package: {suggest_names(dist, known)}" if known else "FILE.py:Class")
    probe = probe_entries(entries[:1], IMPORT_LIMIT_S, targets=False)[0]
    return _describe_package(probe) | {"problems": list(probe.problems)}


def _describe_package(probe: Probe) -> dict[str, Any]:
    hooks = {
        name: _first_sentence(getattr(hookspecs, name).__doc__) for name in probe.hooks if hasattr(hookspecs, name)
    }
    return {
        "dist": probe.entry.dist,
        "version": probe.entry.version,
        "file": probe.entry.file,
        "hooks": hooks,
        "plugins": [_format_name(registration) for registration in probe.registrations],
    }


def _first_sentence(text: str | None) -> str:
    return " ".join((text or "").split()).partition(". ")[0].rstrip(".") + "."


def _active_plugins(manager: PluginManager, kind: str, context: dict[str, Any]) -> list[Resolution]:
    """What is active by default. None for models: the checkpoint decides."""
    if KINDS[kind].always:
        return manager.resolve_plugins(kind)
    return [] if kind == "model" else [manager.resolve_plugin(kind, "auto", context)]


def _describe_kind(manager: PluginManager, kind: str, context: dict[str, Any]) -> list[dict[str, Any]]:
    active = _active_plugins(manager, kind, context)
    return [_describe_plugin(manager, r, active) for r in manager.registry.list_kind(kind)]


def _describe_plugin(manager: PluginManager, registration: Registration, active: list[Resolution]) -> dict[str, Any]:
    chosen = next((a for a in active if (a.dist, a.name) == (registration.dist, registration.name)), None)
    if chosen is not None:
        why = chosen.why
    elif registration.kind == "model":
        why = "chosen by the checkpoint's architecture"
    elif active and (registration.is_bundled or len(active) > 1):
        why = dict(active[0].rejected).get(registration.name, "only when named")
    else:
        why = "only when named"
    return asdict(registration) | {
        "spelling": manager.registry.command_line_name(registration),
        "active": chosen is not None,
        "why": why,
    }


def _describe_clashes(manager: PluginManager, registration: Registration) -> list[str]:
    """Names and aliases of a third party that another distribution keeps or claims too."""
    registry, texts = manager.registry, []
    for name in (registration.name, *registration.aliases):
        others = [r.dist for r in registry.find_by_name(registration.kind, name) if r.dist != registration.dist]
        if others:
            texts.append(
                f"{registration.dist} {registration.version}: {registration.kind}/{name} is a name of {others[0]}; "
                f"it answers to {registration.qualified_name} alone; rename it"
            )
    return texts


def _describe_refusal(entry: PluginEntryPoint, reason: str) -> dict[str, Any]:
    return asdict(entry) | {"file": entry.file, "refusal": reason}


def _format_name(registration: Registration) -> str:
    return f"{registration.kind}/{registration.name}"


def inspect_host() -> dict[str, Any]:
    """What Triton needs of this machine, found without importing torch."""
    gpus = Path("/proc/driver/nvidia/gpus")
    cuda = (gpus.is_dir() and any(gpus.iterdir())) or any(Path("/dev").glob("nvidia[0-9]*"))
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    return {
        "device": "cuda" if cuda else "cpu",
        "c_compiler": shutil.which("gcc") or shutil.which("clang"),
        "python_headers": str(headers) if headers.is_file() else None,
    }


def _find_host_problems(host: dict[str, Any]) -> list[str]:
    if host["device"] != "cuda":
        return []
    problems = []
    if host["c_compiler"] is None:
        problems.append("there is a CUDA GPU but no C compiler, which Triton needs; apt install gcc")
    if host["python_headers"] is None:
        where = sysconfig.get_paths()["include"]
        problems.append(f"there is a CUDA GPU but no Python.h in {where}, which Triton needs; apt install python3-dev")
    return problems
