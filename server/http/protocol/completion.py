"""The body of ``/v1/completions``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from quire.core.sampling_params import SamplingParams
from quire.server.http.errors import ApiError
from quire.server.http.protocol.common import (
    TOKEN_IDS_SCHEMA,
    GenerationBody,
    Int32,
    UnsupportedField,
    check_token_ids,
    unsupported_error,
)

__all__ = ["CompletionBody"]

_UNSUPPORTED_IN_COMPLETIONS = (
    UnsupportedField("top_logprobs", "it belongs to /v1/chat/completions; give logprobs, a number", (0,)),
    UnsupportedField("tools", "they belong to /v1/chat/completions; leave them out"),
)

_MAX_PROMPTS = _MAX_SEQUENCES = 1024
_MAX_STOP_CHARS = 4_194_304


_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": _MAX_PROMPTS},
        {**TOKEN_IDS_SCHEMA, "minItems": 1},
        {"type": "array", "items": TOKEN_IDS_SCHEMA, "minItems": 1, "maxItems": _MAX_PROMPTS},
    ]
}


def _normalize_prompts(value: Any) -> Any:
    """Every form of ``prompt`` as a list of prompts, each a string or a list of token ids."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError(
            "should be a string, a list of strings, a list of token ids or a list of such lists, not empty"
        )
    if isinstance(value[0], int):
        value = [value]
    if all(isinstance(each, str) for each in value) or all(isinstance(each, list) for each in value):
        for each in value:
            check_token_ids(each)
        if len(value) > _MAX_PROMPTS:
            raise ValueError(f"holds {len(value)} prompts, the limit is {_MAX_PROMPTS}; send several requests")
        return value
    raise ValueError("mixes strings, token ids and lists; give one kind")


class CompletionBody(GenerationBody):
    """A completion."""

    prompt: Annotated[list[Any], BeforeValidator(_normalize_prompts), WithJsonSchema(_PROMPT_SCHEMA)]
    """Whatever form it came in: a list of prompts, each a string or a list of token ids."""
    max_completion_tokens: Int32 | None = None
    """``max_tokens`` by its name in chats: load generators send both."""
    logprobs: Int32 | None = None
    echo: bool | None = None
    best_of: Int32 | None = None
    suffix: str | None = None

    @classmethod
    def unsupported_fields(cls) -> tuple[UnsupportedField, ...]:
        """Those of chats that would change an answer."""
        return (*super().unsupported_fields(), *_UNSUPPORTED_IN_COMPLETIONS)

    @property
    def token_limit(self) -> int | None:
        """The longest answer, by either of its names."""
        return self.max_tokens if self.max_tokens is not None else self.max_completion_tokens

    @property
    def echo_only(self) -> bool:
        """Whether only the prompt is to be echoed: ``max_tokens`` 0, as evaluations ask for."""
        return bool(self.echo) and self.token_limit == 0

    def to_sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """The engine's parameters, ``n`` being ``best_of`` if it is larger, with the model's ``defaults`` where the
        body says nothing. Raises ApiError or InvalidRequestError."""
        self.check_supported()
        if self.suffix:
            raise unsupported_error("suffix", "insertion is not supported; leave it out")
        if self.echo and self.truncate_prompt_tokens is not None:
            raise unsupported_error("truncate_prompt_tokens", "not available with echo; leave one of them out")
        overrides: dict[str, Any] = {"add_special_tokens": self.add_special_tokens is not False}
        if self.token_limit is not None:
            overrides["max_tokens"] = 1 if self.echo_only else self.token_limit
        if self.max_completion_tokens not in (None, self.token_limit):
            message = f"max_completion_tokens: {self.max_completion_tokens} contradicts max_tokens={self.max_tokens}"
            raise ApiError(400, f"{message}; give one of them", param="max_completion_tokens")
        if self.logprobs is not None:
            overrides["logprobs"] = self.logprobs
            if self.echo:
                overrides["prompt_logprobs"] = self.logprobs
        n = self.n if self.n is not None else 1
        if self.best_of is not None and self.best_of != n:
            if self.best_of < n:
                raise ApiError(400, f"best_of: must be at least n={n}, got {self.best_of}", param="best_of")
            if self.stream:
                raise unsupported_error("best_of", "larger than n it is not available in a stream; leave stream out")
            overrides |= {"n": self.best_of, "logprobs": self.logprobs or 0}
        params = self.build_sampling_params(defaults, **overrides)
        num_sequences = len(self.prompt) * params.n
        if num_sequences > _MAX_SEQUENCES:
            message = f"n: {len(self.prompt)} prompts with {params.n} answers each are {num_sequences} sequences"
            raise ApiError(400, f"{message}, the limit is {_MAX_SEQUENCES}; send several requests", param="n")
        self._check_stop_strings()
        return params

    def _check_stop_strings(self) -> None:
        """Each prompt's request has its own copy of them."""
        num_chars = sum(map(len, self.stop)) if isinstance(self.stop, list) else 0
        if num_chars * len(self.prompt) > _MAX_STOP_CHARS:
            message = f"stop: {num_chars} characters for each of {len(self.prompt)} prompts; shorten them"
            raise ApiError(400, f"{message} or send several requests", param="stop")
