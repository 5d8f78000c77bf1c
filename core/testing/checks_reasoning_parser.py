"""Checks of reasoning parsers: reasoning is split off, nothing is lost, and the result does not depend on cuts."""

from __future__ import annotations

import unittest

from quire.core.contracts.reasoning_parser import ReasoningParser
from quire.core.plugin.options import parse_options
from quire.core.testing.parser_problem import ParsedAnswer, check_every_cut, parse_pieces

__all__ = [
    "check_cuts_change_nothing",
    "check_knows_what_a_prompt_has_begun",
    "check_markers_are_texts",
    "check_reasoning_is_split_off",
    "check_text_is_content",
]


def check_markers_are_texts(cls: type[ReasoningParser]) -> None:
    """``begin``, ``end`` and ``dropped`` are tuples of texts that are not empty; what begins can end."""
    parser = _make_parser(cls)
    for texts in (parser.begin, parser.end, parser.dropped):
        assert isinstance(texts, tuple) and all(isinstance(text, str) and text for text in texts), repr(texts)
    assert bool(parser.begin) == bool(parser.end), "has a begin or an end, and not the other"


def check_reasoning_is_split_off(cls: type[ReasoningParser]) -> None:
    """Between any begin and any end stands reasoning, without the white space around it; what follows is content."""
    parser = _make_parser(cls)
    if not parser.begin:
        raise unittest.SkipTest("splits nothing off")
    for begin in parser.begin:
        for end in parser.end:
            parsed = parse_pieces(None, parser, [f"{begin}\nA thought.\n{end}\n\nAn answer."])
            assert parsed == ParsedAnswer("An answer.", "A thought."), f"{begin!r} and {end!r} give {parsed}"
        parsed = parse_pieces(None, parser, [f"{begin}A thought that the limit cu"])
        assert parsed == ParsedAnswer("", "A thought that the limit cu"), f"without an end {begin!r} gives {parsed}"


def check_cuts_change_nothing(cls: type[ReasoningParser]) -> None:
    """The result is the same wherever the text is cut."""
    parser = _make_parser(cls)
    for begin in parser.begin:
        for end in parser.end:
            check_every_cut(None, parser, f"{begin} a\n\n< {end[:3]} b {end} \n c {begin} d {end} e")


def check_text_is_content(cls: type[ReasoningParser]) -> None:
    """Text without any of the markers stays as it is."""
    text = "Let me see: a < b, [1].\n\nSo it is."
    assert parse_pieces(None, _make_parser(cls), list(text)) == ParsedAnswer(text)


def check_knows_what_a_prompt_has_begun(cls: type[ReasoningParser]) -> None:
    """A prompt that ends with a begin leaves reasoning open; one that ends with an end does not."""
    parser = _make_parser(cls)
    for begin in parser.begin:
        assert parser.is_reasoning_open(f"assistant\n{begin}\n") is True, f"a prompt ends with {begin!r}"
    for end in parser.end:
        assert parser.is_reasoning_open(f"assistant\n...\n{end}\n\n") is False, f"a prompt ends with {end!r}"
    assert parser.is_reasoning_open("") in (True, False)


def _make_parser(cls: type[ReasoningParser]) -> ReasoningParser:
    return cls(parse_options(cls, {}))
