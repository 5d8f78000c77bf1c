"""Calls whose parameters stand between tags, each by itself; their values become JSON by the types of the schema."""

from __future__ import annotations

import ast
import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quire.core.contracts.tool_parser import ArgumentFormat, CallFormat, ToolCalls, ToolParser
from quire.core.contracts.tool_parser_text import MalformedCallError, Markers, Reading, TextReader
from quire.core.errors import UnsupportedError
from quire.core.parsing.parameters import Parameter, list_parameters, list_types

__all__ = ["XmlToolParser"]


class XmlToolParser(ToolParser):
    """A name, then keys and values between tags::

        <tool_call><function=get_weather><parameter=city>Paris</parameter></function></tool_call>

    A value whose schema says ``string`` is passed on as it comes, others when they are complete. A value that is not
    of its type stays a string.
    """

    call_begin: tuple[str, ...] = ()
    """Texts that may begin a call; where one is also ``name_begin``, the call may begin with the name."""
    name_begin: str = ""
    name_end: tuple[str, ...] = ()
    """Texts that end the name. What begins a key or ends the call is not read with it."""
    key_begin: str = ""
    key_end: str = ""
    value_begin: str = ""
    value_end: str = ""
    strips_newlines: bool = False
    """Whether a line break after ``value_begin`` and one before ``value_end`` are no part of the value."""
    arguments_end: tuple[str, ...] = ()
    call_end: tuple[str, ...] = ()
    call_format: tuple[str, str] = ("", "")
    """What stands before and after the arguments where a call is enforced; ``{name}`` is the function's name."""
    argument_format: tuple[str, str] = ("", "")
    """The same for a value; ``{key}`` is the parameter's name."""

    @property
    def begin(self) -> tuple[str, ...]:
        """``call_begin``, and the name where it has a begin of its own."""
        return (*self.call_begin, self.name_begin) if self.name_begin else self.call_begin

    @property
    def markers(self) -> tuple[str, ...]:
        """All of them."""
        tags = tuple(filter(None, (self.key_begin, self.key_end, self.value_begin, self.value_end)))
        return (*self.begin, *self.name_end, *tags, *self.arguments_end, *self.call_end)

    def parse_calls(self, text: TextReader, calls: ToolCalls) -> Reading[None]:
        """One call."""
        yield from text.accept(*self.call_begin)
        yield from text.skip_space()
        if self.name_begin and not (yield from text.accept(self.name_begin)):
            raise MalformedCallError
        name = yield from text.read_until(*self.name_end, self.key_begin, *self.call_end, max_chars=256)
        if not (yield from text.peek()):
            raise MalformedCallError  # it may be the beginning of a name
        name = name.strip()
        calls.begin_call(name)
        yield from text.accept(*(each for each in self.name_end if each not in (self.key_begin, *self.call_end)))
        opening = "{"
        while True:
            yield from text.skip_space()
            if not (yield from text.accept(self.key_begin)):
                break
            key = (yield from text.read_until(self.key_end)).strip()
            yield from text.accept(self.key_end)
            if self.value_begin:
                yield from text.skip_space()
                yield from text.accept(self.value_begin)
            calls.add_arguments(f"{opening}{json.dumps(key, ensure_ascii=False)}: ")
            if not (yield from self._copy_value(text, calls, calls.find_parameter(name, key))):
                raise MalformedCallError  # the answer ended inside of the value
            opening = ", "
        calls.add_arguments("}" if opening != "{" else "{}")
        if (yield from text.accept(*self.arguments_end)):
            yield from text.skip_space()
        yield from text.accept(*self.call_end)
        calls.end_call()

    def list_call_formats(self, name: str) -> Sequence[CallFormat]:
        """As ``call_format`` says."""
        before, after = self.call_format
        return [CallFormat(before.replace("{name}", name), after, self.begin[0])] if before else []

    def format_arguments(self, schema: Mapping[str, Any]) -> Sequence[ArgumentFormat] | None:
        """Strings are written without quotes, all else as JSON."""
        before, after = self.argument_format
        formats = []
        for parameter in list_parameters(schema):
            if self.key_end in parameter.name or parameter.name != parameter.name.strip():
                raise UnsupportedError(f"the parameter {parameter.name!r:.60} cannot be written in this syntax")
            begin = before.replace("{key}", parameter.name)
            formats.append(
                ArgumentFormat(begin, after, tuple(_list_values(parameter)), self.value_end, parameter.is_required)
            )
        return formats

    def _copy_value(self, text: TextReader, calls: ToolCalls, schema: Mapping[str, Any] | None) -> Reading[bool]:
        """Read a value and its end. False: the answer ended first."""
        stops = Markers(self.value_end)
        if self.strips_newlines:
            stops = Markers("\n" + self.value_end, self.value_end)
            yield from text.accept("\n")
        types = list_types(schema)
        if types == {"string"}:
            calls.add_arguments('"')
            is_complete = yield from text.copy_until(stops, lambda piece: calls.add_arguments(_escape_json(piece)))
            if is_complete:
                calls.add_arguments('"')
        else:
            pieces: list[str] = []
            is_complete = yield from text.copy_until(stops, pieces.append)
            calls.add_arguments(_convert_value("".join(pieces), types))
        yield from text.accept(*stops.texts)
        return is_complete


def _escape_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _list_values(parameter: Parameter) -> Iterator[Mapping[str, Any]]:
    """The forms of a value that ``_convert_value`` reads as one of the parameter's schema."""
    schema, types = parameter.schema, list_types(parameter.schema)
    cases = [case for case in parameter.list_cases() if list_types(case) != {"null"}]
    if types <= {"string"}:
        yield from ({"text": parameter.read_text(case)} for case in cases)
        return
    if types == {"string", "null"}:
        with contextlib.suppress(UnsupportedError):  # JSON alone
            texts = [parameter.read_text(case) for case in cases]
            if {} in texts:  # whatever is written, null too
                yield {"text": {}}
                return
            values = [text.get("enum", [text["const"]] if "const" in text else [0]) for text in texts]
            if all(_convert_value(str(value), types) == json.dumps(value) for each in values for value in each):
                yield from ({"text": {"enum": each}} for each in values)
                yield {"text": {"const": "null"}}
                return
    yield {"json": schema}


def _convert_value(text: str, types: set[str]) -> str:
    """A value as JSON text: as it is if that is JSON of one of ``types``, or a Python literal, else a string."""
    stripped = text.strip()
    for read in (_read_json, ast.literal_eval):
        try:
            value = read(stripped)
            encoded = stripped if read is _read_json else json.dumps(value, ensure_ascii=False, allow_nan=False)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
        if (types or not isinstance(value, str)) and _is_of(value, types):
            return encoded
    return json.dumps(text, ensure_ascii=False)


def _read_json(text: str) -> Any:
    return json.loads(text, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _is_of(value: Any, types: set[str]) -> bool:
    kind = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    name = "null" if value is None else kind.get(type(value), "")
    if not types:
        return bool(name)
    return name in types or (name == "integer" and "number" in types) or (name == "number" and types == {"integer"})
