"""What tokens stand for, looked up once each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["TokenTable", "TokenView"]

T = TypeVar("T")


class TokenTable(dict[int, T]):
    """Token ids to texts or bytes, by a function that is called once for each."""

    def __init__(self, convert: Callable[[int], T], known: Mapping[int, T] | None = None) -> None:
        super().__init__(known or {})
        self._convert = convert

    def __missing__(self, token_id: int) -> T:
        value = self[token_id] = self._convert(token_id)
        return value


@dataclass(frozen=True, slots=True)
class TokenView:
    """Tokens as decoders see them."""

    hidden: frozenset[int]
    """Tokens that add no text."""
    token_bytes: Mapping[int, bytes]
    """Of every token; empty for hidden ones."""
    piece_texts: dict[int, str]
    """What tokens add to a text that they do not begin. Filled by decoders as they meet them, unless the tokenizer
    ``spells_by_context``."""
