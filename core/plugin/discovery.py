"""Find third-party plugins among the installed distributions, and import one without letting it hurt the process.

Scanning reads metadata only. Everything that can be refused without an import is refused here: another API version,
a misspelt group, a ``Requires-Dist: quire`` that this version does not satisfy.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pluggy

from quire.core.errors import PluginError
from quire.core.plugin import hookspecs
from quire.core.plugin.import_guard import guard_import
from quire.core.plugin.quarantine import NEVER_CONTAINED, read_error_text
from quire.core.plugin.registry import GROUP, KINDS, PROJECT, Registrar, Registration, normalize_dist_name
from quire.core.version import __version__

__all__ = [
    "PluginEntryPoint",
    "collect_registrations",
    "find_module_file",
    "import_entry_point",
    "list_hooks",
    "list_start_code",
    "scan_entry_points",
]


@dataclass(frozen=True, slots=True)
class PluginEntryPoint:
    """One entry point of one installed distribution. ``refusal`` says why it may not be imported, and the remedy."""

    dist: str
    version: str
    group: str
    name: str
    value: str
    location: str
    requires_quire: str | None = None
    refusal: str | None = None

    def is_of_dist(self, dist: str) -> bool:
        """Whether the distribution ``dist`` brings it, however its name is spelt."""
        return normalize_dist_name(self.dist) == normalize_dist_name(dist)

    @property
    def file(self) -> str | None:
        """The file of the entry point's module, found without importing it."""
        return find_module_file(self.value.partition(":")[0])


def scan_entry_points() -> list[PluginEntryPoint]:
    """Every entry point on ``sys.path`` in a group of ours or one that resembles it, by distribution. Imports none."""
    entries: list[PluginEntryPoint] = []
    seen: set[str] = set()
    for dist in importlib.metadata.distributions():
        with contextlib.suppress(OSError, UnicodeDecodeError):
            text = dist.read_text("entry_points.txt") or ""
            if not _GROUP_HEADER.search(text):
                continue
            name = (dist.metadata["Name"] if dist.metadata is not None else None) or _name_from_folder(dist)
            if normalize_dist_name(name) in seen or normalize_dist_name(name) == PROJECT:
                continue
            seen.add(normalize_dist_name(name))
            entries.extend(_read_entries(dist, name, text))
    return sorted(entries, key=lambda e: (normalize_dist_name(e.dist), e.group, e.name))


def import_entry_point(entry: PluginEntryPoint, limit_s: float | None = None) -> Any:
    """Import what ``entry`` points at. Whatever it raises, including SystemExit, becomes a one-line PluginError.

    With ``limit_s`` (seconds) the import runs in a thread that is given up on when the time is over. What it prints to
    standard output goes to standard error.
    """
    if entry.refusal:
        raise PluginError(entry.refusal)
    outcome: list[Any] = []
    given_up = threading.Event()
    module = entry.value.partition(":")[0]

    def run() -> None:
        try:
            with guard_import(entry.value, given_up.is_set):
                value = _import_value(entry.value)
            outcome.append(value)
        except NEVER_CONTAINED:
            raise
        except BaseException as error:
            reason = format_error(error, module)
            outcome.append(PluginError(f"{_format_entry(entry)} cannot be imported: {reason}; mend or uninstall it"))

    with contextlib.redirect_stdout(sys.stderr):
        if limit_s is None:
            run()
        else:
            thread = threading.Thread(target=run, daemon=True, name=f"import {entry.value}")
            thread.start()
            thread.join(limit_s)
            if thread.is_alive():
                given_up.set()
    if not outcome:
        raise PluginError(
            f"{_format_entry(entry)} took more than {limit_s:g} s to import; name it as {entry.dist}/NAME to wait "
            "for it, or move its heavy imports into the target module"
        )
    if isinstance(outcome[0], PluginError):
        raise outcome[0]
    return outcome[0]


def collect_registrations(
    plugin: Any, dist: str = PROJECT, version: str = "", file: str | None = None
) -> list[Registration]:
    """What ``plugin`` registers, of every kind. PluginError if it has hooks we don't know or its hooks raise."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    registrations: list[Registration] = []
    try:
        manager.register(plugin)
        manager.check_pending()
        for kind in KINDS:
            registrar = Registrar(kind, dist, version, file)
            getattr(manager.hook, f"quire_register_{kind}")(register=registrar)
            registrations.extend(registrar.registrations)
    except NEVER_CONTAINED:
        raise
    except BaseException as error:
        raise PluginError(f"{dist} {version}: {format_error(error)}; mend or uninstall it") from error
    return registrations


def list_start_code(dist: str) -> list[str]:
    """What a distribution runs at the start of every Python process, each with its file: lines of ``.pth`` files that
    are code, and modules that ``site`` imports. Reads files alone."""
    found = []
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, OSError, UnicodeDecodeError):
        for file in importlib.metadata.distribution(dist).files or ():
            if file.name in ("sitecustomize.py", "usercustomize.py"):
                found.append(file.name)
            elif file.suffix == ".pth" and len(file.parts) == 1:
                lines = Path(str(file.locate())).read_text("utf-8").splitlines()
                found += [f"{file.name}: {line.strip()}" for line in lines if line.startswith(("import ", "import\t"))]
    return found


def list_hooks(plugin: Any) -> list[str]:
    """The hooks that ``plugin`` implements beside those that register implementations: what ``--plugin`` turns on."""
    names = (name for name in dir(plugin) if name.startswith("quire_") and not name.startswith("quire_register_"))
    marked = [name for name in names if hasattr(getattr(plugin, name), "quire_impl")]
    commands = getattr(plugin, "quire_register_commands", None)
    return [*marked, *(["quire_register_commands"] if hasattr(commands, "quire_impl") else [])]


def find_module_file(module: str) -> str | None:
    """Where ``module`` lives, without importing it or any of its parents. None if it cannot be found."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not rest:
        return spec.origin
    for folder in spec.submodule_search_locations or ():
        path = Path(folder, *rest)
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.is_file():
                return str(candidate)
    return None


