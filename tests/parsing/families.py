"""The assistant's turn as each family's chat template writes it, and a conversation's turn that all of them can hold.

The templates are written for these tests, after the published formats, with the parts of a turn in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from jinja2 import Environment, Template

from quire.core.parsing.answer_parser import AnswerParser
from quire.core.parsing.events import ArgumentsDelta, ContentDelta, ReasoningDelta, ToolCallStart
from quire.core.plugin.manager import PluginManager

FUNCTIONS: Mapping[str, Mapping[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "exact": {"type": "boolean"},
            "near": {"type": ["number", "null"]},
            "where": {"type": "object"},
        },
    },
    "get_time": {"type": "object", "properties": {}},
    "get": {"type": "object", "properties": {"key": {"type": "string"}}},
}
"""The functions of every conversation; one is the beginning of another's name."""


@dataclass
class Turn:
    """What the assistant said: what a client gets."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)


THINK = "{% if reasoning %}<think>\n{{ reasoning }}\n</think>\n\n{% endif %}"
FAMILIES: dict[str, tuple[str, str]] = {
    "hermes": (
        "qwen3",
        THINK + "{{ content }}{% for name, arguments in calls %}{{ '\n' if content or not loop.first }}<tool_call>\n"
        '{"name": {{ name | json }}, "arguments": {{ arguments | json }}}\n</tool_call>{% endfor %}',
    ),
    "llama3_json": (
        "none",
        "{% if calls %}<|python_tag|>{% for name, arguments in calls %}{{ '; ' if not loop.first }}"
        '{"name": {{ name | json }}, "parameters": {{ arguments | json }}}{% endfor %}'
        "{% else %}{{ content }}{% endif %}",
    ),
    "llama4_pythonic": (
        "none",
        "{{ content }}{% if calls %}<|python_start|>[{% for name, arguments in calls %}{{ ', ' if not loop.first }}"
        "{{ name }}({% for key, value in arguments.items() %}{{ ', ' if not loop.first }}{{ key }}={{ value | python }}"
        "{% endfor %}){% endfor %}]<|python_end|>{% endif %}",
    ),
    "pythonic": (
        "none",
        "{% if calls %}[{% for name, arguments in calls %}{{ ', ' if not loop.first }}{{ name }}("
        "{% for key, value in arguments.items() %}{{ ', ' if not loop.first }}{{ key }}={{ value | python }}"
        "{% endfor %}){% endfor %}]{% else %}{{ content }}{% endif %}",
    ),
    "mistral": (
        "none",
        "{{ content }}{% if calls %}[TOOL_CALLS][{% for name, arguments in calls %}{{ ', ' if not loop.first }}"
        '{"name": {{ name | json }}, "arguments": {{ arguments | json }}}{% endfor %}]{% endif %}',
    ),
    "mistral_v11": (
        "none",
        "{{ content }}{% for name, arguments in calls %}[TOOL_CALLS]{{ name }}[ARGS]{{ arguments | json }}{% endfor %}",
    ),
    "qwen3_coder": (
        "qwen3",
        THINK + "{{ content }}{% for name, arguments in calls %}{{ '\n\n' if content or not loop.first }}<tool_call>\n"
        "<function={{ name }}>\n{% for key, value in arguments.items() %}<parameter={{ key }}>\n"
        "{{ value if value is string else value | json }}\n</parameter>\n{% endfor %}</function>\n</tool_call>"
        "{% endfor %}",
    ),
    "deepseek_v3": (
        "deepseek_r1",
        "{{ reasoning }}\n</think>\n\n{{ content }}{% if calls %}<｜tool▁calls▁begin｜>"
        "{% for name, arguments in calls %}{{ '\n' if not loop.first }}<｜tool▁call▁begin｜>function<｜tool▁sep｜>"
        "{{ name }}\n```json\n"
        "{{ arguments | json }}\n```<｜tool▁call▁end｜>{% endfor %}<｜tool▁calls▁end｜>{% endif %}",
    ),
    "deepseek_v31": (
        "deepseek_r1",
        "{{ reasoning }}</think>{{ content }}{% if calls %}<｜tool▁calls▁begin｜>{% for name, arguments in calls %}"
        "<｜tool▁call▁begin｜>{{ name }}<｜tool▁sep｜>{{ arguments | json }}<｜tool▁call▁end｜>{% endfor %}"
        "<｜tool▁calls▁end｜>{% endif %}",
    ),
    "glm45": (
        "qwen3",
        THINK + "{{ content }}{% for name, arguments in calls %}{{ '\n' if content or not loop.first }}<tool_call>"
        "{{ name }}\n{% for key, value in arguments.items() %}<arg_key>{{ key }}</arg_key>\n<arg_value>"
        "{{ value if value is string else value | json }}</arg_value>\n{% endfor %}</tool_call>{% endfor %}",
    ),
    "kimi_k2": (
        "qwen3",
        THINK + "{{ content }}{% if calls %}<|tool_calls_section_begin|>{% for name, arguments in calls %}"
        "<|tool_call_begin|>functions.{{ name }}:{{ loop.index0 }}<|tool_call_argument_begin|>{{ arguments | json }}"
        "<|tool_call_end|>{% endfor %}<|tool_calls_section_end|>{% endif %}",
    ),
    "granite": (
        "granite",
        "{% if reasoning %}Here is my thought process: {{ reasoning }} Here is my response: {% endif %}{{ content }}"
        '{% if calls %}<|tool_call|>[{% for name, arguments in calls %}{{ ", " if not loop.first }}'
        '{"name": {{ name | json }}, "arguments": {{ arguments | json }}}{% endfor %}]{% endif %}',
    ),
    "phi4_mini": (
        "none",
        "{{ content }}{% if calls %}functools[{% for name, arguments in calls %}{{ ', ' if not loop.first }}"
        '{"name": {{ name | json }}, "arguments": {{ arguments | json }}}{% endfor %}]{% endif %}',
    ),
    "openai": (
        "openai",
        "{% set start = joiner('<|start|>assistant') %}{% if reasoning %}{{ start() }}<|channel|>analysis<|message|>"
        "{{ reasoning }}<|end|>{% endif %}{% if content %}{{ start() }}<|channel|>{{ 'commentary' if calls else 'final'"
        " }}<|message|>{{ content }}{{ '<|end|>' if calls }}{% endif %}{% for name, arguments in calls %}{{ start() }}"
        "<|channel|>commentary to=functions.{{ name }} <|constrain|>json<|message|>{{ arguments | json }}<|call|>"
        "{% endfor %}",
    ),
}
"""Family -> the reasoning parser that goes with it, and the template of an assistant's turn."""

