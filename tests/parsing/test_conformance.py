"""The bundled families keep the contract that they share with everyone's, and a broken promise is noticed."""

from __future__ import annotations

import json
import re

import pytest

from quire.core.plugin.manager import PluginManager
from quire.sdk import JsonToolParser, MalformedCallError, Reading, ReasoningParser, TextReader, ToolCalls, ToolParser
from quire.testing import run_checks

MANAGER = PluginManager()
NAMES = [(kind, name) for kind in ("tool_parser", "reasoning_parser") for name in MANAGER.list_names(kind)]


class LineCalls(ToolParser):
    """Written without a table: ``!name key=value ...`` and the end of the line."""

    begin = ("!",)
    example = "!get_weather city=Paris\n"

    def parse_calls(self, text: TextReader, calls: ToolCalls) -> Reading[None]:
        yield from text.accept("!")
        line = yield from text.read_until("\n")
        match = re.fullmatch(r"(\w+)((?: \w+=\w+)*)", line)
        if match is None or not (yield from text.accept("\n")):
            raise MalformedCallError
        calls.begin_call(match[1])
        calls.add_arguments(json.dumps(dict(pair.split("=") for pair in match[2].split())))
        calls.end_call()


class WholeChunks(LineCalls):
    """Looks at what has come, and does not wait for the rest."""

    def parse_calls(self, text: TextReader, calls: ToolCalls) -> Reading[None]:
        if "\n" not in text.buffer:
            raise MalformedCallError
        yield from super().parse_calls(text, calls)


class Swallows(JsonToolParser):
    """Drops what is no call."""

    begin = ("<tool_call>",)
    example = '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}'

    def parse_calls(self, text: TextReader, calls: ToolCalls) -> Reading[None]:
        try:
            yield from super().parse_calls(text, calls)
        except MalformedCallError:
            text.release()
            raise


class Remembers(LineCalls):
    """Keeps what belongs to one answer."""

    def parse_calls(self, text: TextReader, calls: ToolCalls) -> Reading[None]:
        self.last = text
        yield from super().parse_calls(text, calls)


class AnyName(LineCalls):
    """Has no example of what it reads."""

    example = ""


class NoEnd(ReasoningParser):
    """Reasoning that nothing ends."""

    begin = ("<think>",)
    end = ()


class AlwaysOpen(ReasoningParser):
    """Does not look at the prompt."""

    begin = ("<think>",)
    end = ("</think>",)

    def is_reasoning_open(self, prompt_end: str) -> bool:
        return True


def failures(cls):
    return {result.name for result in run_checks(cls) if result.outcome == "failed"}


@pytest.mark.parametrize(("kind", "name"), NAMES)
def test_a_bundled_family_keeps_the_contract(kind, name):
    assert not [result for result in run_checks(MANAGER.load_class(kind, name)) if result.outcome == "failed"]


def test_a_parser_without_a_table_keeps_the_contract():
    assert failures(LineCalls) == set()


@pytest.mark.parametrize(
    ("cls", "check"),
    [
        (WholeChunks, "check_cuts_change_nothing"),
        (Swallows, "check_malformed_calls_are_content"),
        (Remembers, "check_keeps_nothing_of_an_answer"),
        (AnyName, "check_reads_its_example"),
        (NoEnd, "check_markers_are_texts"),
        (AlwaysOpen, "check_knows_what_a_prompt_has_begun"),
    ],
)
def test_a_broken_promise_is_noticed(cls, check):
    assert check in failures(cls)


def test_a_family_is_a_small_table():
    """At most 40 lines each, comments and docstrings included."""
    import ast
    import inspect

    from quire.plugins.parsers import reasoning, tool_calls

    for module in (reasoning, tool_calls):
        for node in ast.parse(inspect.getsource(module)).body:
            if isinstance(node, ast.ClassDef):
                assert node.end_lineno - node.lineno < 40, node.name
