"""How many tokens a step may compute: the configured number, less after a step that did not fit into memory."""

from __future__ import annotations

from quire.core.config import SchedulerConfig

__all__ = ["Budget"]

_PATIENCE = 64
"""Steps that must fit before the budget is doubled again."""


class Budget:
    """Halves when memory runs out, and finds its way back. Without chunked prefill it always holds a whole prompt."""

    def __init__(self, config: SchedulerConfig, max_model_len: int) -> None:
        self.tokens = config.max_num_batched_tokens
        self.num_shrinks = 0
        self._most = config.max_num_batched_tokens
        self._least = 1 if config.chunked_prefill else max_model_len
        self._fitted = 0

    def landed(self) -> None:
        """A step fitted."""
        if self.tokens < self._most:
            self._fitted += 1
            if self._fitted >= _PATIENCE:
                self.tokens, self._fitted = min(2 * self.tokens, self._most), 0

    def shrink(self, num_tokens: int) -> bool:
        """A step of ``num_tokens`` did not fit: allow half of it. False if that is less than can be allowed."""
        half = min(num_tokens, self.tokens) // 2
        if half < self._least:
            return False
        self.tokens, self._fitted = half, 0
        self.num_shrinks += 1
        return True
