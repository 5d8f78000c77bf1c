"""Read a plugin's options from its source, for listings that may not import it."""

from __future__ import annotations

import ast
from pathlib import Path

from quire.core.plugin.discovery import find_module_file

__all__ = ["read_options"]


def read_options(target: str) -> list[str] | None:
    """The options of the class "module:Class" as ``name: type = default``, read from its file.

    Empty if it takes none; None if the file does not say (it is missing, or ``Options`` is imported or inherited).
    """
    module, _, name = target.partition(":")
    file = find_module_file(module)
    if file is None or not file.endswith(".py"):
        return None
    try:
        body = ast.parse(Path(file).read_text("utf-8")).body
    except (OSError, SyntaxError, ValueError):
        return None
    cls = _find_class(body, name)
    if cls is None:
        return None
    nested = _find_class(cls.body, "Options")
    if nested is not None:
        return _list_fields(nested)
    for statement in cls.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and _assigned_name(statement) == "Options":
            named = _find_class(body, statement.value.id) if isinstance(statement.value, ast.Name) else None
            return _list_fields(named) if named is not None else None
    return []


def _find_class(body: list[ast.stmt], name: str) -> ast.ClassDef | None:
    return next((s for s in body if isinstance(s, ast.ClassDef) and s.name == name), None)


def _list_fields(cls: ast.ClassDef) -> list[str]:
    return [
        ast.unparse(s) for s in cls.body if isinstance(s, ast.AnnAssign) and "ClassVar" not in ast.unparse(s.annotation)
    ]


def _assigned_name(statement: ast.Assign | ast.AnnAssign) -> str | None:
    target = statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]
    return target.id if isinstance(target, ast.Name) else None
