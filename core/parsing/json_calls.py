"""Calls whose arguments are JSON: objects with a name in them, and names that stand before the arguments."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Sequence

from quire.core.contracts.tool_parser import CallFormat, ToolCalls, ToolParser
from quire.core.contracts.tool_parser_text import MalformedCallError, Reading, TextReader
from quire.core.parsing.balanced import JSON_VALUE, copy_balanced

__all__ = ["HeaderToolParser", "JsonToolParser"]

_OTHER_KEYS = ("type", "id", "tool_call_id")
_VALUE_STOPS = (",", "}", "]", "\n", " ", "<")
_MAX_SCALAR_CHARS = 64
_MAX_COUNTED = 16
"""Calls of one answer that may be counted where calls are enforced."""


class JsonToolParser(ToolParser):
    """Calls are objects with a name and arguments, alone or in a list, between ``begin`` and ``end``::

        <tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>

    Arguments may come before the name, be a string that holds JSON, be null or be missing.
    """

    end: tuple[str, ...] = ()
    """Texts that may end the calls, white space before them."""
    name_keys: tuple[str, ...] = ("name", "function")
    arguments_keys: tuple[str, ...] = ("arguments", "parameters")
    call_formats: tuple[tuple[str, str], ...] = ()
    """What stands before and after the object, or a list of objects, where a call is enforced. Without a text before
    it a call stands where the answer begins."""
    separator: str = ""
    """What stands between two objects of a list; empty where each call has its own begin and end."""

    @property
    def begin(self) -> tuple[str, ...]:
        """None: a subclass names them."""
        return ()

    @property
    def markers(self) -> tuple[str, ...]:
        """``begin`` and ``end``."""
        return (*self.begin, *self.end)

    def parse_calls(self, text: TextReader, calls: ToolCalls) -> Reading[None]:
        """``begin``, one or several objects, ``end``."""
        is_bare = not (yield from text.accept(*self.begin))
        yield from self.parse_objects(text, calls, is_bare)
        yield from text.skip_space()
        yield from text.accept(*self.end)

    def parse_objects(self, text: TextReader, calls: ToolCalls, is_bare: bool) -> Reading[None]:
        """One object, several with ``;`` or ``,`` between them, or a list. Without a begin before it (``is_bare``) an
        object with other keys is an answer in JSON."""
        yield from text.skip_space()
        is_list = yield from text.accept("[")
        while True:
            yield from text.skip_space()
            yield from self._parse_object(text, calls, is_bare)
            yield from text.skip_space()
            if is_list and (yield from text.accept("]")):
                return
            separated = yield from text.accept(",", ";")
            yield from text.skip_space()
            if (yield from text.peek()) != "{":
                if separated or is_list:
                    raise MalformedCallError
                return

    def list_call_formats(self, name: str) -> Sequence[CallFormat]:
        """As ``call_formats`` says."""
        keys = json.dumps(self.name_keys[0]), json.dumps(name, ensure_ascii=False), json.dumps(self.arguments_keys[0])
        call = f"{{{keys[0]}: {keys[1]}, {keys[2]}: "
        return [
            CallFormat(
                before + call,
                "}" + after,
                self.begin[0] if before else "{",
                group=(before, self.separator, after) if self.separator else None,
                is_first=not before,
            )
            for before, after in self.call_formats
        ]

    def _parse_object(self, text: TextReader, calls: ToolCalls, is_bare: bool) -> Reading[None]:
        if not (yield from text.accept("{")):
            raise MalformedCallError
        name = ""
        has_begun = False
        early: list[str] = []  # arguments that stand before the name
        while True:
            yield from text.skip_space()
            if (yield from text.accept("}")):
                break
            key = yield from _read_string(text)
            yield from text.skip_space()
            if not (yield from text.accept(":")):
                raise MalformedCallError
            yield from text.skip_space()
            if key in self.name_keys and not name and (yield from text.peek()) == '"':
                name = yield from _read_string(text)
                calls.check_name(name)
            elif key in self.arguments_keys and not has_begun:
                if name:
                    calls.begin_call(name)
                    has_begun = True
                yield from _copy_arguments(text, calls.add_arguments if name else early.append)
            elif is_bare and key not in _OTHER_KEYS:
                raise MalformedCallError
            else:
                yield from _copy_value(text, lambda piece: None)
            yield from text.skip_space()
            if not (yield from text.accept(",")):
                if (yield from text.accept("}")):
                    break
                if has_begun:
                    break  # what is wrong stands behind the arguments
                raise MalformedCallError
        if not name:
            raise MalformedCallError
        if not has_begun:
            calls.begin_call(name)
            for piece in early:
                calls.add_arguments(piece)
        calls.end_call()


class HeaderToolParser(ToolParser):
    """Calls are a header with the name, then the arguments as a JSON object::

    <|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{"city": "Paris"}<|tool_call_end|>
    """

    section_begin: tuple[str, ...] = ()
    """Texts that may begin a group of calls."""
    section_end: tuple[str, ...] = ()
    call_begin: tuple[str, ...] = ()
    """Texts that begin one call."""
    call_end: tuple[str, ...] = ()
    header: str = r"\s*(?P<name>[\w.\-]+)\s*"
    """A regular expression for what stands between ``call_begin`` and the arguments, with the groups ``name`` and, if
    the text has one, ``id``."""
    after_arguments: tuple[str, ...] = ()
    """Texts that may follow the arguments, such as the end of a code fence."""
    hidden_tokens: tuple[str, ...] = ()
    """Other texts of the header that may be special tokens."""
    call_formats: tuple[tuple[str, str], ...] = ()
    """What stands before and after the arguments where a call is enforced; ``{name}`` is the function's name, and
    ``{index}`` a number that the model counts."""
    call_separators: tuple[str, ...] = ("",)
    """What stands between two calls of a group, by form."""
    calls_end_answer: bool = False
    """Whether an answer ends with its first call."""

    @property
    def begin(self) -> tuple[str, ...]:
        """``section_begin`` and ``call_begin``."""
        return (*self.section_begin, *self.call_begin)

    @property
    def markers(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.begin, *self.section_end, *self.call_end, *self.after_arguments, *self.hidden_tokens)

    def parse_calls(self, text: TextReader, calls: ToolCalls) -> Reading[None]:
        """A group of calls, or one."""
        yield from text.accept(*self.section_begin)
        yield from text.skip_space()
        if not (yield from text.accept(*self.call_begin, *self.begin_first)):
            raise MalformedCallError
        while True:
            yield from self.parse_call(text, calls)
            yield from text.skip_space()
            if not (yield from text.accept(*self.call_begin)):
                break
        yield from text.accept(*self.section_end)

    def parse_call(self, text: TextReader, calls: ToolCalls) -> Reading[None]:
        """What follows ``call_begin``."""
        header = yield from text.read_until("{", *self.call_end, max_chars=256)
        match = re.fullmatch(self.header, header)
        first = yield from text.peek()
        if match is None or not first:
            raise MalformedCallError
        calls.begin_call(match["name"], match.groupdict().get("id"))
        if first == "{":
            yield from copy_balanced(text, JSON_VALUE, calls.add_arguments)
        yield from text.skip_space()
        if (yield from text.accept(*self.after_arguments)):
            yield from text.skip_space()
        yield from text.accept(*self.call_end)
        calls.end_call()

    def list_call_formats(self, name: str) -> Sequence[CallFormat]:
        """As ``call_formats`` says."""
        formats = []
        for (before, after), separator in zip(self.call_formats, itertools.cycle(self.call_separators), strict=False):
            named = before.replace("{name}", name)
            begin, *others = dict.fromkeys(named.replace("{index}", str(index)) for index in range(_MAX_COUNTED))
            group = None
            if self.section_begin and self.section_end:
                group = (self.section_begin[0], separator, self.section_end[0])
            formats.append(CallFormat(begin, after, self.begin[0], tuple(others), group, self.calls_end_answer))
        return formats


def _read_string(text: TextReader) -> Reading[str]:
    if (yield from text.peek()) != '"':
        raise MalformedCallError
    pieces: list[str] = []
    yield from copy_balanced(text, JSON_VALUE, pieces.append)
    return _decode_string("".join(pieces))


def _decode_string(text: str) -> str:
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        raise MalformedCallError from None
    if not isinstance(value, str):
        raise MalformedCallError
    return value


def _copy_arguments(text: TextReader, emit: Callable[[str], object]) -> Reading[None]:
    """Arguments as JSON text: an object as it comes, of a string what it holds, nothing for null."""
    first = yield from text.peek()
    if first == "{":
        yield from copy_balanced(text, JSON_VALUE, emit)
        return
    pieces: list[str] = []
    yield from _copy_value(text, pieces.append)
    value = "".join(pieces)
    if first == '"':
        with contextlib.suppress(MalformedCallError):  # of an answer that was cut: what there is of it
            value = _decode_string(value)
    emit("" if value == "null" else value)


def _copy_value(text: TextReader, emit: Callable[[str], object]) -> Reading[None]:
    if (yield from text.peek()) in ("{", "[", '"'):
        yield from copy_balanced(text, JSON_VALUE, emit)
        return
    emit((yield from text.read_until(*_VALUE_STOPS, max_chars=_MAX_SCALAR_CHARS)))
