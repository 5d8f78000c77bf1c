"""Prompt lookup: what followed the last few tokens when they came before in the same request (Saxena, 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quire.sdk import HostProposer, Request

__all__ = ["NgramProposer"]


class NgramProposer(HostProposer):
    """Proposes what followed the latest earlier occurrence of the longest n-gram that ends the request.

    Every n-gram is entered once, so a step costs a request as much as it gained.
    """

    @dataclass(frozen=True)
    class Options:
        """Options of the proposer, by vLLM's names."""

        prompt_lookup_min: int = 2
        """Shortest n-gram that is looked up, in tokens."""
        prompt_lookup_max: int = 4
        """Longest n-gram that is looked up, in tokens."""

        def __post_init__(self) -> None:
            if not 1 <= self.prompt_lookup_min <= self.prompt_lookup_max <= 16:
                raise ValueError(
                    "prompt_lookup_min and prompt_lookup_max must be 1 to 16 and in this order, got "
                    f"{self.prompt_lookup_min} and {self.prompt_lookup_max}"
                )

    def __init__(self, num_tokens: int, options: Options | None = None) -> None:
        super().__init__(num_tokens, options or self.Options())
        self._sizes = range(self.options.prompt_lookup_max, self.options.prompt_lookup_min - 1, -1)
        self._known: dict[str, _Index] = {}

    def propose(self, request: Request, num_tokens: int) -> Sequence[int]:
        """Look up, longest first. Where the earlier occurrence is near the end its continuation repeats itself."""
        index = self._known.setdefault(request.request_id, _Index())
        tokens = request.token_ids
        index.extend(tokens, self._sizes)
        for size in self._sizes:
            if len(tokens) > size and (end := index.before.get(tuple(tokens[-size:]))) is not None:
                found = tokens[end : end + num_tokens]
                period = len(tokens) - end
                while len(found) < num_tokens:
                    found.append(found[-period])
                return found
        return ()

    def request_finished(self, request: Request) -> None:
        """Drop its index."""
        self._known.pop(request.request_id, None)


class _Index:
    """Where the n-grams of a request end."""

    def __init__(self) -> None:
        self.before: dict[tuple[int, ...], int] = {}
        """N-gram -> end of its latest occurrence before the end of the tokens."""
        self._length = 0

    def extend(self, tokens: list[int], sizes: Sequence[int] | Any) -> None:
        """Enter the n-grams that end before the last token."""
        for end in range(self._length, len(tokens)):
            for size in sizes:
                if end >= size:
                    self.before[tuple(tokens[end - size : end])] = end
        self._length = max(self._length, len(tokens))
