"""Asks every question once and counts the right answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from quire.server.evaluation.graders import grade
from quire.server.evaluation.questions import Question, load_questions
from quire.server.evaluation.report import Failure, Report, SkillScore

__all__ = ["MAX_NEW_TOKENS", "Generate", "evaluate"]

#: Given conversations as (messages, tools), returns the assistant's text for each, in order.
Generate = Callable[[Sequence[tuple[list[dict[str, Any]], list[dict[str, Any]]]]], Sequence[str]]

#: Enough for every right answer; a longer one is wrong.
MAX_NEW_TOKENS = 224


def evaluate(
    generate: Generate,
    skills: Iterable[str] | None = None,
    *,
    limit: int | None = None,
    questions: Sequence[Question] | None = None,
) -> Report:
    """Answer the held-out questions (every skill, unless named; at most ``limit`` of each) and grade the answers.

    ``generate`` is called once, with everything, so that an engine can batch as it likes.
    """
    questions_asked = list(questions) if questions is not None else load_questions(skills, limit)
    texts = list(generate([(question.messages, question.tools) for question in questions_asked]))
    if len(texts) != len(questions_asked):
        raise ValueError(f"generate was given {len(questions_asked)} conversations and returned {len(texts)} texts")
    counts: dict[str, list[int]] = {}
    failures: list[Failure] = []
    for question, text in zip(questions_asked, texts, strict=True):
        right = grade(question.grader, text, question.answer)
        count = counts.setdefault(question.skill, [0, 0])
        count[0] += right
        count[1] += 1
        if not right:
            failures.append(Failure(question.id, str(question.messages[-1]["content"])[-200:], text, question.answer))
    scores = tuple(SkillScore(skill, correct, n) for skill, (correct, n) in counts.items())
    return Report(scores, tuple(failures))
