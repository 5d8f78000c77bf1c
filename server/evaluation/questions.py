"""The held-out questions, read from package data."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.core import assets
from quire.core.errors import ConfigError

__all__ = ["QUESTIONS_FOLDER", "Question", "available_skills", "load_questions"]

QUESTIONS_FOLDER = Path(assets.__file__).resolve().parent / "eval"

#: The order of the report; a file that is not named here comes after these, by name.
_ORDER = (
    "addition", "subtraction", "multiplication", "sorting", "reversing", "counting", "letter_case", "sequence",
    "extraction",
    "tool_call", "tool_result", "facts", "code", "dialogue", "long_context",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Question:
    """One conversation to answer, and what its grader needs to grade the answer."""

    id: str
    skill: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    grader: str
    answer: Any


def available_skills(folder: Path = QUESTIONS_FOLDER) -> list[str]:
    """Name the skills that have questions, in the order of the report."""
    names = {path.stem for path in folder.glob("*.jsonl")}
    return sorted(names, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name))


def load_questions(
    skills: Iterable[str] | None = None, limit: int | None = None, folder: Path = QUESTIONS_FOLDER
) -> list[Question]:
    """Read the questions of ``skills`` (all by default), at most ``limit`` of each. ConfigError for an unknown one."""
    known = available_skills(folder)
    chosen_skills = list(dict.fromkeys(skills)) if skills is not None else known
    questions: list[Question] = []
    for skill in chosen_skills:
        if skill not in known:
            close = difflib.get_close_matches(skill, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
            raise ConfigError(f"no held-out questions for the skill {skill!r}; {hint}")
        lines = (folder / f"{skill}.jsonl").read_text(encoding="utf-8").splitlines()
        for line in lines[:limit]:
            record = json.loads(line)
            questions.append(
                Question(
                    record["id"], skill, record["messages"], record.get("tools", []), record["grader"], record["answer"]
                )
            )
    return questions
