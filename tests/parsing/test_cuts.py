"""The result never depends on how the stream is cut."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from .families import FAMILIES, HAS_REASONING, WRITES_EITHER, Turn, make_parser, parse, parse_turn, render

SHORT = Turn("A <b", "C [d", [("get", {"key": '"\\é'}), ("get_time", {})])
LONG = Turn(
    "I'll look\nboth up, in <b>parallel</b> [1].",
    "The user wants {the weather}.\n\nSo: a call of get_weather.",
    [
        ("get_weather", {"city": "São Paulo, \"SP\"\n'x' \\ {[", "days": 3, "exact": True, "near": None}),
        ("get_time", {}),
        ("get_weather", {"city": "", "near": -1.5e3, "where": {"a": [1, {"b": "]}"}], "c": "</x>"}}),
    ],
)


def turn_of(family: str, turn: Turn) -> Turn:
    """What ``turn`` is in a family that cannot write all of it."""
    turn = replace(turn, content="" if family in WRITES_EITHER else turn.content)
    return replace(turn, reasoning=turn.reasoning if family in HAS_REASONING else "")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("turn", [SHORT, LONG], ids=["short", "long"])
def test_a_rendered_turn_is_read_back(family, turn):
    turn = turn_of(family, turn)
    assert parse_turn(family, render(family, turn)) == turn


@pytest.mark.parametrize("family", FAMILIES)
def test_every_cut_into_three_gives_the_same(family):
    turn = replace(SHORT, content="") if family == "openai" else SHORT  # its headers are long
    text = render(family, turn_of(family, turn))
    assert len(text) <= 300
    whole = parse(make_parser(family), [text])
    for i in range(len(text)):
        for j in range(i, len(text)):
            assert parse(make_parser(family), (text[:i], text[i:j], text[j:])) == whole, (text[:i], text[i:j], text[j:])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_thousand_random_cuts_give_the_same(family):
    text = render(family, turn_of(family, LONG)) + "\nDone. <tool_call>{ [no call] <|x"
    whole = parse(make_parser(family), [text])
    chance = random.Random(family)
    for _ in range(1000):
        places = sorted(chance.choices(range(len(text) + 1), k=chance.choice((1, 3, 10, 40, 400))))
        pieces = [text[i:j] for i, j in zip([0, *places], [*places, len(text)], strict=True)]
        assert parse(make_parser(family), pieces) == whole, pieces


@pytest.mark.parametrize("family", FAMILIES)
def test_every_beginning_of_an_answer_is_cut_alike(family):
    """An answer that the length limit ends, anywhere: one character at a time and all at once."""
    text = render(family, turn_of(family, LONG))
    for end in range(len(text)):
        assert parse(make_parser(family), text[:end]) == parse(make_parser(family), [text[:end]])