def format_error(error: BaseException, module: str | None = None) -> str:
    """An exception on one line, with what it was when its text alone would not say, and where in the code of a plugin
    that lives in ``module``, or beside it, it was raised."""
    text = read_error_text(error)
    if isinstance(error, PluginError):
        return text
    if isinstance(error, SystemExit):
        return f"it called sys.exit({error.code!r})"
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text + ("" if module is None else _locate_error(error, module))


def _locate_error(error: BaseException, module: str) -> str:
    """The innermost line of the package of ``module``, of a bundled plugin of that module; empty if there is none."""
    package = module if module.startswith(f"{PROJECT}.") else module.partition(".")[0]
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        name, code = str(frame.f_globals.get("__name__")), frame.f_code
        if name == package or name.startswith(f"{package}."):
            function = "" if code.co_qualname == "<module>" else f", in {code.co_qualname}"
            return f" ({code.co_filename}, line {line}{function})"
    return ""


_GROUP_HEADER = re.compile(r"^\s*\[\s*quire(v?\d+|[^a-z0-9\]][^\]]*)?\]", re.MULTILINE | re.IGNORECASE)
_GROUP_LIKE_OURS = re.compile(r"quire(v?\d+|[^a-z0-9].*)?", re.IGNORECASE)
_VERSIONED_GROUP = re.compile(r"quire\.v(\d+)")


def _read_entries(dist: importlib.metadata.Distribution, name: str, text: str) -> Iterator[PluginEntryPoint]:
    version = (dist.metadata["Version"] if dist.metadata is not None else None) or "?"
    location = str(dist.locate_file(""))
    requires_quire = _read_quire_requirement(dist)
    try:
        points = [p for p in dist.entry_points if _GROUP_LIKE_OURS.fullmatch(p.group)]
    except Exception as error:
        header = _GROUP_HEADER.search(text)
        group = header.group().strip()[1:-1] if header else GROUP
        damaged = f"{name} {version}: entry_points.txt cannot be read: {format_error(error)}; reinstall it"
        yield PluginEntryPoint(name, version, group, "?", "?", location, requires_quire, damaged)
        return
    for point in points:
        entry = PluginEntryPoint(name, version, point.group, point.name, point.value, location, requires_quire)
        yield replace(entry, refusal=_reason_to_refuse(entry))


def _reason_to_refuse(entry: PluginEntryPoint) -> str | None:
    """Why this entry point may not be imported, judged by metadata alone."""
    versioned = _VERSIONED_GROUP.fullmatch(entry.group)
    dist_and_version = f"{entry.dist} {entry.version}"
    requirement = f" (it requires quire {entry.requires_quire})" if entry.requires_quire else ""
    if not versioned:
        return f"{dist_and_version}: entry-point group {entry.group!r} is never read; rename it to {GROUP!r}"
    if entry.group != GROUP:
        remedy = f"install a release of {entry.dist} for {GROUP}, or a quire that speaks {entry.group}"
        here = f"this is quire {__version__} with {GROUP}"
        return f"{dist_and_version}: written for plugin API {entry.group}{requirement}, {here}; {remedy}"
    if entry.requires_quire and not _is_satisfied(entry.requires_quire):
        remedy = f"install a release of {entry.dist} for this version, or another quire"
        return f"{dist_and_version}: requires quire {entry.requires_quire}, this is quire {__version__}; {remedy}"
    if not _ENTRY_VALUE.fullmatch(entry.value):
        point = f"entry point {entry.name} = {entry.value!r}"
        return f"{dist_and_version}: {point} is not a module or module:object; correct the spelling"
    return None


_ENTRY_VALUE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*(\s*:\s*[A-Za-z_]\w*(\.[A-Za-z_]\w*)*)?")


def _read_quire_requirement(dist: importlib.metadata.Distribution) -> str | None:
    """The range of Quire versions that ``dist`` declares, as written; None if it declares none."""
    from packaging.requirements import InvalidRequirement, Requirement

    for line in dist.requires or ():
        with contextlib.suppress(InvalidRequirement):
            requirement = Requirement(line)
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if normalize_dist_name(requirement.name) == PROJECT and applies:
                return str(requirement.specifier) or None
    return None


def _is_satisfied(specifier: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifier).contains(__version__, prereleases=True)


def _import_value(value: str) -> Any:
    module, _, attribute = (part.strip() for part in value.partition(":"))
    value_at_path = importlib.import_module(module)
    for name in filter(None, attribute.split(".")):
        value_at_path = getattr(value_at_path, name)
    return value_at_path


def _name_from_folder(dist: importlib.metadata.Distribution) -> str:
    """The name in the metadata folder's own name, for a distribution whose METADATA is missing or damaged."""
    path = getattr(dist, "_path", None)
    return Path(str(path)).name.split("-")[0] if path is not None else "unknown"


def _format_entry(entry: PluginEntryPoint) -> str:
    return f"{entry.dist} {entry.version} ({entry.name} = {entry.value})"
