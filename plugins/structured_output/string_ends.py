"""What may come at the end of a JSON string: tokens with its closing quote, by what they write behind that.

Whether such a token may come is a matter of how many characters it writes before the quote, and of what it writes
behind it. The second is the same wherever in the string the answer is, so one look behind the quote, taken ahead of
time, says which of thousands of tokens may come at every length.
"""

from __future__ import annotations

import itertools
import re
import threading
from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import NamedTuple

import llguidance
import numpy as np
from numpy.typing import NDArray

__all__ = ["ClosingTokens", "GrammarMemory", "KnownMask", "StringEnd", "StringInside", "forget_digits", "is_set"]

_ESCAPE = re.compile(rb"\\(?:u[0-9a-fA-F]{4}|.)")
_IN_NUMBER = re.compile(rb":\s*-?[\d.eE+-]*\d[\d.eE+-]*")
_INTEGER_PART = re.compile(rb"(?<=[:\s-])[1-9]\d*")
_OTHER_DIGITS = re.compile(rb"(?<=[.eE+])\d+|(?<=[eE]-)\d+")
_MAX_BYTES = 2 << 20
"""Of what is kept for a grammar."""
_MAX_TEXT = 32
_MAX_SHARED = 1024


class StringEnd(NamedTuple):
    """What is known of the end of one string."""

    closing: NDArray[np.int32]
    """The mask of the tokens that may close it, if the number of characters before their quote is right."""
    forced: list[int]
    """Tokens that have to come where no character is left; empty: that is not known."""


class StringInside(NamedTuple):
    """What is known of the inside of one string that may end."""

    mask: NDArray[np.int32]
    """Of the tokens that may come where ``room`` characters may; it does not change any more."""
    room: int


class KnownMask:
    """A mask that is kept, in as few bytes as it needs, and tokens that are forced where it holds."""

    def __init__(self, mask: NDArray[np.int32], forced: list[int]) -> None:
        """``mask`` does not change any more."""
        self.forced = forced.copy()
        self._words = words = mask.nonzero()[0]
        self._bits = mask[words]
        self._whole = None
        if len(words) > len(mask) // 8:
            self._words, self._bits, self._whole = words[:0], mask[:0], mask
        whole_bytes = 0 if self._whole is None else mask.nbytes
        self.num_bytes = 512 + self._words.nbytes + self._bits.nbytes + whole_bytes

    def write(self, mask: NDArray[np.int32]) -> NDArray[np.int32]:
        """Write it to ``mask``. Returns an equal one, which does not change."""
        if self._whole is not None:
            mask[:] = self._whole
            return self._whole
        mask.fill(0)
        mask[self._words] = self._bits
        return mask.copy()


