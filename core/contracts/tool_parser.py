"""Tool-call parser: finds the calls in a family's answers, while they are written."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from quire.core.contracts.tool_parser_text import Reading, TextReader

__all__ = ["ArgumentFormat", "CallFormat", "ToolCalls", "ToolParser"]


@dataclass(frozen=True, slots=True)
class CallFormat:
    """How a call of one function is written, so that it can be enforced: ``begin``, its arguments, ``end``."""

    begin: str
    end: str
    trigger: str
    """The beginning of ``begin`` that no other text of an answer has."""
    other_begins: tuple[str, ...] = ()
    """Texts that may stand in place of ``begin``."""
    group: tuple[str, str, str] | None = None
    """Where several calls stand in one list: what is before, between and behind them. ``begin`` begins with the first,
    ``end`` ends with the last."""
    is_first: bool = False
    """Whether such calls stand where the answer begins alone. They are one, or one group, and nothing follows."""


@dataclass(frozen=True, slots=True)
class ArgumentFormat:
    """How one argument is written where arguments are no JSON object: ``begin``, its value, ``end``."""

    begin: str
    end: str
    values: tuple[Mapping[str, Any], ...]
    """The forms that a value may have. ``{"json": SCHEMA}`` is JSON; ``{"text": SCHEMA}`` a string as it is, whose
    schema has no other keywords than ``const``, ``enum``, ``minLength``, ``maxLength`` and ``pattern``, between quotes
    and without escapes if there is also a ``"quote"``."""
    stop: str = ""
    """What no text of a value holds: it would end the value."""
    is_required: bool = True


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

    argument_separator: str = ""
    """What stands between two arguments, where ``format_arguments`` says how each is written."""

    def list_call_formats(self, name: str) -> Sequence[CallFormat]:
        """The forms in which a call of ``name`` is written, so that it can be enforced; none where it cannot."""
        return ()

    def format_arguments(self, schema: Mapping[str, Any]) -> Sequence[ArgumentFormat] | None:
        """How each argument of a function with these parameters is written, in their order; None where all are one
        JSON object. Raises UnsupportedError, which names the keyword, for what cannot be enforced in this syntax."""
        return None
