"""Time is linear in the length of the text, however it is cut. Limits are generous: machines are busy."""

from __future__ import annotations

import json
from time import process_time

import pytest

from quire.core.parsing.answer_parser import AnswerParser
from quire.core.parsing.events import ArgumentsDelta, ContentDelta
from quire.core.plugin.quarantine import Quarantine
from quire.plugins.parsers.reasoning import Qwen3
from quire.plugins.parsers.tool_calls import Glm45, Hermes, Pythonic
from quire.sdk import MalformedCallError

from .families import FUNCTIONS

SLACK = 5
"""How much longer than the figures of docs/tool-calling.md a loaded machine may take."""
CODE = json.dumps({"key": 'def f(x):\n    return "x" + x\n' * 27_000})
RECORDS = json.dumps({"key": [{"id": i, "tags": ["a", "b"], "at": [1.5, 2]} for i in range(20_000)]})
NESTED = '{"key": ' + "[" * 500_000 + "]" * 500_000 + "}"


def take(text: str, size: int, tools=None) -> tuple[float, list]:
    """Seconds of the processor, and events, of the best of three."""
    best = []
    for _ in range(3):
        guard = Quarantine("tool_parser", "x", print, not_faults=(MalformedCallError,))
        parser = AnswerParser(tools or Hermes(), Qwen3(), FUNCTIONS, quarantine=guard)
        start = process_time()
        events = [event for i in range(0, len(text), size) for event in parser.feed(text[i : i + size])]
        events += parser.finish()
        best.append((process_time() - start, events))
    return min(best, key=lambda pair: pair[0])


@pytest.mark.parametrize("arguments", [CODE, RECORDS, NESTED], ids=["code", "records", "nested"])
def test_a_megabyte_of_arguments(arguments):
    assert 0.85e6 < len(arguments) < 1.3e6
    text = f'<tool_call>\n{{"name": "get", "arguments": {arguments}}}\n</tool_call>'
    for size, limit_s in ((len(text), 0.05), (4, 2e-6 * len(text) / 4)):
        seconds, events = take(text, size)
        assert "".join(event.text for event in events if isinstance(event, ArgumentsDelta)) == arguments
        assert seconds < SLACK * limit_s, f"{seconds:.3f} s in pieces of {size}"


@pytest.mark.parametrize(
    ("text", "tools"),
    [
        (" \n" * 100_000, None),
        ("<tool_call>" * 20_000, None),
        ("<" * 200_000, None),
        ("<think>" + "</thin" * 30_000, None),
        ('<tool_call>{"arguments": {"key": "' + "a" * 200_000, None),
        ('<tool_call>{"name": "get", "arguments": {"key": "' + "\\" * 200_000, None),
        ('<tool_call>{"name": "get", "arguments": ' + "[" * 200_000, None),
        ("<tool_call>get\n<arg_key>key</arg_key><arg_value>" + "</arg_valu" * 20_000, Glm45()),
        ('[get(key="' + "a" * 200_000, Pythonic()),
    ],
)
def test_hostile_text_takes_linear_time(text, tools):
    """Four characters at a time: 50,000 pieces, in which quadratic work would take minutes."""
    seconds, events = take(text, 4, tools)
    assert seconds < SLACK * 10e-6 * len(text) / 4
    assert sum(len(event.text) for event in events if isinstance(event, (ContentDelta, ArgumentsDelta))) <= len(text)
