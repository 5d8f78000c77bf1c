"""Where a value ends: brackets and strings, counted as they come, each character looked at once."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from quire.core.contracts.tool_parser_text import Reading, TextReader

__all__ = ["JSON_VALUE", "PYTHON_VALUE", "BalancedSyntax", "copy_balanced"]

_DOUBLE = r'"(?:[^"\\]++|\\.)*+"'
_SINGLE = r"'(?:[^'\\]++|\\.)*+'"


@dataclass(frozen=True, slots=True)
class BalancedSyntax:
    """What stands between brackets: ``plain`` runs over text, whole strings and brackets around these; ``stops`` are no
    part of a value."""

    plain: re.Pattern[str]
    stops: str = ""


def _skip_balanced(text: str) -> re.Pattern[str]:
    """Runs over ``text``, patterns of plain text and of whole strings, and over brackets that hold nothing else."""
    return re.compile(rf"(?:{text}|\[(?:{text})*+\]|\{{(?:{text})*+\}})*+", re.DOTALL)


JSON_VALUE = BalancedSyntax(_skip_balanced(rf'[^"{{}}\[\]<`]++|{_DOUBLE}'), "<`")
"""JSON. Neither ``<`` nor a backquote can stand outside of its strings: there a value that is cut short has ended."""
PYTHON_VALUE = BalancedSyntax(_skip_balanced(rf"[^'\"(){{}}\[\]]++|{_DOUBLE}|{_SINGLE}"))
"""Python literals. Triple quotes count as they do: an empty string beside another."""

_STRING = {'"': re.compile(r'(?:[^"\\]++|\\.)*+', re.DOTALL), "'": re.compile(r"(?:[^'\\]++|\\.)*+", re.DOTALL)}
_QUOTES = "\"'"
_OPENINGS, _CLOSINGS = re.compile(r"[{\[(]++"), re.compile(r"[}\])]++")


def copy_balanced(text: TextReader, syntax: BalancedSyntax, emit: Callable[[str], object]) -> Reading[bool]:
    """Read the value in brackets or quotes that begins here, and give ``emit`` its text unchanged, as it comes.

    Nothing but the balance is checked. False if the value is cut short, by the end of the answer or by a stop.
    """
    depth, quote = 0, ""
    plain = syntax.plain.match
    while True:
        buffer, position = text.buffer, text.position
        length = len(buffer)
        ended = False
        while position < length and not ended:
            if quote:
                position = _STRING[quote].match(buffer, position).end()  # type: ignore[union-attr]
                if position == length or buffer[position] == "\\":
                    break  # inside of the string, perhaps before the second half of an escape
                quote = ""
                position += 1
                ended = depth == 0
                continue
            if depth:
                position = plain(buffer, position).end()  # type: ignore[union-attr]
                if position == length:
                    break
            char = buffer[position]
            if char in syntax.stops:
                if position > text.position:
                    emit(text.take(position))
                return False
            if char in _QUOTES:
                quote = char
                position += 1
            elif run := _OPENINGS.match(buffer, position):
                depth += run.end() - position
                position = run.end()
            else:
                run = _CLOSINGS.match(buffer, position)
                assert run is not None
                num_closed = min(run.end() - position, depth)
                depth -= num_closed
                position += num_closed
                ended = depth == 0
        if position > text.position:
            emit(text.take(position))
        if ended:
            return True
        if text.has_ended:
            if text.position < len(text.buffer):  # half of an escape
                emit(text.take(len(text.buffer)))
            return False
        yield
