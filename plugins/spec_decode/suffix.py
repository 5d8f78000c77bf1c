"""Suffix lookup: what followed the longest suffix of a request that was seen before, in it or in another.

The index is a suffix automaton (Blumer et al., 1985) of many texts that grow at once; drafting from suffixes of earlier
outputs is from SuffixDecoding (Oliaro et al., 2024, arXiv:2411.04975).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from quire.sdk import HostProposer, Request

__all__ = ["SuffixProposer"]

_AT_ONCE = 256
"""Tokens of a prompt that are indexed in one step."""
_SALTS = 32
"""Groups of requests that are remembered beyond their end."""


class SuffixProposer(HostProposer):
    """Proposes what followed the most recent earlier occurrence of the longest suffix.

    Prompts and outputs of every request go into one automaton for each cache salt, so that requests learn from each
    other within a salt and never across. An automaton that holds ``max_tokens`` is given up for a fresh one.
    """

    @dataclass(frozen=True)
    class Options:
        """Options of the proposer."""

        min_match: int = 2
        """Shortest suffix that counts, in tokens."""
        max_tokens: int = 100_000
        """Tokens in an index before a fresh one is begun: about 100 MB."""

        def __post_init__(self) -> None:
            if self.min_match < 1 or self.max_tokens < 1:
                raise ValueError(f"min_match and max_tokens are positive, got {self.min_match}, {self.max_tokens}")

    def __init__(self, num_tokens: int, options: Options | None = None) -> None:
        super().__init__(num_tokens, options or self.Options())
        self._shared: OrderedDict[str | None, _Automaton] = OrderedDict()
        self._cursors: dict[str, _Cursor] = {}

    def propose(self, request: Request, num_tokens: int) -> Sequence[int]:
        """Take in what is new, and follow the suffix."""
        cursor = self._cursors.get(request.request_id)
        if cursor is None:
            cursor = self._cursors[request.request_id] = _Cursor(self._automaton(request.cache_salt), request.token_ids)
        cursor.advance(_AT_ONCE)
        return cursor.follow(num_tokens, self.options.min_match)

    def request_finished(self, request: Request) -> None:
        """Its text stays in the index."""
        self._cursors.pop(request.request_id, None)

    def _automaton(self, salt: str | None) -> _Automaton:
        found = self._shared.get(salt)
        if found is None or found.num_tokens >= self.options.max_tokens:
            found = self._shared[salt] = _Automaton()
        self._shared.move_to_end(salt)
        if len(self._shared) > _SALTS:
            self._shared.popitem(last=False)
        return found


class _Automaton:
    """States by number; 0 is the empty text. A state stands for suffixes that occur at the same places."""

    def __init__(self) -> None:
        self.next: list[dict[int, int]] = [{}]
        self.link = [-1]
        self.length = [0]
        self.seen: list[tuple[list[int], int]] = [([], 0)]
        """A text, and how many of its tokens end with the state's."""
        self.num_tokens = 0

    def extend(self, last: int, token: int, place: tuple[list[int], int]) -> int:
        """The state of the text of ``last`` with ``token`` behind it, which ends at ``place``."""
        self.num_tokens += 1
        old = self.next[last].get(token)
        if old is not None:
            return old if self.length[old] == self.length[last] + 1 else self._split(last, token, old)
        state = self._make({}, self.length[last] + 1, 0, place)
        at = last
        while at >= 0 and token not in self.next[at]:
            self.next[at][token] = state
            at = self.link[at]
        if at >= 0:
            old = self.next[at][token]
            self.link[state] = old if self.length[old] == self.length[at] + 1 else self._split(at, token, old)
        return state

    def _split(self, at: int, token: int, old: int) -> int:
        """The suffixes of ``old`` no longer than that of ``at`` with ``token`` become a state of their own."""
        state = self._make(dict(self.next[old]), self.length[at] + 1, self.link[old], self.seen[old])
        self.link[old] = state
        while at >= 0 and self.next[at].get(token) == old:
            self.next[at][token] = state
            at = self.link[at]
        return state

    def _make(self, following: dict[int, int], length: int, link: int, place: tuple[list[int], int]) -> int:
        self.next.append(following)
        self.length.append(length)
        self.link.append(link)
        self.seen.append(place)
        return len(self.next) - 1


class _Cursor:
    """How far a request's text is in the automaton."""

    def __init__(self, automaton: _Automaton, text: list[int]) -> None:
        self._automaton = automaton
        self._text = text
        self._length = self._state = 0

    def advance(self, most: int) -> None:
        """Take in new tokens."""
        for end in range(self._length, min(len(self._text), self._length + most)):
            self._state = self._automaton.extend(self._state, self._text[end], (self._text, end + 1))
            self._length = end + 1

    def follow(self, count: int, shortest: int) -> list[int]:
        """``count`` tokens, or fewer, from where the longest suffix occurred before."""
        index, text, end = self._automaton, self._text, self._length
        if end < len(text):
            return []
        state = self._state
        seen_text, seen = index.seen[state]
        if seen_text is text and seen == end:  # the whole text came never before: the longest part that did
            state = index.link[state]
        if state <= 0 or index.length[state] < shortest:
            return []
        seen_text, seen = index.seen[state]
        index.seen[state] = (text, end)
        found = seen_text[seen : seen + count]
        if seen_text is text and found:
            period = end - seen
            while len(found) < count:
                found.append(found[-period])
        return found