WRITES_EITHER = ("llama3_json", "pythonic")
"""Families that write content or calls, not both."""
HAS_REASONING = {name for name, (reasoning, _) in FAMILIES.items() if reasoning != "none"}
PARSER_OF = {"mistral_v11": "mistral", "deepseek_v31": "deepseek_v3"}
"""Forms of one family, of which one parser reads both."""


@cache
def load_template(family: str) -> Template:
    environment = Environment(keep_trailing_newline=True)
    environment.filters |= {"json": lambda value: json.dumps(value, ensure_ascii=False), "python": repr}
    return environment.from_string(FAMILIES[family][1])


def render(family: str, turn: Turn) -> str:
    """The text that a model of ``family`` writes for ``turn``."""
    return load_template(family).render(content=turn.content, reasoning=turn.reasoning, calls=turn.calls)


@cache
def load_parsers(family: str) -> tuple[Any, Any]:
    """The tool-call parser and the reasoning parser of a family, as the engine loads them."""
    manager = PluginManager()
    tools = manager.load_class("tool_parser", PARSER_OF.get(family, family))()
    return tools, manager.load_class("reasoning_parser", FAMILIES[family][0])()


def make_parser(family: str, **options: Any) -> AnswerParser:
    """A parser for one answer, as the engine makes it."""
    tools, reasoning = load_parsers(family)
    options.setdefault("in_reasoning", reasoning.is_reasoning_open("<｜Assistant｜>"))
    return AnswerParser(tools, reasoning, FUNCTIONS, **options)


def join_events(events: Iterable[Any]) -> tuple[str, str, list[tuple[str, str]]]:
    """Content, reasoning, and the calls with their arguments as text: what the events of an answer add up to."""
    content, reasoning, calls = "", "", []
    for event in events:
        match event:
            case ContentDelta(text=text):
                content += text
            case ReasoningDelta(text=text):
                reasoning += text
            case ToolCallStart(index=index, name=name):
                assert index == len(calls)
                calls.append((name, ""))
            case ArgumentsDelta(index=index, text=text):
                assert index == len(calls) - 1
                calls[index] = (calls[index][0], calls[index][1] + text)
    return content, reasoning, calls


def parse(parser: AnswerParser, pieces: Iterable[str]) -> tuple[str, str, list[tuple[str, str]]]:
    """What an answer that comes in ``pieces`` adds up to."""
    events = [event for piece in pieces for event in parser.feed(piece)]
    return join_events([*events, *parser.finish()])


def parse_turn(family: str, text: str) -> Turn:
    """What a client gets of a whole answer."""
    content, reasoning, calls = parse(make_parser(family), [text])
    return Turn(content, reasoning, [(name, json.loads(arguments)) for name, arguments in calls])
