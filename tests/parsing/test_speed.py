"""Time is linear in the length of the text, however it is cut."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from time import thread_time

import pytest

from quire.core.parsing.answer_parser import AnswerParser
from quire.core.parsing.events import ArgumentsDelta, ContentDelta
from quire.core.plugin.quarantine import Quarantine
from quire.plugins.parsers.reasoning import Qwen3
from quire.plugins.parsers.tool_calls import Glm45, Hermes, Pythonic
from quire.sdk import MalformedCallError

from .families import FUNCTIONS

SLACK = 3
"""How much longer than the figures of docs/tool-calling.md a machine may take that is as fast as theirs."""
COUNT_S = 0.006
"""What ``count_seconds`` returns on such a machine."""
NUM_TRIES = 3
CODE = json.dumps({"key": 'def f(x):\n    return "x" + x\n' * 27_000})
RECORDS = json.dumps({"key": [{"id": i, "tags": ["a", "b"], "at": [1.5, 2]} for i in range(20_000)]})
NESTED = '{"key": ' + "[" * 500_000 + "]" * 500_000 + "}"


def count_seconds() -> float:
    """Seconds of the processor for a loop like those of the parsers: how fast this machine is while others use it."""

    def wait() -> Iterator[None]:
        while True:
            yield

    start, waiting, texts = thread_time(), wait(), []
    for i in range(50_000):
        next(waiting)
        texts.append(str(i)[:1])
    return thread_time() - start


def parse_in_time(text: str, size: int, limit_s: float, tools=None) -> list:
    """The events, of the first of several tries that takes no longer than is allowed."""
    tried = []
    for _ in range(NUM_TRIES):
        guard = Quarantine("tool_parser", "x", print, not_faults=(MalformedCallError,))
        parser = AnswerParser(tools or Hermes(), Qwen3(), FUNCTIONS, quarantine=guard)
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        gc.disable()
        try:
            before_s = count_seconds()
            start = thread_time()
            events = [event for piece in pieces for event in parser.feed(piece)]
            events += parser.finish()
            seconds = thread_time() - start
            slowness = max(before_s, count_seconds(), COUNT_S) / COUNT_S
        finally:
            gc.enable()
        if seconds < SLACK * slowness * limit_s:
            return events
        tried.append(f"{seconds:.3f} s on a machine {slowness:.1f} times as slow")
    raise AssertionError(f"pieces of {size} characters took longer than {limit_s:.3f} s: {tried}")


@pytest.mark.parametrize("arguments", [CODE, RECORDS, NESTED], ids=["code", "records", "nested"])
def test_a_megabyte_of_arguments(arguments):
    assert 0.85e6 < len(arguments) < 1.3e6
    text = f'<tool_call>\n{{"name": "get", "arguments": {arguments}}}\n</tool_call>'
    for size, limit_s in ((len(text), 0.05), (4, 2e-6 * len(text) / 4)):
        events = parse_in_time(text, size, limit_s)
        assert "".join(event.text for event in events if isinstance(event, ArgumentsDelta)) == arguments


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
    events = parse_in_time(text, 4, 10e-6 * len(text) / 4, tools)
    assert sum(len(event.text) for event in events if isinstance(event, (ContentDelta, ArgumentsDelta))) <= len(text)
