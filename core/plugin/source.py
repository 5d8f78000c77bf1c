"""What the source of a plugin's class says, for those who may not import it: listings, and a first look at options."""

from __future__ import annotations

import ast
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.core.plugin.discovery import find_module_file

__all__ = ["OptionLine", "list_classes", "read_bases", "read_options"]

_MAX_IMPORTS = 8
_TYPES = {"int": int, "float": float, "str": str, "bool": bool, "Path": Path, "None": None}
_WITHOUT_OPTIONS = ("ABC", "Generic", "Protocol", "object")


@dataclass(frozen=True, slots=True)
class OptionLine:
    """One option, as its author wrote it."""

    name: str
    declaration: str
    """``name: type = default``."""
    meaning: str
    """The text below it, on one line; empty where there is none."""
    type_hint: Any
    """Its annotation, where that is made of builtin types, paths and literals; else None."""
    is_required: bool


@dataclass(frozen=True, slots=True)
class _ClassSource:
    """A class, and the module whose names it sees."""

    module: str
    body: list[ast.stmt]
    definition: ast.ClassDef


def read_options(target: str, dataclass_name: str = "Options") -> list[OptionLine] | None:
    """The options of the class "module:Class", or what else is declared in a dataclass on it, read from its file and
    those of its bases.

    Empty if it takes none; None if the files do not say: one is missing, or the dataclass is made by what runs.
    """
    module, _, name = target.partition(":")
    cls = _find_class(module, name)
    return None if cls is None else _read_dataclass(cls, dataclass_name)


def read_bases(target: str) -> list[str]:
    """The names of the classes that "module:Class" derives from, as its file has them, without their modules; empty
    where the file does not say."""
    module, _, name = target.partition(":")
    cls = _find_class(module, name)
    return [] if cls is None else [ast.unparse(base).rpartition(".")[2] for base in cls.definition.bases]


def list_classes(file: str) -> list[str]:
    """The public classes that ``file`` defines and that derive from something; none where it cannot be read."""
    try:
        body = ast.parse(Path(file).read_text(encoding="utf-8")).body
    except (OSError, SyntaxError, ValueError):
        return []
    return [each.name for each in body if isinstance(each, ast.ClassDef) and each.bases and each.name[0] != "_"]


def _read_dataclass(cls: _ClassSource, name: str) -> list[OptionLine] | None:
    nested = _find_definition(cls.definition.body, name)
    if nested is not None:
        return _list_fields(_ClassSource(cls.module, cls.body, nested))
    for statement in cls.definition.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and _assigned_name(statement) == name:
            if isinstance(statement.value, ast.Constant) and statement.value.value is None:
                return []
            assigned = None if statement.value is None else _resolve(cls, statement.value)
            return None if assigned is None else _list_fields(assigned)
    for base in _list_bases(cls):
        inherited = None if base is None else _read_dataclass(base, name)
        if inherited is None or inherited:
            return inherited
    return []


def _list_fields(cls: _ClassSource) -> list[OptionLine] | None:
    """The fields of a dataclass, those of its bases first."""
    fields: dict[str, OptionLine] = {}
    for base in _list_bases(cls):
        inherited = None if base is None else _list_fields(base)
        if inherited is None:
            return None
        fields.update({field.name: field for field in inherited})
    body = cls.definition.body
    for statement, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        keywords = _list_field_keywords(statement.value)
        if "ClassVar" not in ast.unparse(statement.annotation) and keywords.get("init", True):
            name, hint = statement.target.id, _read_type(statement.annotation)
            has_default = statement.value is not None and (not keywords or any("default" in key for key in keywords))
            fields[name] = OptionLine(name, ast.unparse(statement), _read_text(following), hint, not has_default)
    return list(fields.values())


def _list_field_keywords(value: ast.expr | None) -> dict[str, Any]:
    """Of ``dataclasses.field(...)``: its arguments, as far as they are constants."""
    if not isinstance(value, ast.Call) or ast.unparse(value.func).rpartition(".")[2] != "field":
        return {}
    return {str(each.arg): getattr(each.value, "value", True) for each in value.keywords}


def _list_bases(cls: _ClassSource) -> Iterator[_ClassSource | None]:
    """The bases that are no contract, None for one whose source is not found."""
    for base in cls.definition.bases:
        expression = base.value if isinstance(base, ast.Subscript) else base
        if ast.unparse(expression).rpartition(".")[2] in _WITHOUT_OPTIONS or _is_contract(cls, expression):
            continue
        yield _resolve(cls, expression)


