"""The report: shares, intervals, JSON; and how questions are asked and counted."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.core.errors import ConfigError
from quire.server.evaluation import Question, Report, SkillScore, evaluate, load_questions
from quire.server.evaluation.report import wilson_interval


def question(name, answer, skill="s"):
    return Question(name, skill, [{"role": "user", "content": f"{name}?"}], [], "exact", answer)


def test_answers_are_counted_by_skill():
    asked = [question("a", "1"), question("b", "2"), question("c", "3", "t")]
    seen = []

    def generate(conversations):
        seen.extend(conversations)
        return ["1", "wrong", " 3 "]

    report = evaluate(generate, questions=asked)
    assert [(s.skill, s.correct, s.n) for s in report.scores] == [("s", 1, 2), ("t", 1, 1)]
    assert seen == [(each.messages, each.tools) for each in asked]
    assert (report.n, report.exact_match) == (3, 2 / 3)
    [failure] = report.failures
    assert (failure.id, failure.asked, failure.text, failure.answer) == ("b", "b?", "wrong", "2")
    decoded = json.loads(report.to_json())
    assert decoded["exact_match"] == 2 / 3 and decoded["n"] == 3 and decoded["correct"] == 2
    assert decoded["skills"]["s"] == {"exact_match": 0.5, "interval": list(wilson_interval(1, 2)), "correct": 1, "n": 2}
    assert decoded["failures"] == [{"id": "b", "asked": "b?", "text": "wrong", "answer": "2"}]
    lines = report.table().splitlines()
    assert len(lines) == 4 and lines[1].split() == ["s", "50.0%", "9.5%", "-", "90.5%", "2"]


def test_an_answer_for_each_question():
    with pytest.raises(ValueError, match="given 1 conversations and returned 0"):
        evaluate(lambda conversations: [], questions=[question("a", "1")])


def test_nothing_asked():
    assert Report(()).exact_match == 0 and Report(()).n == 0 and "overall" in Report(()).table()


@given(st.integers(0, 2000), st.integers(0, 2000))
def test_intervals(correct, wrong):
    n = correct + wrong
    low, high = wilson_interval(correct, n)
    assert 0 <= low <= (correct / n if n else 0.5) <= high <= 1
    assert SkillScore("s", correct, n).interval == (low, high)
    if n:
        mirrored = wilson_interval(wrong, n)
        assert abs(low + mirrored[1] - 1) < 1e-9
        assert high - low > wilson_interval(correct * 4, n * 4)[1] - wilson_interval(correct * 4, n * 4)[0]


def test_a_known_interval():
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I, method 3


def test_choosing_questions():
    questions = load_questions(["sorting", "addition", "sorting"], 3)
    assert [each.id for each in questions] == [f"{s}-{i:03}" for s in ("sorting", "addition") for i in range(3)]
    assert len(load_questions()) == 960
    with pytest.raises(ConfigError, match="'tool_cal'; did you mean tool_call"):
        load_questions(["tool_cal"])
    with pytest.raises(ConfigError, match="there are addition, subtraction"):
        load_questions(["?"])
