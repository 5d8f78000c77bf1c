"""What a parser makes of an answer's text, piece by piece."""

from __future__ import annotations

import msgspec

__all__ = ["ArgumentsDelta", "ContentDelta", "ParserEvent", "ReasoningDelta", "ToolCallStart"]


class ContentDelta(msgspec.Struct, frozen=True):
    """More of the answer."""

    text: str


class ReasoningDelta(msgspec.Struct, frozen=True):
    """More of the reasoning."""

    text: str


class ToolCallStart(msgspec.Struct, frozen=True):
    """A call begins: its whole name is known."""

    index: int
    """Of the call, in its answer."""
    call_id: str
    name: str


class ArgumentsDelta(msgspec.Struct, frozen=True):
    """More of the arguments of a call, as JSON text."""

    index: int
    text: str


ParserEvent = ContentDelta | ReasoningDelta | ToolCallStart | ArgumentsDelta
