"""The report of an evaluation: exact match per skill and overall, as a table or as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

__all__ = ["Failure", "Report", "SkillScore", "wilson_interval"]

_Z = 1.959963984540054  # of 95 %


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % confidence interval of a share, from 0 to 1; it stays within the unit interval."""
    if not n:
        return 0.0, 1.0
    share, spread = correct / n, _Z * _Z / n
    middle = share + spread / 2
    half = _Z * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    low, high = (middle - half) / (1 + spread), (middle + half) / (1 + spread)
    return (max(0.0, low) if correct else 0.0), (min(1.0, high) if correct < n else 1.0)


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

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of ``exact_match``."""
        return wilson_interval(self.correct, self.n)


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
    def overall(self) -> SkillScore:
        """All questions as one skill."""
        return SkillScore("overall", sum(s.correct for s in self.scores), sum(s.n for s in self.scores))

    @property
    def n(self) -> int:
        """How many questions were asked."""
        return self.overall.n

    @property
    def exact_match(self) -> float:
        """The share answered right over all questions."""
        return self.overall.exact_match

    def table(self) -> str:
        """Lay the scores out for a terminal."""
        width = max([len("overall"), *(len(score.skill) for score in self.scores)])
        lines = [f"{'skill':<{width}}  exact match   95 % interval     n"]
        for score in (*self.scores, self.overall):
            low, high = score.interval
            lines.append(
                f"{score.skill:<{width}}  {score.exact_match:>11.1%}  {low:>6.1%} - {high:>6.1%}  {score.n:>4}"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: overall, per skill, and the failures."""
        return {
            **_score_dict(self.overall),
            "skills": {score.skill: _score_dict(score) for score in self.scores},
            "failures": [{"id": f.id, "asked": f.asked, "text": f.text, "answer": f.answer} for f in self.failures],
        }

    def to_json(self) -> str:
        """Return ``to_dict`` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)


def _score_dict(score: SkillScore) -> dict[str, Any]:
    return {
        "exact_match": score.exact_match,
        "interval": list(score.interval),
        "correct": score.correct,
        "n": score.n,
    }
