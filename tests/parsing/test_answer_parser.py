"""What goes wrong elsewhere: the faults that users of other servers report, each as a test."""

from __future__ import annotations

import json

import pytest

from quire.core.engine.watchdog import PluginWatchdog
from quire.core.parsing.answer_parser import AnswerParser
from quire.core.parsing.events import ArgumentsDelta, ToolCallStart
from quire.core.plugin.quarantine import Quarantine
from quire.core.stats import QuarantinedPlugin
from quire.plugins.parsers.reasoning import DeepSeekR1, HarmonyReasoning, Qwen3
from quire.plugins.parsers.tool_calls import (
    DeepSeekV3,
    Glm45,
    Harmony,
    Hermes,
    KimiK2,
    Llama3Json,
    Mistral,
    Pythonic,
    Qwen3Coder,
)

from .families import FUNCTIONS, parse

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
PARIS = ("get_weather", '{"city": "Paris"}')


def read(text, tools=None, reasoning=None, **options):
    """Content, reasoning and calls; the same at once and one character at a time."""
    tools = Hermes() if tools is None else tools
    whole = parse(AnswerParser(tools, reasoning, FUNCTIONS, **options), [text])
    assert parse(AnswerParser(tools, reasoning, FUNCTIONS, **options), text) == whole
    return whole


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello.", ("Hello.", "", [])),
        ("  Hello. \n", ("  Hello. \n", "", [])),
        (" \n", (" \n", "", [])),
        (CALL, ("", "", [PARIS])),
        (f"Let me see.\n\n{CALL}\n{CALL}\n", ("Let me see.", "", [PARIS, PARIS])),
        (f"{CALL}\nThat is all.", ("That is all.", "", [PARIS])),
        (f"One.\n{CALL}\n\nTwo.", ("One.\nTwo.", "", [PARIS])),
        (CALL.removesuffix("</tool_call>"), ("", "", [PARIS])),
        (CALL.removesuffix("\n</tool_call>") + "<tool_call>", ("<tool_call>", "", [PARIS])),
        (f"<tool_call>\n{CALL}", ("<tool_call>", "", [PARIS])),
        ('<tool_call>[{"name": "get_time"}, {"name": "get_time"}]</tool_call>', ("", "", [("get_time", "{}")] * 2)),
        ('<tool_call>{"name": "get_time", "arguments": null}</tool_call>', ("", "", [("get_time", "{}")])),
        ('<tool_call>{"name": "get_time", "arguments": ""}</tool_call>', ("", "", [("get_time", "{}")])),
        ('<tool_call>{"arguments": {"city": "Paris"}, "name": "get_weather"}</tool_call>', ("", "", [PARIS])),
        (
            '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}", "id": 7}</tool_call>',
            ("", "", [PARIS]),
        ),
        (
            '<tool_call>{"name": "get", "arguments": {"key": "</tool_call> } \\" \\\\"}}</tool_call>',
            ("", "", [("get", '{"key": "</tool_call> } \\" \\\\"}')]),
        ),
        ('<tool_call>{"name": "get", "arguments": {"key": [1}</tool_call>', ("", "", [("get", '{"key": [1}')])),
    ],
)
def test_hermes(text, expected):
    assert read(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\nnot JSON\n</tool_call>",
        '<tool_call>{"name": "no_such_function", "arguments": {"a": 1}}</tool_call>',
        '<tool_call>{"name": "get_weath", "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {"a": 1}}</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "get_time"',
        '<tool_call>{"name": "get_ti',
        "<tool_call>",
        "<tool_cal",
        "a <tool_call> and a </tool_call> are tags.",
        "<tool_call>[]</tool_call>",
        '<tool_call>{"name": "get" "arguments": {}}</tool_call>',
    ],
)
def test_what_is_no_call_is_content(text):
    assert read(text) == (text, "", [])


def test_what_follows_a_malformed_call_is_read():
    content, _, calls = read(f"<tool_call>oh no</tool_call>\n{CALL}")
    assert content == "<tool_call>oh no</tool_call>" and calls == [PARIS]
    content, _, calls = read('<tool_call>[{"name": "get_time"}, {"name": "other"}]</tool_call> End.')
    assert calls == [("get_time", "{}")] and content == ', {"name": "other"}]</tool_call> End.'