class GrammarMemory:
    """What answers of one grammar found out, for those that come to the same place."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.max_bytes = _MAX_BYTES
        """What ``num_bytes`` may grow to."""
        self.ends: dict[bytes, StringEnd] = {}
        """By the name of the property whose value the string is."""
        self.inside: dict[bytes, StringInside] = {}
        """Of strings that may end, by the name of the property."""
        self.masks: dict[tuple[bytes, bytes], KnownMask] = {}
        """By place: the mask for the next token."""

    def leave_half(self) -> None:
        """Until ``use_all`` only half of the room is used."""
        self.max_bytes = _MAX_BYTES // 2

    def use_all(self) -> None:
        """Use all of the room again."""
        self.max_bytes = _MAX_BYTES

    def add_end(self, name: bytes, end: StringEnd) -> None:
        """Keep it, while there is room."""
        if name not in self.ends and self._take_bytes(end.closing.nbytes):
            self.ends[name] = end

    def add_inside(self, name: bytes, inside: StringInside) -> None:
        """Keep it, while there is room."""
        if name not in self.inside and self._take_bytes(inside.mask.nbytes):
            self.inside[name] = inside

    def add_mask(self, place: tuple[bytes, bytes], mask: NDArray[np.int32], forced: list[int]) -> None:
        """Keep it, while there is room, and the text behind the name is short: a long one hardly comes again."""
        if place in self.masks or len(place[1]) > _MAX_TEXT:
            return
        known = KnownMask(mask, forced)
        if self._take_bytes(known.num_bytes):
            self.masks[place] = known

    def _take_bytes(self, num_bytes: int) -> bool:
        if self.num_bytes + num_bytes > self.max_bytes:
            return False
        self.num_bytes += num_bytes
        return True


class ClosingTokens:
    """The tokens of a vocabulary that write a closing quote."""

    def __init__(
        self,
        texts: Mapping[int, tuple[int, bytes, bytes]],
        ids: Mapping[bytes, int],
        pack: Callable[..., NDArray[np.int32]],
    ) -> None:
        """``texts``: by token, its characters before the quote, and what it writes before and behind it; ``ids``:
        tokens by what they write; ``pack`` makes a mask of token ids."""
        self.num_chars = {token: count for token, (count, *_) in texts.items()}
        self.max_chars = max(self.num_chars.values(), default=0)
        self._pack = pack
        self._at_least = [
            pack([token for token, count in self.num_chars.items() if count >= least])
            for least in range(self.max_chars + 1)
        ]
        by_rest: dict[bytes, list[int]] = {}
        for token, (_, _, rest) in texts.items():
            by_rest.setdefault(rest, []).append(token)
        escapes = {token: set(_ESCAPE.findall(inside)) for token, (_, inside, _) in texts.items()}
        self._escapes: dict[int, set[bytes]] | None = {token: each for token, each in escapes.items() if each}
        self._lock = threading.Lock()  # of ``_escapes``, and of what becomes of them
        self._by_rest = by_rest
        self._rests = sorted(by_rest)
        self._quotes = pack(by_rest.get(b"", []))
        # What is written behind the quote is mostly a token of its own, for which one mask has the answer.
        whole = [(rest, ids[rest]) for rest in by_rest if rest in ids]
        self._whole_rests = [rest for rest, _ in whole]
        self._whole_ids = np.array([token for _, token in whole], np.int64)
        self._ids_of_bytes = [ids.get(bytes([value]), -1) for value in range(256)]
        self._other_rests = [rest for rest in self._rests if rest and rest not in ids]
        written = {value for _, inside, rest in texts.values() for value in inside + rest}
        # A pair of Unicode escapes may be one character or two.
        has_pairs = any(inside.count(b"\\u") > 1 for _, inside, _ in texts.values())
        self.is_decidable = not has_pairs and all(self._ids_of_bytes[value] >= 0 for value in written)
        """Whether ``find_valid`` can find out what may come."""
        self._masks: dict[tuple[int, ...], NDArray[np.int32]] = {}  # that strings have in common, by their tokens
        self._num_words = len(pack([]))

    def find_at_least(self, num_chars: int) -> NDArray[np.int32]:
        """The mask of those with at least so many characters before the quote."""
        return self._at_least[num_chars]

    def learn_escapes(self, matcher: llguidance.LLMatcher) -> None:
        """Leave out for good what has escapes that do not come in strings with a least length. ``matcher`` is in one
        that has room for a character."""
        with self._lock:
            if self._escapes is None:
                return
            escapes = self._escapes
            refused = {
                escape
                for escape in set().union(*escapes.values())
                if matcher.validate_tokens([self._ids_of_bytes[value] for value in escape]) < len(escape)
            }
            for tokens in self._by_rest.values():
                tokens[:] = [token for token in tokens if not escapes.get(token, set()) & refused]
            self._quotes = self._pack(self._by_rest.get(b"", []))
            self._escapes = None

    def find_valid(self, matcher: llguidance.LLMatcher, forced: bytes, before: list[int]) -> NDArray[np.int32]:
        """The mask of those whose text behind the quote may come: ``forced`` has to, or nothing if it is empty.
        ``matcher`` is behind the quote, or where ``before`` leads there."""
        valid: list[int] = []
        if forced:
            rests = [forced[:end] for end in range(1, len(forced) + 1)]
            known = set(rests)
            longer = self._rests[bisect_right(self._rests, forced) :]
            rests += itertools.takewhile(lambda rest: rest.startswith(forced), longer)
        else:
            mask = np.empty(self._num_words, np.int32)
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            bits = mask[self._whole_ids >> 5] >> (self._whole_ids & 31) & 1
            rests = [self._whole_rests[index] for index in bits.nonzero()[0].tolist()]
            known = set(rests)
            rests += [rest for rest in self._other_rests if is_set(mask, self._ids_of_bytes[rest[0]])]
        refused = b""
        for rest in rests:
            if not rest or rest not in self._by_rest or (refused and rest.startswith(refused)):
                continue
            if rest not in known:
                token_ids = [*before, *(self._ids_of_bytes[value] for value in rest)]
                if (num_valid := matcher.validate_tokens(token_ids) - len(before)) < len(rest):
                    refused = rest[: num_valid + 1]
                    continue
            valid += self._by_rest[rest]
        key = tuple(valid)
        if (closing := self._masks.get(key)) is None:
            closing = self._quotes | self._pack(valid)
            if len(self._masks) < _MAX_SHARED:
                self._masks[key] = closing
        return closing


def forget_digits(text: bytes) -> bytes:
    """The text behind a property's name, if it ends with a number that may go on, as it would be with other digits of
    which any may have come where these did."""
    return _OTHER_DIGITS.sub(b"0", _INTEGER_PART.sub(b"1", text, count=1)) if _IN_NUMBER.fullmatch(text) else text


def is_set(mask: NDArray[np.int32], token: int) -> bool:
    """Whether the mask allows the token."""
    return bool(int(mask[token // 32]) >> token % 32 & 1)