def _is_contract(cls: _ClassSource, base: ast.expr) -> bool:
    if not isinstance(base, ast.Name):
        return ast.unparse(base).startswith("quire.sdk.")
    imported = _find_import(cls.module, cls.body, base.id)
    return imported is not None and imported[0].startswith(("quire.sdk", "quire.core.contracts."))


def _resolve(cls: _ClassSource, expression: ast.expr) -> _ClassSource | None:
    """The class that ``expression`` stands for: a name, or a class on one."""
    if isinstance(expression, ast.Name):
        return _find_class(cls.module, expression.id)
    if isinstance(expression, ast.Attribute) and (owner := _resolve(cls, expression.value)) is not None:
        nested = _find_definition(owner.definition.body, expression.attr)
        return None if nested is None else _ClassSource(owner.module, owner.body, nested)
    return None


def _find_class(module: str, name: str, max_imports: int = _MAX_IMPORTS) -> _ClassSource | None:
    """The class ``name`` of a module, which may only import it."""
    body = _read_module(module)
    if body is None:
        return None
    first, *nested = name.split(".")
    definition = _find_definition(body, first)
    if definition is None:
        imported = _find_import(module, body, first)
        if imported is None or not max_imports or nested:
            return None
        return _find_class(*imported, max_imports - 1)
    for part in nested:
        definition = None if definition is None else _find_definition(definition.body, part)
    return None if definition is None else _ClassSource(module, body, definition)


def _find_import(module: str, body: list[ast.stmt], name: str) -> tuple[str, str] | None:
    """From which module ``name`` is imported, and what it is called there."""
    for statement in body:
        if isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    return _absolute_module(module, statement), alias.name
    return None


def _absolute_module(module: str, statement: ast.ImportFrom) -> str:
    if not statement.level:
        return statement.module or ""
    file = find_module_file(module) or ""
    num_left = statement.level - (1 if Path(file).name == "__init__.py" else 0)
    parts = module.split(".")
    return ".".join([*parts[: len(parts) - num_left], *filter(None, [statement.module])])


def _read_module(module: str) -> list[ast.stmt] | None:
    file = find_module_file(module)
    if file is None or not file.endswith(".py"):
        return None
    try:
        return ast.parse(Path(file).read_text("utf-8")).body
    except (OSError, SyntaxError, ValueError):
        return None


def _find_definition(body: list[ast.stmt], name: str) -> ast.ClassDef | None:
    return next((s for s in body if isinstance(s, ast.ClassDef) and s.name == name), None)


def _read_type(annotation: ast.expr) -> Any:
    try:
        return _make_type(annotation)
    except (KeyError, ValueError, SyntaxError, TypeError):
        return None


def _make_type(annotation: ast.expr) -> Any:
    """Raises KeyError or ValueError for what it does not know."""
    if isinstance(annotation, ast.Constant):
        if isinstance(annotation.value, str):
            return _make_type(ast.parse(annotation.value, mode="eval").body)
        return _TYPES[str(annotation.value)]
    if isinstance(annotation, ast.Name):
        return _TYPES[annotation.id]
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return typing.Union[_make_type(annotation.left), _make_type(annotation.right)]  # noqa: UP007
    if isinstance(annotation, ast.Subscript):
        generic = ast.unparse(annotation.value).rpartition(".")[2]
        inside = annotation.slice
        members = inside.elts if isinstance(inside, ast.Tuple) else [inside]
        if generic == "Literal":
            return typing.Literal[tuple(ast.literal_eval(each) for each in members)]
        if generic == "Optional":
            return typing.Optional[_make_type(inside)]  # noqa: UP045
        if generic == "tuple" and len(members) == 2 and ast.unparse(members[1]) == "...":
            return tuple[_make_type(members[0]), ...]  # type: ignore[misc]
    raise ValueError(ast.unparse(annotation))


def _read_text(statement: ast.stmt | None) -> str:
    """What a string that stands alone says: the documentation of the field before it."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return " ".join(str(statement.value.value).split()) if isinstance(statement.value.value, str) else ""
    return ""


def _assigned_name(statement: ast.Assign | ast.AnnAssign) -> str | None:
    target = statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]
    return target.id if isinstance(target, ast.Name) else None
