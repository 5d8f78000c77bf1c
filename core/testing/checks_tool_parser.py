"""Checks of tool-call parsers: calls are found, nothing is lost, and the result does not depend on cuts."""

from __future__ import annotations

import json
import unittest

from quire.core.contracts.tool_parser import ToolParser
from quire.core.plugin.options import parse_options
from quire.core.testing.parser_problem import ParsedAnswer, check_every_cut, parse_pieces

__all__ = [
    "check_begins_are_texts",
    "check_cuts_change_nothing",
    "check_enforced_calls_are_read",
    "check_keeps_nothing_of_an_answer",
    "check_malformed_calls_are_content",
    "check_other_functions_are_content",
    "check_reads_its_example",
    "check_text_is_content",
]

_TEXT = 'Let me see: "a < b", [1, 2] and {"c": 3}.\n\nSo it is.'
_AFTER = (" and no more", "{", '{"name": "get_weather"', '[{"name"', "get_weather(", "\n\n", '{"name": "other", ')


def check_begins_are_texts(cls: type[ToolParser]) -> None:
    """``begin`` and ``begin_first`` are tuples of texts that are not empty."""
    for texts in (_make_parser(cls).begin, cls.begin_first, _make_parser(cls).markers):
        assert isinstance(texts, tuple) and all(isinstance(text, str) and text for text in texts), repr(texts)


def check_reads_its_example(cls: type[ToolParser]) -> None:
    """``example`` gives the call that it is an example of, and no content."""
    parsed = parse_pieces(_make_parser(cls), None, [_find_example(cls)])
    assert [name for name, _ in parsed.calls] == ["get_weather"], f"the example gives {parsed}"
    assert json.loads(parsed.calls[0][1]) == {"city": "Paris"}, f"the example gives {parsed}"
    assert not parsed.content, f"the example leaves {parsed.content!r}"


def check_cuts_change_nothing(cls: type[ToolParser]) -> None:
    """The example, text around it and broken calls give the same wherever the text is cut."""
    parser = _make_parser(cls)
    for text in (cls.example, f"{_TEXT}\n{cls.example}", f"{cls.example}\n{_TEXT}", cls.example * 2):
        check_every_cut(parser, None, text)
    for begin in (*parser.begin, *parser.begin_first):
        for after in _AFTER:
            check_every_cut(parser, None, begin + after)


def check_text_is_content(cls: type[ToolParser]) -> None:
    """Text in which nothing begins a call stays as it is."""
    assert parse_pieces(_make_parser(cls), None, list(_TEXT)) == ParsedAnswer(_TEXT)


def check_malformed_calls_are_content(cls: type[ToolParser]) -> None:
    """What begins like a call and is none, or ends early before its arguments, is content, all of it."""
    parser = _make_parser(cls)
    for begin in (*parser.begin, *parser.begin_first):
        for after in _AFTER:
            parsed = parse_pieces(parser, None, [begin + after])
            if not parsed.calls:
                assert parsed.content == begin + after, f"of {begin + after!r} is left {parsed.content!r}"
        parsed = parse_pieces(parser, None, [f"{begin} and no more"])
        assert not parsed.calls, f"{begin!r} alone gives the calls {parsed.calls}"


def check_other_functions_are_content(cls: type[ToolParser]) -> None:
    """A call of a function that the request does not have is content."""
    text = _find_example(cls).replace("get_weather", "set_weather")
    parsed = parse_pieces(_make_parser(cls), None, [text])
    assert parsed == ParsedAnswer(text), f"{text!r} gives {parsed}"


def check_keeps_nothing_of_an_answer(cls: type[ToolParser]) -> None:
    """One parser serves answers that come at the same time."""
    parser, text = _make_parser(cls), _find_example(cls)
    before = dict(vars(parser))
    parse_pieces(parser, None, [text[: len(text) // 2]])
    assert vars(parser) == before, "an answer changes the parser that serves all"
    assert parse_pieces(parser, None, [text]) == parse_pieces(_make_parser(cls), None, [text])


def check_enforced_calls_are_read(cls: type[ToolParser]) -> None:
    """What ``list_call_formats`` and ``format_arguments`` make is read as that call, alone and twice in a group, and
    begins with its trigger."""
    parser = _make_parser(cls)
    if not (forms := parser.list_call_formats("get_weather")):
        raise unittest.SkipTest("calls cannot be enforced")
    for form in forms:
        for begin in (form.begin, *form.other_begins):
            assert begin.startswith(form.trigger), f"{begin!r} does not begin with {form.trigger!r}"
            text = begin + _write_arguments(parser) + form.end
            _expect_calls(parser, text, 1)
            if form.group is not None:
                before, between, behind = form.group
                assert begin.startswith(before) and form.end.endswith(behind), f"{text!r} is not in {form.group}"
                first = text[: len(text) - len(behind)]
                _expect_calls(parser, first + between + text[len(before) :], 2)


def _write_arguments(parser: ToolParser) -> str:
    """Those of ``get_weather`` for Rome, as the parser's format says."""
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    formats = parser.format_arguments(schema)
    if formats is None:
        return '{"city": "Rome"}'
    [argument] = formats
    value = argument.values[-1]
    written = '"Rome"' if "json" in value else "{0}Rome{0}".format(value.get("quote", ""))
    return argument.begin + written + argument.end


def _expect_calls(parser: ToolParser, text: str, count: int) -> None:
    parsed = parse_pieces(parser, None, [text])
    calls = [(name, json.loads(arguments)) for name, arguments in parsed.calls]
    assert calls == [("get_weather", {"city": "Rome"})] * count, f"{text!r} gives {parsed}"
    assert not parsed.content, f"of {text!r} is left {parsed.content!r}"


def _make_parser(cls: type[ToolParser]) -> ToolParser:
    return cls(parse_options(cls, {}))


def _find_example(cls: type[ToolParser]) -> str:
    if not cls.example:
        if not _make_parser(cls).begin and not cls.begin_first:
            raise unittest.SkipTest("finds no calls")
        raise AssertionError("has no example; give a whole answer that calls get_weather for Paris")
    return cls.example
