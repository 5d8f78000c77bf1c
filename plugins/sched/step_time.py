"""How long a step of so many tokens takes, learned from the steps that came back."""

from __future__ import annotations

from quire.sdk import StepReport

__all__ = ["StepTimeModel"]

_DECAY = 0.98  # the last 50 steps count
_MIN_STEPS = 4


class StepTimeModel:
    """``fixed + per_token * tokens`` nanoseconds, by least squares over the last steps, each weighted less than the one
    after it. Until some steps are known, or where they are all of one size, a step takes their mean."""

    def __init__(self) -> None:
        self._count = self._tokens = self._ns = self._tokens_squared = self._tokens_ns = 0.0
        self.num_steps = 0
        self.fixed_ns, self.per_token_ns = 0.0, 0.0

    @property
    def is_known(self) -> bool:
        """Whether there were steps to learn from."""
        return self.num_steps >= _MIN_STEPS

    def record_report(self, report: StepReport) -> None:
        """Learn from the steps of a report that were timed."""
        for step in report.finished_steps:
            if step.device_us > 0:
                self.record_step(step.num_tokens, step.device_us * 1e3)

    def record_step(self, num_tokens: int, ns: float) -> None:
        """A step of ``num_tokens`` took ``ns`` nanoseconds."""
        self.num_steps += 1
        self._count = _DECAY * self._count + 1
        self._tokens = _DECAY * self._tokens + num_tokens
        self._ns = _DECAY * self._ns + ns
        self._tokens_squared = _DECAY * self._tokens_squared + num_tokens * num_tokens
        self._tokens_ns = _DECAY * self._tokens_ns + num_tokens * ns
        mean_tokens, mean_ns = self._tokens / self._count, self._ns / self._count
        variance = self._tokens_squared / self._count - mean_tokens**2
        slope = 0.0
        if variance > 0.01 * mean_tokens**2:
            slope = (self._tokens_ns / self._count - mean_tokens * mean_ns) / variance
        # Neither part of a step's time is negative.
        self.per_token_ns = min(max(slope, 0.0), mean_ns / max(mean_tokens, 1.0))
        self.fixed_ns = mean_ns - self.per_token_ns * mean_tokens

    def estimate_ns(self, num_tokens: float) -> float:
        """How long a step of so many tokens takes."""
        return self.fixed_ns + self.per_token_ns * num_tokens

    def fit_tokens(self, ns: float, limit: int) -> int:
        """How many tokens fit into a step of ``ns`` nanoseconds, 1 to ``limit``."""
        if not self.is_known or self.per_token_ns <= 0:
            return limit
        return int(min(max((ns - self.fixed_ns) / self.per_token_ns, 1), limit))
