"""Any text: nothing is lost, no call is lost, and cuts change nothing."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.core.parsing.answer_parser import AnswerParser
from quire.core.plugin.manager import PluginManager

from .families import (
    FAMILIES,
    FUNCTIONS,
    HAS_REASONING,
    WRITES_EITHER,
    Turn,
    load_parsers,
    make_parser,
    parse,
    parse_turn,
    render,
)

PARSERS = [name for name in PluginManager().list_names("tool_parser") if name != "none"]
KEYS = {"city": st.text(), "days": st.integers(), "exact": st.booleans(), "near": st.none() | st.integers()}
PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<[{f!"), max_size=20).map(str.strip)


@st.composite
def turns(draw, family):
    """A turn that ``family`` can write."""
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    if family in ("qwen3_coder", "glm45"):  # their strings have no escapes, and no end of their own
        text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=20)
    keys = {**KEYS, "city": text}
    if family not in ("pythonic", "llama4_pythonic", "qwen3_coder", "glm45"):
        keys["where"] = st.dictionaries(text, st.recursive(text | st.booleans(), st.lists), max_size=2)
    arguments = st.fixed_dictionaries({}, optional=keys)
    calls = st.lists(st.tuples(st.just("get_weather"), arguments) | st.just(("get_time", {})), max_size=3)
    content = draw(PLAIN)
    calls = draw(calls)
    if family in WRITES_EITHER and calls:
        content = ""
    return Turn(content, draw(PLAIN) if family in HAS_REASONING else "", calls)


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
def test_no_call_is_lost(family, data):
    turn = data.draw(turns(family))
    assert parse_turn(family, render(family, turn)) == turn


@pytest.mark.parametrize("name", PARSERS)
@given(data=st.data())
def test_any_text_is_parsed_alike_and_none_of_it_is_lost(name, data):
    tools = PluginManager().load_class("tool_parser", name)()
    pieces = re.findall(r"[^\w\s]+|\w+|\s+", tools.example.replace("Paris", '"\\'))
    piece = st.sampled_from([*pieces, *tools.markers, "get_time", "[1", "}"]) | st.text(max_size=3)
    text = "".join(data.draw(st.lists(piece, max_size=25)))
    whole = content, _, calls = parse(AnswerParser(tools, None, FUNCTIONS), [text])
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    cut = [text[i:j] for i, j in zip([0, *places], [*places, len(text)], strict=True)]
    assert parse(AnswerParser(tools, None, FUNCTIONS), cut) == whole
    assert parse(AnswerParser(tools, None, FUNCTIONS), text) == whole
    if not calls:
        assert content == text


@pytest.mark.parametrize("family", sorted(HAS_REASONING))
@given(data=st.data())
def test_reasoning_and_calls_cut_anywhere(family, data):
    """Markers of both in any order."""
    tools, reasoning = load_parsers(family)
    markers = [*tools.markers, *reasoning.begin, *reasoning.end, *reasoning.dropped]
    piece = st.sampled_from([*markers, tools.example, " ", "\n", "a"]) | st.text(max_size=3)
    text = "".join(data.draw(st.lists(piece, max_size=20)))
    assert parse(make_parser(family), text) == parse(make_parser(family), [text])


@given(st.recursive(st.text() | st.none() | st.integers() | st.floats(allow_nan=False), st.lists))
def test_json_arguments_are_unchanged(value):
    text = json.dumps({"key": value}, ensure_ascii=False)
    _, _, [(_, arguments)] = parse(make_parser("hermes"), f'<tool_call>{{"name": "get", "arguments": {text}}}')
    assert arguments == text


SCHEMAS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "anyOf", "oneOf", "enum", "properties", "city"]), inner, max_size=4)
    ),
)


@given(schema=SCHEMAS, value=st.text(max_size=5).filter(lambda text: "<" not in text))
def test_any_schema_that_a_client_sends(schema, value):
    """Schemas are the client's: whatever they hold, arguments are JSON and no parser fails."""
    functions = {"get": schema if isinstance(schema, dict) and schema else {"properties": {"city": schema}}}
    tools = PluginManager().load_class("tool_parser", "glm45")()
    text = f"<tool_call>get\n<arg_key>city</arg_key><arg_value>{value}</arg_value></tool_call>"
    _, _, [(_, arguments)] = parse(AnswerParser(tools, None, functions), [text])
    assert set(json.loads(arguments)) == {"city"}
