"""Prompts as callers give them: a text, token ids, or a mapping that holds either, as in vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quire.core.errors import InvalidRequestError, UnsupportedError

__all__ = ["AnyPrompt", "Prompt", "parse_prompt", "split_prompts"]

Prompt = str | Sequence[int]
AnyPrompt = Prompt | Mapping[str, Any]
"""Also ``{"prompt": TEXT}`` and ``{"prompt_token_ids": IDS}``, each with ``cache_salt`` if wanted."""


def split_prompts(prompts: AnyPrompt | Sequence[AnyPrompt]) -> list[AnyPrompt]:
    """A batch, from a batch or from one prompt."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def parse_prompt(prompt: AnyPrompt) -> tuple[Prompt, str | None]:
    """The text or the token ids of a prompt, and its cache salt. Raises InvalidRequestError for anything else."""
    if not isinstance(prompt, Mapping):
        return prompt, None
    fields = dict(prompt)
    cache_salt = fields.pop("cache_salt", None)
    token_ids, text = fields.pop("prompt_token_ids", None), fields.pop("prompt", None)
    for name, value in fields.items():
        if value:
            message = f"a prompt with {name!r:.60} is not supported; give 'prompt' or 'prompt_token_ids'"
            raise UnsupportedError(message, "prompt")
    if token_ids is None and not isinstance(text, str):
        raise InvalidRequestError("a prompt given as a mapping holds 'prompt' or 'prompt_token_ids'", "prompt")
    return (text if token_ids is None else token_ids), cache_salt
