"""Walks through answers while a schema is compiled, so that their masks are known when requests come to them.

Most masks between strings are the same for every answer of a schema, and each takes the library up to a millisecond. A
few answers that match are written here token by token, as a tokenizer would, and what the library says is remembered.
Nothing depends on it: an answer that comes to another place asks the library then.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import llguidance
import numpy as np

from quire.plugins.structured_output.grammar_state import GuidanceState
from quire.plugins.structured_output.string_ends import is_set
from quire.plugins.structured_output.string_tokens import StringTokens

__all__ = ["walk_answers"]

_NUM_ANSWERS = 2
_MAX_SECONDS = 0.03
"""Of processor time."""
_MAX_CHARS = 4096
"""Of the strings of an answer: each takes a state of the lexer."""
_SHORT_STRING = 4
_MAX_CHARS_AHEAD = 32
"""Before a string's end, where the walk looks what may end it."""
_LONGEST_TOKEN = 64
_ENDS = (b'"', b'",', b'", "', b'"}')
"""What a token may write from the closing quote on, if not all that is forced."""


def walk_answers(
    start: Callable[[], GuidanceState],
    schema: dict[str, Any],
    tokens: StringTokens,
    tokenizer: llguidance.LLTokenizer,
    yield_to_engine: Callable[[], None],
) -> None:
    """``start`` makes a ``GuidanceState`` at the begin of an answer, with a memory that others share;
    ``yield_to_engine`` is called between pieces of the work."""
    deadline = time.thread_time() + _MAX_SECONDS
    known: set[tuple[str | int, ...]] = set()
    for number in range(_NUM_ANSWERS):
        parts = tuple(_join(_write_value(schema, number)))
        if parts not in known and sum(part for part in parts if isinstance(part, int)) <= _MAX_CHARS:
            known.add(parts)
            with contextlib.suppress(RuntimeError):  # the library gives up: so it would where an answer comes there
                _Walk(start(), tokens, tokenizer, deadline, yield_to_engine).write_answer(parts)


class _Walk:
    def __init__(
        self,
        state: GuidanceState,
        tokens: StringTokens,
        tokenizer: llguidance.LLTokenizer,
        deadline: float,
        yield_to_engine: Callable[[], None],
    ) -> None:
        self._state = state
        self._tokens = tokens
        self._tokenizer = tokenizer
        self._deadline = deadline
        self._yield_to_engine = yield_to_engine
        self._mask = np.empty_like(tokens.without_closing)

    def write_answer(self, parts: tuple[str | int, ...]) -> None:
        """Texts, and numbers of characters of strings, as long as the grammar takes them."""
        for part in parts:
            is_written = self._write_chars(part) if isinstance(part, int) else self._write_text(part.encode())
            if not is_written:
                return

    def _write_text(self, text: bytes) -> bool:
        while text:
            self._yield_to_engine()
            if time.thread_time() > self._deadline:
                return False
            self._state.fill_mask(self._mask)
            token, data = self._choose_token(text)
            if not data or not self._state.advance([token]):
                return False
            text = text[len(data) :]
        return True

    def _write_chars(self, num_chars: int) -> bool:
        """The inside of a string, and a look at what may end it."""
        for count in (num_chars - min(num_chars, _MAX_CHARS_AHEAD), min(num_chars, _MAX_CHARS_AHEAD)):
            self._yield_to_engine()
            token_ids = self._tokens.split_chars(count)
            self._state.fill_mask(self._mask)
            if self._state.advance(token_ids) < len(token_ids):
                return False
            self._state.catch_up()
            self._state.look_ahead()
        for text in _ENDS:
            self._yield_to_engine()
            self._state.learn_ends((text,))
        return True

    def _choose_token(self, text: bytes) -> tuple[int, bytes]:
        """The next token, as the tokenizer would write the text if the mask lets it; else the longest that may come."""
        if forced := self._state.forced:
            data = self._tokens.decode(forced[0])
            return forced[0], data if text.startswith(data) else b""
        for end in (_LONGEST_TOKEN, *range(min(len(text), _LONGEST_TOKEN), 0, -1)):
            token = self._tokenizer.tokenize_bytes(text[:end])[0]
            if is_set(self._mask, token):
                return token, self._tokens.decode(token)
        return 0, b""


def _join(parts: Iterator[str | int]) -> Iterator[str | int]:
    text = ""
    for part in parts:
        if isinstance(part, int):
            yield text
            yield part
            text = ""
        else:
            text += part
    yield text


def _write_value(schema: Any, number: int) -> Iterator[str | int]:
    """The text of an answer that matches, if the schema is of the simple kind whose places are known; characters of
    strings are counted. Of its choices it takes the one with this ``number``."""
    if not isinstance(schema, dict):
        return
    choices = [schema["const"]] if "const" in schema else schema.get("enum")
    kind = schema.get("type")
    if choices:
        yield json.dumps(choices[number % len(choices)], ensure_ascii=False)
    elif kind == "object":
        yield "{"
        names = [name for name in schema.get("properties", {}) if not number % 2 or name in schema.get("required", ())]
        for index, name in enumerate(names):
            yield f"{', ' if index else ''}{json.dumps(name, ensure_ascii=False)}: "
            yield from _write_value(schema["properties"][name], number)
        yield "}"
    elif kind == "string":
        least = int(schema.get("minLength", 0))
        yield '"'
        yield max(least, min(_SHORT_STRING, int(schema.get("maxLength", _SHORT_STRING))))
        yield '"'
    elif kind == "boolean":
        yield ("true", "false")[number % 2]
    elif kind == "null":
        yield "null"
    else:
        yield str(schema.get("minimum", 1.5 if kind == "number" else 1))
