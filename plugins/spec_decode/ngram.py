"""Prompt lookup decoding: drafts what followed the last n tokens where they occurred before in the same request.

Saxena, 2023, https://github.com/apoorvumang/prompt-lookup-decoding; options have vLLM's names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quire.sdk import HostProposer, Request

__all__ = ["NgramProposer"]


class NgramProposer(HostProposer):
    """Drafts what followed the latest earlier occurrence of the longest n-gram that ends the request.

    Each n-gram enters the request's index once, so that the cost of a step grows with a request's new tokens, not with
    its length.
    """

    @dataclass(frozen=True)
    class Options:
        """Options of the proposer."""

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
        self._ngram_sizes = range(self.options.prompt_lookup_max, self.options.prompt_lookup_min - 1, -1)
        self._indexes: dict[int, _NgramIndex] = {}

    @property
    def num_indexed_requests(self) -> int:
        """Requests that have an index."""
        return len(self._indexes)

    def propose(self, request: Request, num_tokens: int) -> Sequence[int]:
        """Look up the longest n-gram first. An occurrence near the end gives fewer tokens than asked for; they are
        continued with their period."""
        index = self._indexes.setdefault(request.request_id, _NgramIndex())
        token_ids = request.token_ids
        index.add_ngrams(token_ids, self._ngram_sizes)
        for size in self._ngram_sizes:
            if len(token_ids) > size and (end := index.last_end.get(tuple(token_ids[-size:]))) is not None:
                drafts = token_ids[end : end + num_tokens]
                period = len(token_ids) - end
                while len(drafts) < num_tokens:
                    drafts.append(drafts[-period])
                return drafts
        return ()

    def request_finished(self, request: Request) -> None:
        """Drop its index."""
        self._indexes.pop(request.request_id, None)


class _NgramIndex:
    """Where the n-grams of a request end."""

    def __init__(self) -> None:
        self.last_end: dict[tuple[int, ...], int] = {}
        """N-gram -> end of its latest occurrence before the end of the tokens."""
        self._num_indexed = 0

    def add_ngrams(self, token_ids: list[int], ngram_sizes: Sequence[int]) -> None:
        """Enter the n-grams that end before the last token: the one that ends with it has no continuation yet."""
        for end in range(self._num_indexed, len(token_ids)):
            for size in ngram_sizes:
                if end >= size:
                    self.last_end[tuple(token_ids[end - size : end])] = end
        self._num_indexed = max(self._num_indexed, len(token_ids))
