"""Classes and functions as Markdown: exact signatures, docstrings, and what is description of each field."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

__all__ = ["class_text", "function_text", "prose", "signature_text"]

_WIDTH = 110


class _Source:
    """An annotation as it is written, without the quotes that ``inspect`` puts around one."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def signature_text(function: Callable[..., Any]) -> str:
    """``(self, request: Request) -> bool``: the signature as ``inspect`` has it, annotations as they are written."""
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=_unquoted(p.annotation)) for p in signature.parameters.values()]
    changed = signature.replace(parameters=parameters, return_annotation=_unquoted(signature.return_annotation))
    return re.sub(r"<class '(?:builtins\.)?([\w.]+)'>", r"\1", str(changed))


def _unquoted(annotation: Any) -> Any:
    return _Source(annotation) if isinstance(annotation, str) else annotation


def function_text(function: Callable[..., Any], name: str, *, heading: str | None, note: str = "") -> str:
    """A function: heading, signature, docstring. Without a heading the signature alone."""
    block = f"```python\n{_wrapped(name, function)}\n```"
    if heading is None:
        return block
    parts = [f"{heading} `{name.rpartition('.')[2] if heading == '##' else name}`", block, note]
    inherited = name.endswith("__init__") and not function.__doc__  # inspect would take object's
    doc = "" if inherited else prose(inspect.getdoc(function) or "")
    return "\n\n".join([*filter(None, parts), doc]).rstrip()


def _wrapped(name: str, function: Callable[..., Any]) -> str:
    header = f"def {name.rpartition('.')[2]}{signature_text(function)}"
    if len(header) <= _WIDTH:
        return header
    signature = inspect.signature(function)
    parameters = [
        str(parameter.replace(annotation=_unquoted(parameter.annotation)))
        for parameter in signature.parameters.values()
    ]
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        parameters.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    body = "".join(f"    {parameter},\n" for parameter in parameters)
    arrow = header[header.rindex(")") :]
    return f"def {name.rpartition('.')[2]}(\n{body}{arrow}"


def class_text(cls: type, *, heading: str, members: bool = True) -> str:
    """A class: its docstring, its fields, and its public methods and properties."""
    bases = ", ".join(base.__name__ for base in cls.__bases__ if base is not object and base.__name__ != "ABC")
    header = f"class {cls.__name__}({bases})" if bases else f"class {cls.__name__}"
    if dataclasses.is_dataclass(cls):
        frozen = "(frozen=True)" if cls.__dataclass_params__.frozen else ""  # type: ignore[attr-defined]
        header = f"@dataclass{frozen}\n{header}"
    parts = [f"{heading} `{cls.__name__}`", f"```python\n{header}\n```", prose(_own_doc(cls))]
    if members:
        fields = [field.text() for field in _fields(cls)]
        parts += ["\n".join(fields)] if fields else []
        parts += [_member_text(cls, name, value, heading + "#") for name, value in _methods(cls)]
    return "\n\n".join(filter(None, parts))


def _own_doc(cls: type) -> str:
    text = cls.__doc__ or ""
    return "" if text.startswith(f"{cls.__name__}(") else inspect.cleandoc(text)  # dataclass makes one of its signature


def _methods(cls: type) -> Iterator[tuple[str, Any]]:
    for name, value in vars(cls).items():
        own_init = name == "__init__" and not dataclasses.is_dataclass(cls) and not getattr(cls, "_is_protocol", False)
        if name.startswith("_") and not own_init:
            continue
        if isinstance(value, (property, classmethod, staticmethod)) or inspect.isfunction(value):
            yield name, value


def _member_text(cls: type, name: str, value: Any, heading: str) -> str:
    notes = []
    if name in getattr(cls, "__abstractmethods__", ()):
        notes.append("abstract")
    for kind, word in ((classmethod, "class method"), (staticmethod, "static method"), (property, "property")):
        if isinstance(value, kind):
            notes.append(word)
    function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    note = f"*{', '.join(notes)}*" if notes else ""
    return function_text(function, f"{cls.__name__}.{name}", heading=heading, note=note)


class _Field(NamedTuple):
    declaration: str
    shape: str
    doc: str

    def text(self) -> str:
        """As an item of a list."""
        description = ". ".join(prose(part) for part in (self.shape, self.doc) if part)
        description = re.sub(r"\s*\n\s*", " ", description)
        return f"- `{self.declaration}`" + (f": {description}" if description else "")


def _fields(cls: type) -> Iterator[_Field]:
    """Annotated attributes in the order of the source, with the comment behind each and the docstring below it."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):
        return
    definition = ast.parse(source).body[0]
    lines = source.splitlines()
    body = definition.body if isinstance(definition, ast.ClassDef) else []
    for statement, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or ast.unparse(statement.target).startswith("_"):
            continue
        behind = lines[statement.end_lineno - 1][statement.end_col_offset :]  # type: ignore[operator]
        comment = re.match(r"\s*#\s*(?!type:|noqa)(.*)", behind)
        doc = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            doc = inspect.cleandoc(str(following.value.value))
        yield _Field(ast.unparse(statement), comment[1] if comment else "", doc)


def prose(text: str) -> str:
    """A docstring as Markdown: its double backticks become single ones, its indented blocks code."""
    text = inspect.cleandoc(text) + "\n"
    text = re.sub(r"((?:^>>> .*\n)+)", r"```python\n\1```\n", text, flags=re.M).rstrip()
    text = re.sub(r"``(.+?)``", r"`\1`", text)
    text = re.sub(r"::$", ":", text, flags=re.M)
    return re.sub(r"(?<!`)<(?=[A-Za-z/])", r"&lt;", text)