def test_a_name_is_never_sent_in_part():
    parser = AnswerParser(Hermes(), None, FUNCTIONS)
    events = [event for char in '<tool_call>{"name": "get_weather", "arguments": {' for event in parser.feed(char)]
    assert [event.name for event in events if isinstance(event, ToolCallStart)] == ["get_weather"]


def test_arguments_are_passed_on_as_they_come():
    parser = AnswerParser(Hermes(), None, FUNCTIONS)
    parser.feed('<tool_call>{"name": "get", "arguments": ')
    for piece in ('{"key": "a', "bc", 'd\\"', "e"):
        *_, event = parser.feed(piece)
        assert isinstance(event, ArgumentsDelta) and event.text == piece


def test_content_is_not_held_back_without_need():
    parser = AnswerParser(Hermes(), Qwen3(), FUNCTIONS)
    assert [event.text for event in parser.feed("Hello, <b>")] == ["Hello, <b>"]
    assert parser.feed("<tool") == []
    assert [event.text for event in parser.feed("box>")] == ["<toolbox>"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\nA.\n</think>\n\nB.", ("B.", "A.", [])),
        ("\n\n<think>A.</think>B.", ("B.", "A.", [])),
        (f"<think>A.</think>\n{CALL}", ("", "A.", [PARIS])),
        (f"<think>I call.\n{CALL}\nDone.", ("Done.", "I call.", [PARIS])),
        ("<think>Is <tool_call> a tag?\n</think>Yes.", ("Yes.", "Is <tool_call> a tag?", [])),
        ('<think>I could {"name": "get_time"}.</think>B.', ("B.", 'I could {"name": "get_time"}.', [])),
        ("<think>A, and the limit", ("", "A, and the limit", [])),
        ("<think></think>B.", ("B.", "", [])),
        ("The tag <think> begins it.", ("The tag <think> begins it.", "", [])),
        ("A </think> alone.", ("A </think> alone.", "", [])),
    ],
)
def test_qwen3(text, expected):
    assert read(text, reasoning=Qwen3()) == expected


