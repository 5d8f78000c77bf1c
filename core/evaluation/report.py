"""What an evaluation found: exact match per skill and overall, as a table or as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

__all__ = ["Failure", "Report", "SkillScore"]


@dataclass(frozen=True, slots=True)
class SkillScore:
    """How many of a skill's questions were answered right."""

    skill: str
    correct: int
    n: int

    @property
    def exact_match(self) -> float:
        """The share answered right, from 0 to 1."""
        return self.correct / self.n if self.n else 0.0


@dataclass(frozen=True, slots=True)
class Failure:
    """One question answered wrong."""

    id: str
    asked: str
    text: str
    answer: Any


@dataclass(frozen=True, slots=True)
class Report:
    """The scores, in the order of the skills, and what went wrong."""

    scores: tuple[SkillScore, ...]
    failures: tuple[Failure, ...] = ()

    @property
    def n(self) -> int:
        """How many questions were asked."""
        return sum(score.n for score in self.scores)

    @property
    def exact_match(self) -> float:
        """The share answered right over all questions."""
        return sum(score.correct for score in self.scores) / self.n if self.n else 0.0

    def table(self) -> str:
        """Lay the scores out for a terminal."""
        width = max([len("overall"), *(len(score.skill) for score in self.scores)])
        lines = [f"{'skill':<{width}}  exact match     n"]
        lines += [f"{score.skill:<{width}}  {score.exact_match:>10.1%}  {score.n:>4}" for score in self.scores]
        lines.append(f"{'overall':<{width}}  {self.exact_match:>10.1%}  {self.n:>4}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: overall, per skill, and the failures."""
        return {
            "exact_match": self.exact_match,
            "n": self.n,
            "skills": {s.skill: {"exact_match": s.exact_match, "correct": s.correct, "n": s.n} for s in self.scores},
            "failures": [{"id": f.id, "asked": f.asked, "text": f.text, "answer": f.answer} for f in self.failures],
        }

    def to_json(self) -> str:
        """Return ``to_dict`` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)
