"""The text of an answer as a tool-call parser reads it: it waits for more with ``yield``."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from functools import lru_cache
from typing import NamedTuple, TypeVar

__all__ = ["MalformedCallError", "MarkerMatch", "Markers", "Reading", "TextReader"]

T = TypeVar("T")

Reading = Generator[None, None, T]
"""A function that reads: each ``yield`` waits for more text, ``yield from`` calls another one."""


class MalformedCallError(Exception):
    """What began like a call is none. The text that was read for it is shown as it is: nothing is lost."""


class MarkerMatch(NamedTuple):
    """Where the first marker of a text begins, and which it is: empty if more text has to say, or if there is none."""

    start: int
    marker: str


class Markers:
    """A set of literal texts that are looked for together. Of two that begin at one place the longer is taken."""

    def __init__(self, *markers: str) -> None:
        self.texts, self._longest, self._any, self._first = _compile_markers(markers)

    def find_first(self, text: str, position: int, has_ended: bool) -> MarkerMatch:
        """The first marker at or after ``position``, or the place where one may begin that the text cuts."""
        possible = self._first.search(text, position)
        if possible is None:
            return MarkerMatch(len(text), "")
        match = self._any.search(text, possible.start())
        end = match.start() if match else len(text) - 1
        if not has_ended:
            start = max(possible.start(), len(text) - self._longest + 1)
            while (possible := self._first.search(text, start)) and (start := possible.start()) <= end:
                rest = text[start:]
                if any(len(marker) > len(rest) and marker.startswith(rest) for marker in self.texts):
                    return MarkerMatch(start, "")
                start += 1
        return MarkerMatch(match.start(), match.group()) if match else MarkerMatch(len(text), "")


class TextReader:
    """What has come of an answer and is not read yet: ``buffer`` from ``position`` on.

    Nothing that is decided depends on how the text was cut, if a parser decides by what it has read and waits where
    that is not enough. The functions that are ``Reading`` are called with ``yield from``.
    """

    __slots__ = ("_held", "buffer", "has_ended", "position")

    def __init__(self) -> None:
        self.buffer = ""
        self.position = 0
        self.has_ended = False
        """No more text will come."""
        self._held: list[str] | None = None

    def append_text(self, text: str) -> None:
        """Add what has come."""
        self.buffer = self.buffer[self.position :] + text
        self.position = 0

    def take(self, end: int) -> str:
        """Read up to ``end``, a place in ``buffer``."""
        text = self.buffer[self.position : end]
        self.position = end
        if self._held is not None:
            self._held.append(text)
        return text

    def hold(self) -> None:
        """From here on keep what is read, until ``release``."""
        self._held = []

    def release(self) -> str:
        """What was read since ``hold``; empty if nothing is kept."""
        text, self._held = "".join(self._held or ()), None
        return text

    def wait(self) -> Reading[None]:
        """Wait for more text. Raises MalformedCallError if the answer has ended."""
        if self.has_ended:
            raise MalformedCallError
        yield

    def peek(self) -> Reading[str]:
        """The next character, which is not read; empty at the end of the answer."""
        while self.position >= len(self.buffer):
            if self.has_ended:
                return ""
            yield
        return self.buffer[self.position]

    def skip_space(self) -> Reading[None]:
        """Read white space."""
        while True:
            match = _SPACE.match(self.buffer, self.position)
            assert match is not None
            self.take(match.end())
            if self.position < len(self.buffer) or self.has_ended:
                return
            yield

    def accept(self, *texts: str) -> Reading[str]:
        """Read the longest of ``texts`` that stands here; empty if none does."""
        longest = max(map(len, texts), default=0)
        while True:
            rest = self.buffer[self.position : self.position + longest]
            if self.has_ended or not any(len(text) > len(rest) and text.startswith(rest) for text in texts):
                break
            yield
        found = max((text for text in texts if rest.startswith(text)), key=len, default="")
        self.take(self.position + len(found))
        return found

    def copy_until(self, stops: Markers, emit: Callable[[str], object]) -> Reading[bool]:
        """Read up to the first of ``stops`` and give ``emit`` the text as it comes. False: the answer ended first."""
        while True:
            found = stops.find_first(self.buffer, self.position, self.has_ended)
            if found.start > self.position:
                emit(self.take(found.start))
            if found.marker or self.has_ended:
                return bool(found.marker)
            yield

    def read_until(self, *stops: str, max_chars: int = 1024) -> Reading[str]:
        """The text before the first of ``stops``, or before the end of the answer. Raises MalformedCallError if that
        is more than ``max_chars``."""
        pieces: list[str] = []
        length = 0

        def keep(piece: str) -> None:
            nonlocal length
            pieces.append(piece[: max_chars + 1])
            length += len(piece)
            if length > max_chars:
                raise MalformedCallError

        yield from self.copy_until(Markers(*stops), keep)
        return "".join(pieces)


@lru_cache(maxsize=1024)
def _compile_markers(markers: tuple[str, ...]) -> tuple[tuple[str, ...], int, re.Pattern[str], re.Pattern[str]]:
    """What ``Markers`` looks with. Every answer of a model looks for the same."""
    texts = tuple(sorted({m for m in markers if m}, key=len, reverse=True))
    any_text = re.compile("|".join(map(re.escape, texts)) or r"(?!)")
    first = re.compile("[" + "".join({re.escape(m[0]) for m in texts}) + "]" if texts else r"(?!)")
    return texts, max(map(len, texts), default=0), any_text, first


_SPACE = re.compile(r"\s*+")