def test_a_prompt_may_have_begun_the_reasoning():
    assert read("A.</think>B.", reasoning=Qwen3(), in_reasoning=True) == ("B.", "A.", [])
    assert read("<think>\nA.</think>B.", reasoning=DeepSeekR1(), in_reasoning=True) == ("B.", "A.", [])
    assert Qwen3().is_reasoning_open("<|im_start|>assistant\n<think>\n")
    assert not Qwen3().is_reasoning_open("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not Qwen3().is_reasoning_open("<|im_start|>assistant\n")
    assert DeepSeekR1().is_reasoning_open("<｜Assistant｜>")
    assert not DeepSeekR1().is_reasoning_open("<｜Assistant｜></think>")


@pytest.mark.parametrize(
    ("parser", "text", "calls"),
    [
        (Llama3Json(), '{"name": "get_time", "parameters": {}}', [("get_time", "{}")]),
        (Llama3Json(), '{"type": "function", "function": "get_time", "parameters": {}}', [("get_time", "{}")]),
        (
            Llama3Json(),
            '<|python_tag|>{"name": "get_time", "parameters": {}}; {"name": "get", "parameters": {"key": "a"}}',
            [("get_time", "{}"), ("get", '{"key": "a"}')],
        ),
        (
            Mistral(),
            '[TOOL_CALLS]get{"key": "[1]"}[TOOL_CALLS]get_time{}',
            [("get", '{"key": "[1]"}'), ("get_time", "{}")],
        ),
        (Mistral(), '[TOOL_CALLS]get[CALL_ID]abcdefghi[ARGS]{"key": "a"}', [("get", '{"key": "a"}')]),
        (
            Pythonic(),
            "[get_weather(city='O\\'Hare', days=2, exact=true, near=None, where={'a': [1, (2, 3)]})]",
            [
                (
                    "get_weather",
                    '{"city": "O\'Hare", "days": 2, "exact": true, "near": null, "where": {"a": [1, [2, 3]]}}',
                )
            ],
        ),
        (
            Pythonic(),
            '[get(key="""two\nlines"""), get_time()]',
            [("get", '{"key": "two\\nlines"}'), ("get_time", "{}")],
        ),
        (
            Qwen3Coder(),
            "<function=get_weather>\n<parameter=days>\n3\n</parameter>\n<parameter=exact>\nTrue\n</parameter>\n"
            "<parameter=near>\nnull\n</parameter>\n<parameter=other>\nx y\n</parameter>\n</function>",
            [("get_weather", '{"days": 3, "exact": true, "near": null, "other": "x y"}')],
        ),
        (
            Qwen3Coder(),
            "<tool_call><function=get>\n<parameter=key>\n\n  a\n<b>\n\n</parameter></function></tool_call>",
            [("get", '{"key": "\\n  a\\n<b>\\n"}')],
        ),
        (Qwen3Coder(), "<tool_call>\n<function=get_time>\n</function>\n</tool_call>", [("get_time", "{}")]),
        (
            Glm45(),
            "<tool_call>get_weather<arg_key>days</arg_key><arg_value>many</arg_value></tool_call>",
            [("get_weather", '{"days": "many"}')],
        ),
        (Glm45(), "<tool_call>get_time\n</tool_call>", [("get_time", "{}")]),
        (KimiK2(), "<|tool_call_begin|>get_time<|tool_call_argument_begin|>{}<|tool_call_end|>", [("get_time", "{}")]),
        (
            DeepSeekV3(),
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_time<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            [("get_time", "{}")],
        ),
        (
            Harmony(),
            "<|start|>assistant to=functions.get_time<|channel|>commentary <|constrain|>json<|message|>{}",
            [("get_time", "{}")],
        ),
        (Harmony(), " to=functions.get_time<|channel|>commentary json<|message|>{}<|call|>", [("get_time", "{}")]),
    ],
)
def test_forms_of_the_families(parser, text, calls):
    assert read(text, parser) == ("", "", calls)


@pytest.mark.parametrize(
    ("parser", "text"),
    [
        (Llama3Json(), '{"temperature": 21, "name": "get_time"}'),
        (Llama3Json(), '{"name": "Anna", "age": 3}'),
        (Llama3Json(), 'It is {"name": "get_time", "parameters": {}}'),
        (Pythonic(), "[1, 2, 3]"),
        (Pythonic(), "[a link](https://example.org)"),
        (Pythonic(), "[get_time(1)]"),
        (Pythonic(), "[get(key=open('x'))]"),
        (Pythonic(), "[get(key=" + "[" * 5000 + ")]"),
        (Pythonic(), "[get_time(**{})]"),
        (Mistral(), "[TOOL_CALLS]get_time"),
        (KimiK2(), "<|tool_call_begin|>functions.get"),
        (Glm45(), "<tool_call>get"),
        (DeepSeekV3(), "<｜tool▁calls▁begin｜>nothing"),
        (Harmony(), " to=functions.no_such_function<|channel|>commentary json<|message|>{}"),
        (Harmony(), "to=market, to=market"),
    ],
)
def test_answers_that_look_like_calls_stay_content(parser, text):
    assert read(text, parser) == (text, "", [])


@pytest.mark.parametrize(
    ("parser", "text"),
    [
        (Pythonic(), "[get(key='\\ud800é')]"),
        (Hermes(), '<tool_call>{"name": "get", "arguments": "{\\"key\\": \\"\\ud800\\u00e9\\"}"}</tool_call>'),
    ],
)
def test_half_a_character_can_be_sent(parser, text):
    _, _, [(_, arguments)] = read(text, parser)
    assert json.loads(arguments.encode()) == {"key": "?é"}


def test_harmony_channels():
    text = (
        "<|channel|>analysis<|message|>Weather.<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>Which?<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.get <|constrain|>json<|message|>{"key": "a"}<|call|>'
    )
    assert read(text, Harmony(), HarmonyReasoning()) == ("I look.", "Weather.\nWhich?", [("get", '{"key": "a"}')])
    text = "<|channel|>analysis<|message|>A.<|end|><|start|>assistant<|channel|>final<|message|>B.<|return|>"
    assert read(text, Harmony(), HarmonyReasoning()) == ("B.", "A.", [])


def test_calls_beyond_the_limit_are_left_out():
    content, _, calls = read(f"{CALL}\n{CALL}", max_calls=1)
    assert calls == [PARIS] and content == ""


def test_ids():
    def ids(parser, text):
        events = AnswerParser(parser, None, FUNCTIONS).feed(text)
        return [event.call_id for event in events if isinstance(event, ToolCallStart)]

    kimi = "<|tool_call_begin|>functions.get:{}<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
    assert ids(KimiK2(), kimi.format(0) + kimi.format(1)) == ["functions.get:0", "functions.get:1"]
    [given] = ids(Mistral(), "[TOOL_CALLS]get[CALL_ID]abcdefghi[ARGS]{}")
    [made] = ids(Mistral(), '[TOOL_CALLS][{"name": "get_time", "arguments": {}}]')
    assert given == "abcdefghi" and len(made) == 9 and made.isalnum()
    first, second = ids(Hermes(), CALL * 2)
    assert first != second and first.startswith("call_")


def test_a_parser_that_fails_leaves_the_text():
    class Breaks(Hermes):
        def parse_calls(self, text, calls):
            yield from text.accept("<tool_call>")
            raise RuntimeError("no")

    faults = []
    quarantine = Quarantine("tool_parser", "breaks", faults.append)
    parser = AnswerParser(Breaks(), None, FUNCTIONS, quarantine=quarantine)
    assert parse(parser, list(f"A {CALL} B {CALL}")) == (f"A {CALL} B {CALL}", "", [])
    assert faults == [QuarantinedPlugin("tool_parser", "breaks", "raised")]


def test_a_parser_that_does_not_return_leaves_the_text():
    class Hangs(Hermes):
        def parse_calls(self, text, calls):
            yield from text.accept("<tool_call>")
            while True:
                pass

    faults = []
    quarantine = Quarantine("tool_parser", "hangs", faults.append)
    watchdog = PluginWatchdog(limit_s=0.3)
    try:
        parser = AnswerParser(Hangs(), None, FUNCTIONS, quarantine=quarantine)
        assert parse(parser, list(f"A {CALL} B")) == (f"A {CALL} B", "", [])
    finally:
        watchdog.stop()
    assert faults == [QuarantinedPlugin("tool_parser", "hangs", "hung")]


def test_arguments_are_json():
    _, _, [(_, arguments)] = read(
        '<tool_call><function=get_weather><parameter=city>"q" \\ \t\n\u2028é</parameter></function>', Qwen3Coder()
    )
    assert json.loads(arguments) == {"city": '"q" \\ \t\n\u2028é'}


def test_values_are_read_by_the_types_that_references_lead_to():
    schema = {
        "type": "object",
        "properties": {
            "size": {"$ref": "#/$defs/Size"},
            "code": {"anyOf": [{"$ref": "#/$defs/Code"}, {"type": "null"}]},
            "kind": {"const": "7"},
            "count": {"allOf": [{"type": "integer"}]},
            "loop": {"$ref": "#/$defs/Loop"},
        },
        "$defs": {
            "Size": {"enum": ["5", "6"]},
            "Code": {"type": "string"},
            "Loop": {"anyOf": [{"$ref": "#/$defs/Loop"}] * 3},
        },
    }
    values = {"size": "5", "code": "12", "kind": "7", "count": 3, "loop": True}
    keys = "".join(f"<arg_key>{key}</arg_key><arg_value>{value}</arg_value>" for key, value in values.items())
    parser = AnswerParser(Glm45(), None, {"f": schema})
    _, _, [(_, arguments)] = parse(parser, [f"<tool_call>f\n{keys}</tool_call>"])
    assert json.loads(arguments) == values


def test_calls_never_share_an_id():
    call = "<|tool_call_begin|>functions.get:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
    events = AnswerParser(KimiK2(), None, FUNCTIONS).feed(call * 2)
    assert [event.call_id for event in events if isinstance(event, ToolCallStart)] == [
        "functions.get:0",
        "functions.get:1",
    ]
