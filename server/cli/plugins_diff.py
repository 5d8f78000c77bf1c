"""``quire plugins diff`` and ``record``: what another version of Quire changes for one package."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quire.core.errors import PluginError
from quire.core.plugin.contract_record import ContractRecord, record_contracts
from quire.core.plugin.discovery import find_module_file
from quire.core.plugin.package_uses import PackageUses, compare_records
from quire.core.plugin.registry import GROUP
from quire.core.version import __version__

__all__ = ["add_diff_flags", "format_diff", "make_diff_report", "write_record"]

_RECORDS = Path(__file__).parents[2] / "core" / "assets" / "contracts"
_INSTALLED = "installed"


def add_diff_flags(diff: argparse.ArgumentParser, record: argparse.ArgumentParser) -> None:
    """The arguments of both commands."""
    for name in ("old", "new"):
        diff.add_argument(name, metavar=name.upper(), help=f"a version, {_INSTALLED!r}, or a file of plugins record")
    diff.add_argument("package", metavar="PACKAGE", help="an installed distribution, a folder or a file")
    diff.add_argument("--json", action="store_true", help="print one JSON document")
    record.add_argument("file", type=Path, metavar="FILE", help="file to write: this version's contracts as JSON")


def write_record(file: Path) -> str:
    """Write the contracts of this version; what was done, in words."""
    try:
        file.write_text(json.dumps(record_contracts(), indent=1, sort_keys=True) + "\n", "utf-8")
    except OSError as error:
        raise PluginError(f"{file} cannot be written: {error.strerror}") from None
    return f"wrote the contracts of quire {__version__} to {file}"


def make_diff_report(old: str, new: str, package: str) -> dict[str, Any]:
    """Changes that concern ``package``. Raises ``PluginError`` for what there is not."""
    before, after = _read_record(old), _read_record(new)
    files, root = _find_files(package)
    uses = PackageUses.from_files(files, root)
    changes = compare_records(before, after, uses)
    return {
        "old": old,
        "new": new,
        "package": package,
        "num_files": len(files),
        "num_names": len(uses.names) + len(uses.hooks),
        "changes": [asdict(change) for change in changes],
        "internal": [{"module": module, "where": where} for module, where in sorted(uses.internal.items())],
        "breaking": sum(change.verdict == "breaking" for change in changes),
    }


def format_diff(report: dict[str, Any]) -> str:
    """The report as lines."""
    lines = []
    for change in report["changes"]:
        lines.append(f"{change['verdict']:<12} {change['name']} {change['detail']} ({change['where']})")
    for each in report["internal"]:
        lines.append(f"{'internal':<12} {each['module']} promises nothing; use quire.sdk ({each['where']})")
    num_behavioural = len(report["changes"]) - report["breaking"]
    num_unchanged = max(report["num_names"] - len({change["name"] for change in report["changes"]}), 0)
    counts = f"{report['breaking']} breaking, {num_behavioural} behavioural, {num_unchanged} names unchanged"
    return "\n".join([*lines, f"{report['package']}, {report['old']} to {report['new']}: {counts}"])


def _read_record(name: str) -> ContractRecord:
    if name == _INSTALLED:
        return record_contracts()
    path = Path(name) if Path(name).suffix == ".json" else _RECORDS / f"{name}.json"
    try:
        record = json.loads(path.read_text("utf-8"))
    except OSError as error:
        if path.name == Path(name).name:
            raise PluginError(
                f"{name} cannot be read: {error.strerror}; quire plugins record FILE writes one"
            ) from None
        known = sorted(each.stem for each in _RECORDS.glob("*.json"))
        raise PluginError(
            f"there is no record of {name!r}; known are {', '.join([*known, _INSTALLED])}; under another version "
            f"quire plugins record FILE writes one"
        ) from None
    except ValueError as error:
        raise PluginError(f"{path} is no record of contracts: {error}") from None
    if not isinstance(record, dict) or not {"hooks", "contracts", "types", "calls", "names"} <= set(record):
        raise PluginError(f"{path} is no record of contracts; quire plugins record FILE writes one")
    return record


def _find_files(package: str) -> tuple[Sequence[Path], Path]:
    """The Python files of a distribution, a folder or a file, and what their names are relative to."""
    path = Path(package)
    if path.is_file():
        return [path], path.parent
    if path.is_dir():
        return sorted(path.rglob("*.py")), path
    try:
        dist = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise PluginError(f"{package!r} is neither an installed distribution nor a folder or file") from None
    files = [Path(str(each.locate())) for each in dist.files or () if each.suffix == ".py"]
    files = [file for file in files if not file.name.startswith("__editable__")]
    if files:
        return files, Path(str(dist.locate_file("")))
    return _find_editable_files(dist, package)


def _find_editable_files(dist: importlib.metadata.Distribution, package: str) -> tuple[Sequence[Path], Path]:
    """Of a distribution that leads to a folder elsewhere: the modules that its entry points name."""
    modules = {entry.value.partition(":")[0].partition(".")[0] for entry in dist.entry_points if entry.group == GROUP}
    files: list[Path] = []
    root = Path.cwd()
    for module in sorted(modules):
        if (found := find_module_file(module)) is not None:
            file = Path(found)
            root = file.parent.parent if file.name == "__init__.py" else file.parent
            files += sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]
    if not files:
        raise PluginError(f"{package} lists no Python files; name its folder")
    return files, root
