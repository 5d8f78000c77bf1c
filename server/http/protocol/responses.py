"""The pieces of answers that chat and plain completions share: usage, log-probabilities, identities."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quire.core.messages import CompletionOutput, Logprob, RequestOutput
from quire.server.http.errors import ApiError

if TYPE_CHECKING:
    from quire.core.engine.async_llm import AsyncLLM

__all__ = [
    "LOGPROB_BYTES",
    "Usage",
    "current_timestamp",
    "format_chat_logprobs",
    "format_completion_logprobs",
    "format_prompt_logprobs",
    "mean_logprob",
    "raise_if_failed",
]

Logprobs = Mapping[int, Logprob]
LOGPROB_BYTES = 256
"""About what the log-probabilities of a prompt's token take in an answer."""
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
    return (choice.cumulative_logprob or 0.0) / max(1, len(choice.token_ids))


def format_chat_logprobs(
    engine: AsyncLLM, positions: Sequence[Logprobs] | None, top: int | Collection[int], as_ids: bool = False
) -> dict[str, Any] | None:
    """``logprobs`` of a chat choice with the ``top`` best tokens, or with those that ``top`` names. With ``as_ids``
    tokens are called ``token_id:N``, as several may have one text."""
    if positions is None:
        return None
    content = []
    for position in positions:
        chosen = next(iter(position))
        others = sorted(
            (token for token, each in position.items() if _is_listed(token, each, top)),
            key=lambda token: -position[token].logprob,
        )
        if isinstance(top, int):
            del others[top:]  # ranks of equally likely tokens are equal
        formatted = [_format_chat_token(engine, token, position[token], as_ids) for token in (chosen, *others)]
        content.append({**formatted[0], "top_logprobs": formatted[1:]})
    return {"content": content, "refusal": None}


def format_completion_logprobs(
    engine: AsyncLLM,
    positions: Sequence[Logprobs | None],
    offsets: Sequence[int],
    first: int | None = None,
    as_ids: bool = False,
) -> dict[str, Any]:
    """``logprobs`` of a plain choice. ``offsets`` are the places of the tokens in its text; ``first`` is the token of a
    position that is None; with ``as_ids`` tokens are called ``token_id:N``."""
    chosen = [first if position is None else next(iter(position)) for position in positions]
    values = [None if each is None else next(iter(each.values())).logprob for each in positions]
    return {
        "tokens": ["" if token is None else _name_token(engine, token, as_ids, "bytes:") for token in chosen],
        "token_logprobs": [None if value is None else _clamp_logprob(value) for value in values],
        "top_logprobs": [None if each is None else _logprobs_by_name(engine, each, as_ids) for each in positions],
        "text_offset": list(offsets),
    }


def format_prompt_logprobs(positions: Sequence[Logprobs | None] | None) -> list[dict[str, Any] | None] | None:
    """``prompt_logprobs`` by position: token id -> its log-probability, rank and text."""
    if positions is None:
        return None
    return [None if position is None else _logprobs_by_token_id(position) for position in positions]


def _is_listed(token: int, logprob: Logprob, top: int | Collection[int]) -> bool:
    if isinstance(top, int):
        return logprob.rank is not None and logprob.rank <= top
    return token in top


def _format_chat_token(engine: AsyncLLM, token: int, logprob: Logprob, as_ids: bool) -> dict[str, Any]:
    return {
        "token": _name_token(engine, token, as_ids),
        "logprob": _clamp_logprob(logprob.logprob),
        "bytes": list(engine.convert_id_to_bytes(token)),
    }


def _name_token(engine: AsyncLLM, token: int, as_id: bool, bytes_prefix: str = "") -> str:
    """Its text. Bytes that are no characters are written as OpenAI does: ``\\xe2\\x80``, with a prefix in completions,
    which name tokens by their text alone."""
    if as_id:
        return f"token_id:{token}"
    text = engine.convert_id_to_text(token)
    if "\ufffd" not in text:
        return text
    spelled = engine.convert_id_to_bytes(token).decode(errors="backslashreplace")
    return text if spelled == text else bytes_prefix + spelled


def _logprobs_by_name(engine: AsyncLLM, position: Logprobs, as_ids: bool) -> dict[str, float]:
    """Best first; the chosen token is always there. Of tokens with the same text the likeliest counts."""
    named: dict[str, float] = {}
    for token, logprob in sorted(position.items(), key=lambda item: -item[1].logprob):
        named.setdefault(_name_token(engine, token, as_ids, "bytes:"), _clamp_logprob(logprob.logprob))
    return named


def _logprobs_by_token_id(position: Logprobs) -> dict[str, Any]:
    return {
        str(token): {
            "logprob": _clamp_logprob(each.logprob),
            "rank": each.rank,
            "decoded_token": each.decoded_token,
        }
        for token, each in position.items()
    }


def _clamp_logprob(value: float) -> float:
    return value if value > _MIN_LOGPROB else _MIN_LOGPROB
