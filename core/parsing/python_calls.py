"""Calls that are written as Python: a list of function calls with keyword arguments."""

from __future__ import annotations

import ast
import contextlib
import json
import keyword
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quire.core.contracts.tool_parser import ArgumentFormat, CallFormat, ToolCalls, ToolParser
from quire.core.contracts.tool_parser_text import MalformedCallError, Reading, TextReader
from quire.core.errors import UnsupportedError
from quire.core.parsing.balanced import PYTHON_VALUE, copy_balanced
from quire.core.parsing.parameters import Parameter, list_parameters, list_types

__all__ = ["PythonicToolParser"]

_NAME = re.compile(r"[A-Za-z_][\w.\-]*")
_NOT_IN_NAMES = (*")[]{},;:='\"\n",)
_CONSTANTS = {"true": True, "false": False, "null": None}


class PythonicToolParser(ToolParser):
    """Calls are a Python list: ``[get_weather(city="Paris"), get_time()]``. A call is passed on when it is complete,
    since its arguments are values of Python until then."""

    end: tuple[str, ...] = ()
    """Texts that may follow the list."""
    argument_separator = ", "

    @property
    def begin(self) -> tuple[str, ...]:
        """None: a subclass names them, or has ``begin_first``."""
        return ()

    @property
    def markers(self) -> tuple[str, ...]:
        """``begin`` and ``end``."""
        return (*self.begin, *self.end)

    def parse_calls(self, text: TextReader, calls: ToolCalls) -> Reading[None]:
        """``begin``, the list, ``end``."""
        yield from text.accept(*self.begin)
        yield from text.skip_space()
        if not (yield from text.accept("[")):
            raise MalformedCallError
        while True:
            yield from text.skip_space()
            name = (yield from text.read_until("(", *_NOT_IN_NAMES, max_chars=256)).strip()
            if not _NAME.fullmatch(name) or (yield from text.peek()) != "(":
                raise MalformedCallError
            calls.check_name(name)
            pieces: list[str] = []
            yield from copy_balanced(text, PYTHON_VALUE, pieces.append)
            arguments = _evaluate_arguments("".join(pieces))
            calls.begin_call(name)
            calls.add_arguments(arguments)
            calls.end_call()
            yield from text.skip_space()
            if (yield from text.accept("]")):
                break
            if not (yield from text.accept(",")):
                raise MalformedCallError
        yield from text.skip_space()
        yield from text.accept(*self.end)

    def list_call_formats(self, name: str) -> Sequence[CallFormat]:
        """In a list: between ``begin`` and ``end`` where there are any, and alone where the answer may begin so."""
        formats = []
        for begin in (*self.begin[:1], *self.begin_first[:1]):
            before, after = ("[", "]") if begin == "[" else (f"{begin}[", f"]{self.end[0] if self.end else ''}")
            group = (before, ", ", after)
            formats.append(CallFormat(f"{before}{name}(", f"){after}", begin, group=group, is_first=begin == "["))
        return formats

    def format_arguments(self, schema: Mapping[str, Any]) -> Sequence[ArgumentFormat] | None:
        """Values are JSON, which is Python but for three constants."""
        formats = []
        for parameter in list_parameters(schema):
            if not parameter.name.isidentifier() or keyword.iskeyword(parameter.name):
                raise UnsupportedError(f"the parameter {parameter.name!r:.60} cannot be written in this syntax")
            values = tuple(_list_values(parameter))
            formats.append(ArgumentFormat(f"{parameter.name}=", "", values, is_required=parameter.is_required))
        return formats


def _list_values(parameter: Parameter) -> Iterator[Mapping[str, Any]]:
    """JSON, but for the constants that are written otherwise in Python, and strings between single quotes too."""
    for case in parameter.list_cases():
        kinds = list_types(case)
        if kinds == {"null"}:
            yield {"text": {"const": "None"}}
        elif kinds == {"boolean"} and not case.keys() & {"enum", "const"}:
            yield {"text": {"enum": ["True", "False"]}}
        else:
            yield {"json": case}
            if kinds == {"string"}:
                with contextlib.suppress(UnsupportedError):  # JSON alone
                    yield {"text": parameter.read_text(case), "quote": "'"}


def _evaluate_arguments(text: str) -> str:
    """``(a=1, b="x")`` as a JSON object."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of escapes that Python does not know
            node = ast.parse(f"f{text}", mode="eval").body
        if not isinstance(node, ast.Call) or node.args or not isinstance(node.func, ast.Name):
            raise MalformedCallError
        values = {_key_of(each): ast.literal_eval(_ReplaceConstants().visit(each.value)) for each in node.keywords}
        return json.dumps(values, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise MalformedCallError from None


def _key_of(keyword: ast.keyword) -> str:
    if keyword.arg is None:  # **values
        raise MalformedCallError
    return keyword.arg


class _ReplaceConstants(ast.NodeTransformer):
    """JSON's constants, which models mix in, as Python's."""

    def visit_Name(self, node: ast.Name) -> Any:
        """``true``, ``false`` and ``null``."""
        return ast.Constant(_CONSTANTS[node.id]) if node.id in _CONSTANTS else node
