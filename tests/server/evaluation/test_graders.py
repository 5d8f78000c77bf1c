"""Graders: a right answer is accepted however it is laid out, a wrong one never."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from quire.server.evaluation import GRADERS, available_skills, format_message, grade, load_questions

WORD = st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=8)
WORDS = st.lists(WORD, min_size=2, max_size=7)
VALUES = st.one_of(st.integers(-999, 999), st.text(max_size=12), st.booleans())
OBJECTS = st.dictionaries(WORD, VALUES, min_size=1, max_size=4)


def call(name, arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@given(st.integers(-999, 9999), st.integers(0, 999))
@example(0, 0)
def test_numbers_that_are_right(answer, other):
    for text in (f"{answer}", f" {answer}.\n", f"{other} + 7 = {answer}", f"It is {answer} words"):
        assert grade("number", text, answer)


@given(st.integers(-999, 9999), st.integers(-999, 999).filter(bool), st.integers(0, 9))
def test_numbers_that_are_wrong(answer, change, digit):
    for text in (f"{answer + change}", f"{answer} = {answer + change}", f"{answer}.{digit}", f"x{answer}", "", "none"):
        assert not grade("number", text, answer)
    assert not grade("number", "9" * 5000, answer)


@given(WORDS, st.randoms(use_true_random=False))
def test_words(words, rng: random.Random):
    answer = ", ".join(words)
    assert grade("exact", f"\n{answer} ", answer)
    shuffled = rng.sample(words, len(words))
    assert grade("exact", ", ".join(shuffled), answer) == (shuffled == words)
    for wrong in (", ".join(words[:-1]), answer + ".", answer.upper(), f"{answer}, {words[0]}", ""):
        assert not grade("exact", wrong, answer)


@given(OBJECTS, VALUES, st.randoms(use_true_random=False))
def test_json(answer, value, rng: random.Random):
    mixed = dict(rng.sample(list(answer.items()), len(answer)))
    text = json.dumps(mixed, indent=rng.choice((None, 2)), ensure_ascii=rng.choice((True, False)))
    assert grade("json", text, answer)
    assert grade("json", f"```json\n{text}\n```", answer)
    key = rng.choice(list(answer))
    assume((type(value), value) != (type(answer[key]), answer[key]))
    wrong = [{**answer, key: value}, {**answer, key + "x": value}, {k: v for k, v in answer.items() if k != key}, None]
    for each in wrong:
        assert not grade("json", json.dumps(each), answer)
    assert not grade("json", text[:-1], answer)
    assert not grade("json", f"Here: {text}", answer)


@pytest.mark.parametrize(
    ("right", "text"), [(1, "1.0"), (True, "1"), (1, "true"), ("1", "1"), (1, '"1"'), (0, "[" * 100_000)]
)
def test_json_of_another_type(right, text):
    assert not grade("json", text, right)


@given(WORD, OBJECTS, VALUES, st.randoms(use_true_random=False))
def test_tool_calls(name, arguments, value, rng: random.Random):
    answer = [{"name": name, "arguments": arguments}]
    text = call(name, arguments)
    assert grade("tool_call", f" {text}\n", answer)
    assert grade("tool_call", f"{text}\n{text}", answer * 2)
    assert grade("tool_call", call(name, json.dumps(arguments)), answer)
    key = rng.choice(list(arguments))
    assume((type(value), value) != (type(arguments[key]), arguments[key]))
    wrong = ["", text[:-1], f"Sure. {text}", f"{text}{text}", call(name + "x", arguments), json.dumps(answer[0])]
    wrong += [call(name, {**arguments, key: value}), call(name, {}), call(name, [arguments]), call(name, "no")]
    wrong += ["<tool_call>{}</tool_call>", "<tool_call>[1]</tool_call>", "<tool_call>" + "[" * 9999 + "</tool_call>"]
    for each in wrong:
        assert not grade("tool_call", each, answer), each


@given(st.text(max_size=60), st.sampled_from(["exact", "number", "json", "tool_call"]))
def test_any_text_gets_a_verdict(text, grader):
    assert grade(grader, text, "no such answer in any text, we hope") in (True, False)


def test_an_unknown_grader_is_named():
    with pytest.raises(ValueError, match="unknown grader 'nobody'"):
        grade("nobody", "", "")


def test_messages_as_text():
    arguments = {"city": "Kraków"}
    function = {"name": "get_weather", "arguments": json.dumps(arguments)}
    assert format_message({"content": "605"}) == "605"
    assert format_message({"content": None}) == ""
    assert format_message({"content": call("f", {})}) == call("f", {})
    parsed = format_message({"content": None, "tool_calls": [{"function": function}]})
    assert grade("tool_call", parsed, [{"name": "get_weather", "arguments": arguments}])
    assert not grade("tool_call", format_message({"content": "Sure.", "tool_calls": [{"function": function}]}), [])


def reference(question):
    """The answer as text, where the grader's own data say it."""
    if question.grader == "tool_call":
        return "\n".join(call(each["name"], each["arguments"]) for each in question.answer)
    return {"exact": lambda a: a, "number": str, "json": json.dumps}[question.grader](question.answer)


@pytest.mark.parametrize("skill", available_skills())
def test_held_out_questions_are_well_formed(skill):
    questions = load_questions([skill])
    assert len(questions) == 64 == len({question.id for question in questions})
    assert len({json.dumps(question.messages[-1:]) + str(question.messages[:-1]) for question in questions}) == 64
    for question in questions:
        assert question.skill == skill and question.id.startswith(f"{skill}-") and question.grader in GRADERS
        roles = [message["role"] for message in question.messages]
        assert roles[0] in ("system", "user") and roles[-1] in ("user", "tool")
        assert all(isinstance(message["content"], str) for message in question.messages)
        assert all(tool["type"] == "function" and tool["function"]["name"] for tool in question.tools)
        if question.grader == "python":
            assert len(question.answer["cases"]) >= 4 and question.answer["function"].isidentifier()
        else:
            assert grade(question.grader, reference(question), question.answer)
            assert not grade(question.grader, reference(question) + " 31337", question.answer)


def test_there_are_fifteen_skills():
    assert len(available_skills()) == 15 and available_skills()[0] == "addition"
