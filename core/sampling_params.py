"""Sampling parameters of one request."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from quire.core.errors import InvalidRequestError

__all__ = ["MAX_LOGPROBS", "SamplingParams"]

MAX_LOGPROBS = 20
"""The most alternatives a caller can ask for at a position, as in the OpenAI API."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling parameters, with the names and defaults of the OpenAI and vLLM APIs.

    A token is ``argmax(logits / temperature + Gumbel(seed, position))`` over the allowed tokens; temperature 0 is
    greedy. Order: penalties, logits processors, temperature, min-p, top-k, top-p.

    ``max_tokens=None`` means: until the context is full. ``seed=None`` takes a fresh one. ``stop`` strings are cut
    from the text (unless ``include_stop_str_in_output``); ``stop_token_ids`` end a request like EOS does.
    ``logprobs=k`` returns the chosen token's log-probability and the ``k`` best, of the model's raw distribution.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: list[str] = []
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    extra_args: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            msgspec.structs.force_setattr(self, "stop", [self.stop])
        elif self.stop is None:
            msgspec.structs.force_setattr(self, "stop", [])
        if self.stop_token_ids is None:
            msgspec.structs.force_setattr(self, "stop_token_ids", [])
        if self.top_k == -1:
            msgspec.structs.force_setattr(self, "top_k", 0)
        self._validate()

    @property
    def greedy(self) -> bool:
        """Whether the argmax is taken without noise."""
        return self.temperature == 0.0

    def _validate(self) -> None:
        whole = ("n", "top_k", "min_tokens")
        real = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        for name in (*whole, *real):
            value: Any = getattr(self, name)
            number = isinstance(value, int if name in whole else int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value):
                raise InvalidRequestError(f"{name} must be a finite number, got {value!r}", name)
        _check_range("n", self.n, 1, 128)
        _check_range("temperature", self.temperature, 0.0, 100.0)
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidRequestError(f"top_p must be in (0, 1], got {self.top_p}", "top_p")
        _check_range("top_k", self.top_k, 0, None, "; 0 or -1 turns it off")
        _check_range("min_p", self.min_p, 0.0, 1.0)
        if not 0.0 < self.repetition_penalty <= 100.0:
            raise InvalidRequestError(
                f"repetition_penalty must be in (0, 100], got {self.repetition_penalty}", "repetition_penalty"
            )
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.max_tokens is not None:
            _check_range("max_tokens", self.max_tokens, 1, None)
        _check_range("min_tokens", self.min_tokens, 0, self.max_tokens)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _check_range(name, value, 0, MAX_LOGPROBS)
        if self.seed is not None:
            _check_range("seed", self.seed, -(2**63), 2**63 - 1)
        for bias in (self.logit_bias or {}).values():
            _check_range("logit_bias", bias, -100.0, 100.0)
        if not all(isinstance(s, str) and s for s in self.stop):
            raise InvalidRequestError(f"stop must hold non-empty strings, got {self.stop!r}", "stop")
        if self.stop and not self.detokenize:
            raise InvalidRequestError("stop strings need detokenize=True; use stop_token_ids instead", "stop")


def _check_range(name: str, value: float, low: float, high: float | None, hint: str = "") -> None:
    if value < low or (high is not None and value > high):
        limit = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InvalidRequestError(f"{name} must be {limit}, got {value}{hint}", name)
