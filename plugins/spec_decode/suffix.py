"""Suffix decoding: drafts what followed the longest suffix of a request that occurred before, in it or in another.

Drafting from suffixes of earlier outputs is from SuffixDecoding (Oliaro et al., 2024, arXiv:2411.04975), which keeps
them in suffix trees. Here they are in a suffix automaton (Blumer et al., 1985), a smaller index of the same suffixes,
of many sequences that grow at once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from quire.sdk import HostProposer, Request

__all__ = ["SuffixProposer"]

_MAX_NEW_TOKENS_PER_STEP = 256
"""Tokens of a request that are indexed in one step, so that a long prompt does not hold up the step."""
_MAX_AUTOMATA = 32
"""Automata that are kept, the most recently used ones."""


class SuffixProposer(HostProposer):
    """Drafts what followed the most recent earlier occurrence of the longest suffix.

    Prompts and outputs of all requests go into one automaton for each cache salt and adapter: a request may be drafted
    from another one's tokens within these, and never across. When a request arrives and the automata hold
    more than ``max_tokens``, the least recently used are dropped, and an automaton that alone holds as many is replaced
    by a new one; requests that run keep theirs.
    """

    @dataclass(frozen=True)
    class Options:
        """Options of the proposer."""

        min_match: int = 2
        """Shortest suffix that is drafted from, in tokens."""
        max_tokens: int = 100_000
        """Tokens that all automata hold together: about 100 MB."""

        def __post_init__(self) -> None:
            if self.min_match < 1 or self.max_tokens < 1:
                raise ValueError(f"min_match and max_tokens are positive, got {self.min_match}, {self.max_tokens}")

    def __init__(self, num_tokens: int, options: Options | None = None) -> None:
        super().__init__(num_tokens, options or self.Options())
        self._automata: OrderedDict[tuple[str, ...], _SuffixAutomaton] = OrderedDict()
        """By ``Request.extra_keys``, the least recently used first."""
        self._cursors: dict[int, _RequestCursor] = {}

    @property
    def num_held_tokens(self) -> int:
        """Tokens that all automata hold."""
        return sum(automaton.num_tokens for automaton in self._automata.values())

    def propose(self, request: Request, num_tokens: int) -> Sequence[int]:
        """Index the request's new tokens, and draft from its longest suffix."""
        cursor = self._cursors.get(request.request_id)
        if cursor is None:
            automaton = self._get_automaton(request.extra_keys)
            cursor = self._cursors[request.request_id] = _RequestCursor(automaton, request.token_ids)
        cursor.index_new_tokens(_MAX_NEW_TOKENS_PER_STEP)
        return cursor.draft_tokens(num_tokens, self.options.min_match)

    def request_finished(self, request: Request) -> None:
        """Its tokens stay in the automaton."""
        self._cursors.pop(request.request_id, None)

    def _get_automaton(self, keys: tuple[str, ...]) -> _SuffixAutomaton:
        automaton = self._automata.get(keys)
        if automaton is None or automaton.num_tokens >= self.options.max_tokens:
            automaton = self._automata[keys] = _SuffixAutomaton()
        self._automata.move_to_end(keys)
        while len(self._automata) > _MAX_AUTOMATA or self.num_held_tokens > self.options.max_tokens:
            self._automata.popitem(last=False)
        return automaton


class _SuffixAutomaton:
    """States by number; 0 is the empty sequence. A state stands for sequences that end at the same occurrences."""

    def __init__(self) -> None:
        self.transitions: list[dict[int, int]] = [{}]
        self.suffix_link = [-1]
        """The state of the longest suffix that occurs elsewhere, too."""
        self.length = [0]
        """Of the longest sequence of a state."""
        self.last_occurrence: list[tuple[list[int], int]] = [([], 0)]
        """Tokens of a request, and where in them a sequence of the state ends."""
        self.num_tokens = 0
        """Tokens of the requests that have occurrences here: what it holds grows with them."""

    def append_token(self, last: int, token: int, occurrence: tuple[list[int], int]) -> int:
        """The state of the sequence of ``last`` with ``token`` behind it, which ends at ``occurrence``."""
        target = self.transitions[last].get(token)
        if target is not None:  # another request has had this sequence
            return target if self.length[target] == self.length[last] + 1 else self._clone_state(last, token, target)
        state = self._add_state({}, self.length[last] + 1, 0, occurrence)
        source = last
        while source >= 0 and token not in self.transitions[source]:
            self.transitions[source][token] = state
            source = self.suffix_link[source]
        if source >= 0:
            target = self.transitions[source][token]
            if self.length[target] != self.length[source] + 1:
                target = self._clone_state(source, token, target)
            self.suffix_link[state] = target
        return state

    def _clone_state(self, source: int, token: int, target: int) -> int:
        """Give the sequences of ``target`` that are no longer than those of ``source`` with ``token`` a state of their
        own."""
        clone = self._add_state(
            dict(self.transitions[target]),
            self.length[source] + 1,
            self.suffix_link[target],
            self.last_occurrence[target],
        )
        self.suffix_link[target] = clone
        while source >= 0 and self.transitions[source].get(token) == target:
            self.transitions[source][token] = clone
            source = self.suffix_link[source]
        return clone

    def _add_state(
        self, transitions: dict[int, int], length: int, suffix_link: int, occurrence: tuple[list[int], int]
    ) -> int:
        self.transitions.append(transitions)
        self.length.append(length)
        self.suffix_link.append(suffix_link)
        self.last_occurrence.append(occurrence)
        return len(self.transitions) - 1


class _RequestCursor:
    """How far a request's tokens are in the automaton, and the state of those that are."""

    def __init__(self, automaton: _SuffixAutomaton, token_ids: list[int]) -> None:
        self._automaton = automaton
        self._token_ids = token_ids
        self._num_indexed = self._num_counted = self._state = 0

    def index_new_tokens(self, max_new_tokens: int) -> None:
        """Append the request's tokens to the automaton, as many as are new and no more than so many."""
        self._automaton.num_tokens += len(self._token_ids) - self._num_counted
        self._num_counted = len(self._token_ids)
        for i in range(self._num_indexed, min(len(self._token_ids), self._num_indexed + max_new_tokens)):
            self._state = self._automaton.append_token(self._state, self._token_ids[i], (self._token_ids, i + 1))
            self._num_indexed = i + 1

    def draft_tokens(self, num_tokens: int, min_match: int) -> list[int]:
        """``num_tokens`` tokens, or fewer, that followed the latest occurrence of the longest suffix."""
        automaton, token_ids, end = self._automaton, self._token_ids, self._num_indexed
        if end < len(token_ids):
            return []
        state = self._state
        other_ids, other_end = automaton.last_occurrence[state]
        if other_ids is token_ids and other_end == end:  # this occurrence itself: take the longest suffix with another
            state = automaton.suffix_link[state]
        if state <= 0 or automaton.length[state] < min_match:
            return []
        other_ids, other_end = automaton.last_occurrence[state]
        automaton.last_occurrence[state] = (token_ids, end)
        drafts = other_ids[other_end : other_end + num_tokens]
        if other_ids is token_ids and drafts:  # an occurrence near the end gives fewer: go on with the period
            period = end - other_end
            while len(drafts) < num_tokens:
                drafts.append(drafts[-period])
        return drafts
