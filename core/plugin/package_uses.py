"""What a package uses of the plugin API, read from its files without importing it, and what another version changes."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from quire.core.errors import PluginError
from quire.core.plugin.contract_record import ContractRecord, has_grown
from quire.core.plugin.registry import PROJECT

__all__ = ["ApiChange", "PackageUses", "compare_records"]

Verdict = Literal["breaking", "behavioural"]


@dataclass(frozen=True, slots=True)
class ApiChange:
    """One change between two versions that a package is concerned by."""

    verdict: Verdict
    """``breaking``: it does not work as it stands; ``behavioural``: what is promised has changed in words."""
    name: str
    detail: str
    where: str
    """File and line of the first use."""


@dataclass(slots=True)
class PackageUses:
    """Names of Quire by the module that they are imported from, with the place of the first use, and what is done with
    them as far as the text tells."""

    names: dict[tuple[str, str], str] = field(default_factory=dict)
    methods: dict[str, dict[str, str]] = field(default_factory=dict)
    """By class of the API: methods that subclasses define, and where."""
    attributes: dict[str, str] = field(default_factory=dict)
    """Every ``.attribute`` and keyword argument, whatever it is of."""
    hooks: dict[str, str] = field(default_factory=dict)
    internal: dict[str, str] = field(default_factory=dict)
    """Modules that promise nothing."""

    @classmethod
    def from_files(cls, files: Iterable[Path], root: Path) -> PackageUses:
        """Read Python files, named relative to ``root``. Raises ``PluginError`` for one that cannot be read."""
        uses = cls()
        for path in files:
            try:
                tree = ast.parse(path.read_text("utf-8"))
            except (OSError, SyntaxError, ValueError) as error:
                raise PluginError(f"{path} cannot be read: {error}") from None
            uses._read_module(tree, str(path.relative_to(root)) if path.is_relative_to(root) else str(path))
        return uses

    def _read_module(self, tree: ast.Module, file: str) -> None:
        local: dict[str, str] = {}  # what a name of the module is called in the API
        for node in ast.walk(tree):
            where = f"{file}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ImportFrom) and _is_of_quire(node.module):
                self._read_import(str(node.module), node.names, local, where)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if _is_of_quire(alias.name):
                        self._note_module(alias.name, where)
            elif isinstance(node, ast.Attribute):
                self.attributes.setdefault(node.attr, where)
            elif isinstance(node, ast.keyword) and node.arg:
                self.attributes.setdefault(node.arg, where)
            elif isinstance(node, ast.FunctionDef) and node.name.startswith("quire_"):
                self.hooks.setdefault(node.name, where)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                for base in node.bases:
                    name = base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "")
                    methods = self.methods.setdefault(local.get(name, name), {})
                    for member in node.body:
                        if isinstance(member, ast.FunctionDef):
                            methods.setdefault(member.name, f"{file}:{member.lineno}")

    def _read_import(self, module: str, names: list[ast.alias], local: dict[str, str], where: str) -> None:
        self._note_module(module, where)
        for alias in names:
            self.names.setdefault((module, alias.name), where)
            local[alias.asname or alias.name] = alias.name

    def _note_module(self, module: str, where: str) -> None:
        if module != PROJECT and not module.startswith((f"{PROJECT}.sdk", f"{PROJECT}.testing")):
            self.internal.setdefault(module, where)


def compare_records(old: ContractRecord, new: ContractRecord, uses: PackageUses) -> list[ApiChange]:
    """What ``new`` changes for a package that was written for ``old``, what breaks first."""
    changes: list[ApiChange] = []
    for (module, name), where in uses.names.items():
        if name in old["names"].get(module, ()) and name not in new["names"].get(module, ()):
            changes.append(ApiChange("breaking", f"{module}.{name}", "is gone", where))
    for hook, where in uses.hooks.items():
        changes += _compare_hook(hook, old["hooks"].get(hook), new["hooks"].get(hook), where)
    touched = {name: where for (_, name), where in uses.names.items()}
    for section in ("contracts", "types", "calls"):
        before, after = _by_name(old[section]), _by_name(new[section])
        for name, members in before.items():
            if name in touched and name in after:
                changes += _compare_members(name, members, after[name], section, uses, touched[name])
    changes += _compare_docs(old.get("docs", {}), new.get("docs", {}), uses, touched)
    broken = {change.name for change in changes if change.verdict == "breaking"}
    changes = [each for each in changes if each.verdict == "breaking" or each.name not in broken]
    return sorted(changes, key=lambda change: (change.verdict != "breaking", change.name))


def _compare_hook(name: str, old: Any, new: Any, where: str) -> list[ApiChange]:
    if old is None:
        return []
    if new is None:
        return [ApiChange("breaking", name, "is no hook any more", where)]
    if lost := [each for each in old["arguments"] if each not in new["arguments"]]:
        return [ApiChange("breaking", name, f"is not given {', '.join(lost)} any more", where)]
    return []


def _compare_members(
    name: str, old: Mapping[str, str], new: Mapping[str, str], section: str, uses: PackageUses, where: str
) -> list[ApiChange]:
    changes = []
    written = uses.methods.get(name, {})
    for member, text in old.items():
        now, place = new.get(member), written.get(member) or uses.attributes.get(member)
        whole = f"{name}.{member}" if member else name
        if member in ("", "__init__"):
            place = where
        if place is None or now == text:
            continue
        if now is None:
            changes.append(ApiChange("breaking", whole, "is gone", place))
        elif member in written and member != "__init__" and _arguments(now) != _arguments(text):
            detail = f"is called as {_arguments(now)}, was {_arguments(text)}"
            changes.append(ApiChange("breaking", whole, detail, place))
        elif section != "types" and not has_grown(_arguments(text), _arguments(now)):
            changes.append(ApiChange("breaking", whole, f"is {now}, was {text}", place))
    is_derived_from = bool(written) or name in uses.methods
    for member, text in new.items():
        if member not in old and is_derived_from and text.startswith("abstract ") and member not in written:
            changes.append(ApiChange("breaking", f"{name}.{member}", "is new, and has to be written", where))
        if member not in old and section == "types" and text == "required":
            changes.append(ApiChange("breaking", f"{name}.{member}", "is new, and has to be given", where))
    return changes


def _compare_docs(
    old: Mapping[str, str], new: Mapping[str, str], uses: PackageUses, touched: Mapping[str, str]
) -> list[ApiChange]:
    changes = []
    for whole, digest in old.items():
        name, _, member = whole.rpartition(":")[2].partition(".")
        if whole in uses.hooks:
            place: str | None = uses.hooks[whole]
        elif name not in touched:
            continue
        else:
            place = uses.methods.get(name, {}).get(member) or uses.attributes.get(member) if member else touched[name]
        if place is not None and new.get(whole, digest) != digest:
            text = "what is promised of it is written anew: read its docstring"
            changes.append(ApiChange("behavioural", f"{name}.{member}" if member else name, text, place))
    return changes


def _by_name(section: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    return {where.rpartition(":")[2]: members for where, members in section.items()}


def _arguments(text: str) -> str:
    return text.removeprefix("abstract ")


def _is_of_quire(module: str | None) -> bool:
    return (module or "").partition(".")[0] == PROJECT
