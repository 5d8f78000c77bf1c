"""An assistant's message as a client gets it: content, reasoning and tool calls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from quire.core.parsing.events import ArgumentsDelta, ContentDelta, ParserEvent, ReasoningDelta, ToolCallStart

__all__ = ["AssistantMessage", "ToolCall"]


@dataclass(slots=True)
class ToolCall:
    """A call of a function that the model asks for."""

    call_id: str
    name: str
    arguments: str
    """JSON text, as the model wrote it; broken off where the answer is."""

    def to_dict(self) -> dict[str, Any]:
        """In the form of the OpenAI API."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.call_id, "type": "function", "function": function}


@dataclass(slots=True)
class AssistantMessage:
    """What the model answered. ``content`` and ``reasoning_content`` are None where there is none."""

    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)

    @classmethod
    def from_events(cls, events: Iterable[ParserEvent]) -> AssistantMessage:
        """What the events of an answer add up to."""
        content: list[str] = []
        reasoning: list[str] = []
        calls: list[tuple[ToolCallStart, list[str]]] = []
        for event in events:
            match event:
                case ContentDelta(text=text):
                    content.append(text)
                case ReasoningDelta(text=text):
                    reasoning.append(text)
                case ToolCallStart():
                    calls.append((event, []))
                case ArgumentsDelta(index=index, text=text):
                    calls[index][1].append(text)
        return cls(
            "".join(content) or None,
            "".join(reasoning) or None,
            [ToolCall(start.call_id, start.name, "".join(pieces)) for start, pieces in calls],
        )

    def to_dict(self) -> dict[str, Any]:
        """In the form of the OpenAI API, to be added to a conversation."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [call.to_dict() for call in self.tool_calls]
        return message
