"""What the checks of parsers read: an answer in one piece, and cut wherever it can be cut."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from quire.core.contracts.reasoning_parser import ReasoningParser
from quire.core.contracts.tool_parser import ToolParser
from quire.core.parsing.answer_parser import AnswerParser
from quire.core.parsing.events import ArgumentsDelta, ContentDelta, ReasoningDelta, ToolCallStart

__all__ = ["CHECKED_FUNCTIONS", "ParsedAnswer", "check_every_cut", "parse_pieces"]

CHECKED_FUNCTIONS = {"get_weather": {"type": "object", "properties": {"city": {"type": "string"}}}}
"""The functions that the checks declare."""


@dataclass
class ParsedAnswer:
    """What the events of an answer add up to."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    """Names and arguments."""


def parse_pieces(
    tools: ToolParser | None, reasoning: ReasoningParser | None, pieces: Iterable[str], in_reasoning: bool = False
) -> ParsedAnswer:
    """Parse an answer that comes in ``pieces``."""
    parser = AnswerParser(tools, reasoning, CHECKED_FUNCTIONS, in_reasoning=in_reasoning)
    answer = ParsedAnswer()
    for event in [*(event for piece in pieces for event in parser.feed(piece)), *parser.finish()]:
        match event:
            case ContentDelta(text):
                answer.content += text
            case ReasoningDelta(text):
                answer.reasoning += text
            case ToolCallStart(_, _, name):
                answer.calls.append((name, ""))
            case ArgumentsDelta(_, text):
                name, arguments = answer.calls.pop()
                answer.calls.append((name, arguments + text))
    return answer


def check_every_cut(tools: ToolParser | None, reasoning: ReasoningParser | None, text: str) -> None:
    """Raise AssertionError if a cut into two, or one at every character, changes the result."""
    whole = parse_pieces(tools, reasoning, [text])
    cuts = [[text[:i], text[i:]] for i in range(len(text))]
    for pieces in [list(text), *cuts]:
        parsed = parse_pieces(tools, reasoning, pieces)
        assert parsed == whole, f"{pieces!r:.200} gives {parsed}, in one piece it gives {whole}"
