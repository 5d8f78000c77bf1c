"""Tool-call parser: finds the calls in a family's answers, while they are written."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from quire.core.contracts.tool_parser_text import Reading, TextReader

__all__ = ["CallFormat", "ToolCalls", "ToolParser"]


@dataclass(frozen=True, slots=True)
class CallFormat:
    """How a call of one function is written: ``begin``, its arguments as one JSON object, ``end``."""

    begin: str
    end: str
    trigger: str
    """The beginning of ``begin`` that no other text of an answer has."""


class ToolCalls(Protocol):
    """Where a parser puts the calls that it finds. A call that was begun is the client's: it cannot be taken back."""

    def check_name(self, name: str) -> None:
        """Raise MalformedCallError if the request has no function of this name."""

    def find_parameter(self, name: str, parameter: str) -> Mapping[str, Any] | None:
        """The JSON schema of a parameter of a function; None if its schema does not name it."""

    def begin_call(self, name: str, call_id: str | None = None) -> None:
        """A call begins, with its whole name. Raises MalformedCallError if the request has no such function."""

    def add_arguments(self, text: str) -> None:
        """More of the arguments of the call: JSON text, as it comes."""

    def end_call(self) -> None:
        """The call is complete. What is read from here on belongs to the next, or to none."""


class ToolParser(ABC):
    """How a family of models writes calls. One object serves every answer: it keeps nothing of them.

    A family whose syntax is a usual one derives from ``JsonToolParser``, ``HeaderToolParser``, ``XmlToolParser`` or
    ``PythonicToolParser`` and sets a few attributes; any other writes ``parse_calls``. Called in the API process, on
    its event loop. What a parser reads and does not begin a call with is shown as text. One that raises something
    else than MalformedCallError, or does not return, is quarantined, and the text is shown as it is.
    """

    begin_first: tuple[str, ...] = ()
    """Texts that begin calls only where they begin the answer, such as a bare ``{``."""

    example: str = ""
    """A whole answer that calls ``get_weather`` with ``{"city": "Paris"}`` and says nothing else: the conformance
    checks read it."""

    def __init__(self, options: Any = None) -> None:
        self.options = options

    @property
    @abstractmethod
    def begin(self) -> tuple[str, ...]:
        """Texts that begin a call, or a group of them, wherever they stand; special tokens among them are shown to
        the parser though ``skip_special_tokens`` hides them from callers."""

    @property
    def markers(self) -> tuple[str, ...]:
        """Every text that may be a special token and that the parser must see."""
        return self.begin

    @abstractmethod
    def parse_calls(self, text: TextReader, calls: ToolCalls) -> Reading[None]:
        """Read calls from one of ``begin`` or ``begin_first``, which is what stands next, to the end of the last.

        ``yield`` where the text that has come is not enough to decide. Raise MalformedCallError where it is no call.
        """

    def make_call_id(self, name: str, index: int) -> str:
        """The id of the call number ``index`` of an answer, where the text gives none."""
        return f"call_{uuid.uuid4().hex[:24]}"

    def format_call(self, name: str) -> CallFormat | None:
        """How a call of ``name`` is written, so that it can be enforced; None where that is no JSON between two
        texts."""
        return None
