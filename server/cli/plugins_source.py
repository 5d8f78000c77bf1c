"""Read a plugin's options from its source, for listings that may not import it."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

from quire.core.plugin.discovery import find_module_file

__all__ = ["OptionLine", "read_bases", "read_options"]


@dataclass(frozen=True, slots=True)
class OptionLine:
    """One option, as its author wrote it."""

    declaration: str
    """``name: type = default``."""
    meaning: str
    """The text below it, on one line; empty where there is none."""


def read_options(target: str, dataclass_name: str = "Options") -> list[OptionLine] | None:
    """The options of the class "module:Class", or what else is declared in a dataclass on it, read from its file.

    Empty if it takes none; None if the file does not say (it is missing, or the dataclass is imported or inherited).
    """
    module, _, name = target.partition(":")
    body = _read_module(module)
    cls = None if body is None else _find_class(body, name)
    if body is None or cls is None:
        return None
    nested = _find_class(cls.body, dataclass_name)
    if nested is not None:
        return _list_fields(nested)
    for statement in cls.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and _assigned_name(statement) == dataclass_name:
            named = _find_class(body, statement.value.id) if isinstance(statement.value, ast.Name) else None
            return _list_fields(named) if named is not None else None
    return []


def read_bases(target: str) -> list[str]:
    """The names of the classes that "module:Class" derives from, as its file has them, without their modules; empty
    where the file does not say."""
    module, _, name = target.partition(":")
    body = _read_module(module)
    cls = None if body is None else _find_class(body, name)
    return [] if cls is None else [ast.unparse(base).rpartition(".")[2] for base in cls.bases]


def _read_module(module: str) -> list[ast.stmt] | None:
    file = find_module_file(module)
    if file is None or not file.endswith(".py"):
        return None
    try:
        return ast.parse(Path(file).read_text("utf-8")).body
    except (OSError, SyntaxError, ValueError):
        return None


def _find_class(body: list[ast.stmt], name: str) -> ast.ClassDef | None:
    return next((s for s in body if isinstance(s, ast.ClassDef) and s.name == name), None)


def _list_fields(cls: ast.ClassDef) -> list[OptionLine]:
    lines = []
    for statement, following in zip(cls.body, [*cls.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and "ClassVar" not in ast.unparse(statement.annotation):
            lines.append(OptionLine(ast.unparse(statement), _read_text(following)))
    return lines


def _read_text(statement: ast.stmt | None) -> str:
    """What a string that stands alone says: the documentation of the field before it."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return " ".join(str(statement.value.value).split()) if isinstance(statement.value.value, str) else ""
    return ""


def _assigned_name(statement: ast.Assign | ast.AnnAssign) -> str | None:
    target = statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]
    return target.id if isinstance(target, ast.Name) else None
