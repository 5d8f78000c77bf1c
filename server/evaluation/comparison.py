"""Comparison of two models: what B loses of A's answers, and how far its distribution is from A's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from quire.server.evaluation.paired import Estimate, PairedScore, bootstrap
from quire.server.evaluation.questions import Question
from quire.server.evaluation.report import Failure, Report
from quire.server.evaluation.text import TextScores

__all__ = ["Comparison", "Divergence", "pair_scores"]


@dataclass(frozen=True, slots=True)
class Divergence:
    """B's next-token distributions against A's, over the scored tokens of a text."""

    num_tokens: int
    num_windows: int
    perplexity_a: float
    perplexity_b: float
    ratio: Estimate
    """B's perplexity by A's."""
    kl: Estimate
    """Mean Kullback-Leibler divergence of B from A, nats a token, over the whole vocabulary."""
    kl_99: float
    """Its 99th percentile over tokens."""
    same_top: Estimate
    """Share of tokens at which both have the same most likely one."""

    @staticmethod
    def from_scores(a: TextScores, b: TextScores) -> Divergence:
        """From the scores of the same windows, B's with A as reference."""
        return Divergence(
            num_tokens=a.logprob.size,
            num_windows=len(a.logprob),
            perplexity_a=a.perplexity,
            perplexity_b=b.perplexity,
            ratio=bootstrap((a.logprob - b.logprob).mean(1), np.exp),
            kl=bootstrap(b.kl.mean(1)),
            kl_99=float(np.percentile(b.kl, 99)),
            same_top=bootstrap((a.top == b.top).mean(1)),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "tokens": self.num_tokens,
            "windows": self.num_windows,
            "perplexity": {"a": self.perplexity_a, "b": self.perplexity_b, "ratio": self.ratio.to_dict()},
            "kl": {**self.kl.to_dict(), "percentile_99": self.kl_99},
            "same_top_token": self.same_top.to_dict(),
        }


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison."""

    name_a: str
    name_b: str
    report_a: Report
    report_b: Report
    pairs: tuple[PairedScore, ...]
    """By skill."""
    divergence: Divergence | None
    """None where the models do not share a vocabulary."""
    allowed_loss: float = 2.0
    """Points of exact match that B may lose."""

    @cached_property
    def overall(self) -> PairedScore:
        """All questions as one skill."""
        counts = [sum(getattr(p, name) for p in self.pairs) for name in ("both", "only_a", "only_b", "neither")]
        return PairedScore("overall", *counts)

    @property
    def within(self) -> bool:
        """Whether B lost no more than allowed, by the questions that were asked."""
        return not self.overall.n or 100 * self.overall.loss.value <= self.allowed_loss

    def lost_answers(self) -> list[Failure]:
        """What B answered wrong and A right."""
        wrong = {failure.id for failure in self.report_a.failures}
        return [failure for failure in self.report_b.failures if failure.id not in wrong]

    def verdict(self) -> str:
        """One line."""
        if not self.overall.n:
            return "no verdict: A can read none of the questions, for want of context or of a chat template"
        loss = self.overall.loss
        points, low, high = 100 * loss.value, 100 * loss.low, 100 * loss.high
        limit = f"{self.allowed_loss:g} points"
        if high <= self.allowed_loss:
            verdict = f"within {limit}"
        elif low > self.allowed_loss:
            verdict = f"more than {limit}"
        else:
            undecided = f"{self.overall.n} questions do not settle it"
            verdict = f"{'within' if self.within else 'more than'} {limit}, but {undecided}"
        verb = "gains" if points < 0 else "loses"
        return (
            f"B {verb} {abs(points):.1f} points of exact match (95 % CI of the loss {low:.1f}..{high:.1f}): {verdict}"
        )

    def table(self) -> str:
        """Lay everything out for a terminal, the verdict last."""
        width = max([len("overall"), *(len(pair.skill) for pair in self.pairs)])
        lines = [f"A  {self.name_a}", f"B  {self.name_b}", ""]
        lines.append(f"{'skill':<{width}}       A       B    B - A   95 % interval  only A  only B     n")
        for p in (*self.pairs, self.overall):
            a, b, loss = (p.both + p.only_a) / (p.n or 1), (p.both + p.only_b) / (p.n or 1), p.loss
            interval = f"{-100 * loss.high:+.1f} .. {-100 * loss.low:+.1f}"
            lines.append(
                f"{p.skill:<{width}}  {a:>6.1%}  {b:>6.1%}   {-100 * loss.value or 0.0:>+6.1f}  {interval:>14}"
                f"  {p.only_a:>6}  {p.only_b:>6}  {p.n:>4}"
            )
        lines.append(f"{'':<{width}}  McNemar's exact test: p = {self.overall.p_value:.2g}")
        return "\n".join([*lines, "", *self._text_lines(), "", self.verdict()])

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "a": {"model": self.name_a, **self.report_a.to_dict()},
            "b": {"model": self.name_b, **self.report_b.to_dict()},
            "loss": {
                **_loss_dict(self.overall),
                "skills": {p.skill: _loss_dict(p) for p in self.pairs},
            },
            "text": None if self.divergence is None else self.divergence.to_dict(),
            "allowed_points": self.allowed_loss,
            "within": self.within,
            "verdict": self.verdict(),
        }

    def _text_lines(self) -> list[str]:
        d = self.divergence
        if d is None:
            return ["held-out text: not compared, A and B have different vocabularies"]
        r, k, s = d.ratio, d.kl, d.same_top
        return [
            f"held-out text: {d.num_tokens} tokens in {d.num_windows} windows",
            f"perplexity      A {d.perplexity_a:.3f}, B {d.perplexity_b:.3f}: "
            f"{100 * (r.value - 1):+.2f} % ({100 * (r.low - 1):+.2f} .. {100 * (r.high - 1):+.2f})",
            f"KL(A || B)      {k.value:.5f} nats a token ({k.low:.5f} .. {k.high:.5f}), 99th percentile {d.kl_99:.4f}",
            f"same top token  {s.value:.2%} ({s.low:.2%} .. {s.high:.2%})",
        ]


def pair_scores(questions: Sequence[Question], a: Report, b: Report) -> tuple[PairedScore, ...]:
    """Put the verdicts of two reports on the same questions side by side, by skill."""
    wrong_a, wrong_b = {f.id for f in a.failures}, {f.id for f in b.failures}
    counts: dict[str, list[int]] = {}
    for question in questions:
        place = 2 * (question.id in wrong_a) + (question.id in wrong_b)  # both, only A, only B, neither
        counts.setdefault(question.skill, [0, 0, 0, 0])[place] += 1
    return tuple(PairedScore(skill, *c) for skill, c in counts.items())


def _loss_dict(score: PairedScore) -> dict[str, Any]:
    loss = score.loss
    return {
        "points": 100 * loss.value,
        "interval": [100 * loss.low, 100 * loss.high],
        "only_a": score.only_a,
        "only_b": score.only_b,
        "n": score.n,
        "p_value": score.p_value,
    }
