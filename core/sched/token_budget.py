"""How many tokens a step may compute: the configured number, less after a step that did not fit into memory."""

from __future__ import annotations

from quire.core.config import SchedulerConfig

__all__ = ["TokenBudget"]

_GROW_AFTER_STEPS = 64
"""Steps that must fit before the budget is doubled again."""


class TokenBudget:
    """Halves when memory runs out, and finds its way back. Without chunked prefill it always holds a whole prompt."""

    def __init__(self, config: SchedulerConfig, max_model_len: int) -> None:
        self.num_tokens = config.max_num_batched_tokens
        self.num_shrinks = 0
        self._max_tokens = config.max_num_batched_tokens
        self._min_tokens = 1 if config.chunked_prefill else max_model_len
        self._num_fitting_steps = 0

    def record_fitting_step(self) -> None:
        """A step fitted."""
        if self.num_tokens < self._max_tokens:
            self._num_fitting_steps += 1
            if self._num_fitting_steps >= _GROW_AFTER_STEPS:
                self.num_tokens, self._num_fitting_steps = min(2 * self.num_tokens, self._max_tokens), 0

    def shrink_budget(self, num_tokens: int) -> bool:
        """A step of ``num_tokens`` did not fit: allow half of it. False if that is less than can be allowed."""
        half = min(num_tokens, self.num_tokens) // 2
        if half < self._min_tokens:
            return False
        self.num_tokens, self._num_fitting_steps = half, 0
        self.num_shrinks += 1
        return True
