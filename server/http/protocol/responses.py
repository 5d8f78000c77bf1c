"""The pieces of answers that chat and plain completions share: usage, log-probabilities, identities."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from quire.core.messages import CompletionOutput, RequestOutput, TokenLogprob
from quire.server.http.errors import ApiError

if TYPE_CHECKING:
    from quire.core.engine.async_llm import AsyncLLM

__all__ = [
    "Usage",
    "current_timestamp",
    "format_chat_logprobs",
    "format_completion_logprobs",
    "format_prompt_logprobs",
    "mean_logprob",
    "raise_if_failed",
]

_MIN_LOGPROB = -9999.0
"""What stands for minus infinity, which JSON cannot say."""


class Usage:
    """Tokens of one answer, counted as outputs pass by. Each prompt is counted once, whatever ``n``."""

    def __init__(self) -> None:
        self.prompt = self.completion = 0
        self._cached: dict[int, int] = {}  # by prompt

    @property
    def cached(self) -> int:
        """Prompt tokens found in the prefix cache."""
        return sum(self._cached.values())

    def add_output(self, prompt_index: int, output: RequestOutput) -> None:
        """Count one output, whose token ids are new ones."""
        if prompt_index not in self._cached:
            self.prompt += len(output.prompt_token_ids)
        self._cached[prompt_index] = output.num_cached_tokens
        for choice in output.outputs:
            self.completion += len(choice.token_ids)

    def to_dict(self) -> dict[str, Any]:
        """The ``usage`` object."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


def current_timestamp() -> int:
    """The ``created`` field."""
    return int(time.time())


def raise_if_failed(choices: Iterable[CompletionOutput]) -> None:
    """Raise ApiError if the engine gave up on one of them."""
    if any(choice.finish_reason == "error" for choice in choices):
        raise ApiError(500, "the engine failed on this request; the server's log says more", code="engine_error")


def mean_logprob(choice: CompletionOutput) -> float:
    """Mean log-probability per token: what ``best_of`` compares."""
    rows = choice.logprobs or ()
    return sum(row.logprobs[0] for row in rows) / max(1, len(rows))


def format_chat_logprobs(
    engine: AsyncLLM, rows: Sequence[TokenLogprob] | None, top: int, as_ids: bool = False
) -> dict[str, Any] | None:
    """``logprobs`` of a chat choice; with ``as_ids`` tokens are called ``token_id:N``, as several may have one text."""
    if rows is None:
        return None
    return {"content": [_format_chat_position(engine, row, top, as_ids) for row in rows], "refusal": None}


def format_completion_logprobs(
    engine: AsyncLLM,
    rows: Sequence[TokenLogprob | None],
    offsets: Sequence[int],
    first: int | None = None,
    as_ids: bool = False,
) -> dict[str, Any]:
    """``logprobs`` of a plain choice. ``offsets`` are the places of the tokens in its text; ``first`` is the token of a
    row that is None; with ``as_ids`` tokens are called ``token_id:N``."""
    token_ids = [first if row is None else row.token_ids[0] for row in rows]
    return {
        "tokens": ["" if token is None else _name_token(engine, token, as_ids) for token in token_ids],
        "token_logprobs": [None if row is None else _clamp_logprob(row.logprobs[0]) for row in rows],
        "top_logprobs": [None if row is None else _logprobs_by_name(engine, row, as_ids) for row in rows],
        "text_offset": list(offsets),
    }


def format_prompt_logprobs(
    engine: AsyncLLM, rows: Sequence[TokenLogprob | None] | None
) -> list[dict[str, Any] | None] | None:
    """``prompt_logprobs`` by position: token id -> its log-probability, rank and text."""
    if rows is None:
        return None
    return [None if row is None else _logprobs_by_token_id(engine, row) for row in rows]


def _format_chat_position(engine: AsyncLLM, row: TokenLogprob, top: int, as_ids: bool) -> dict[str, Any]:
    best = zip(row.token_ids[1 : 1 + top], row.logprobs[1 : 1 + top], strict=True)
    chosen = _format_chat_token(engine, row.token_ids[0], row.logprobs[0], as_ids)
    return {**chosen, "top_logprobs": [_format_chat_token(engine, token, value, as_ids) for token, value in best]}


def _format_chat_token(engine: AsyncLLM, token: int, value: float, as_ids: bool) -> dict[str, Any]:
    return {
        "token": _name_token(engine, token, as_ids),
        "logprob": _clamp_logprob(value),
        "bytes": list(engine.convert_id_to_bytes(token)),
    }


def _name_token(engine: AsyncLLM, token: int, as_id: bool) -> str:
    return f"token_id:{token}" if as_id else engine.convert_id_to_text(token)


def _logprobs_by_name(engine: AsyncLLM, row: TokenLogprob, as_ids: bool) -> dict[str, float]:
    """Best first; the chosen token is always there. Of tokens with the same text the likeliest counts."""
    named: dict[str, float] = {}
    for token, value in [*zip(row.token_ids[1:], row.logprobs[1:], strict=True), (row.token_ids[0], row.logprobs[0])]:
        named.setdefault(_name_token(engine, token, as_ids), _clamp_logprob(value))
    return named


def _logprobs_by_token_id(engine: AsyncLLM, row: TokenLogprob) -> dict[str, Any]:
    ranks = [row.rank, *range(1, len(row.token_ids))]
    by_token_id: dict[str, Any] = {}
    for token, value, rank in zip(row.token_ids, row.logprobs, ranks, strict=True):
        by_token_id.setdefault(
            str(token),
            {"logprob": _clamp_logprob(value), "rank": rank, "decoded_token": engine.convert_id_to_text(token)},
        )
    return by_token_id


def _clamp_logprob(value: float) -> float:
    return value if value > _MIN_LOGPROB else _MIN_LOGPROB
