"""Masks inside JSON strings, derived from one that the library computed.

Inside a string whose text is free, all that changes from token to token is how many characters may and have to follow.
For a string of limited length each count is another state of the library's lexer, for which it walks the vocabulary
again. Here the characters of every token are counted once. Of the library it takes one mask in the string, and how many
characters it lets follow: all masks up to the closing quote are derived from these, equal bit for bit.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence

import llguidance
import numpy as np
from numpy.typing import NDArray

from quire.plugins.structured_output.string_bounds import MIN_PROBE, PROBE_CHAR, StringBounds

__all__ = ["StringMasks", "StringTokens"]

_CHAR = re.compile(r'[^"\\\x00-\x1f\x7f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4}')
_CHARS = re.compile(f"(?:{_CHAR.pattern})*")
_CUT_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")
_IN_VALUE = re.compile(rb'[{,\s]("(?:[^"\\]|\\.)*")\s*:\s*"((?:[^"\\]|\\.)*)$')
"""An answer's text in a string that is the value of a property: the property's name, and the string so far."""
_MAX_TAIL = 512
_MAX_TABLES = 256
_PROBE_AHEAD = 64
"""Characters that are probed beyond the longest token, so that not every token needs a probe."""
_MAX_CANDIDATES = 8
"""Tokens with a closing quote that are tried one by one; for more the library computes the mask."""
_UNLIMITED = 1 << 40


class StringTokens:
    """The tokens of a vocabulary as the inside of a JSON string sees them.

    A token stays within the string or has its closing quote. Either needs some characters of room. By one that stays
    and ends with a whole character, the string grows by a number of characters and is otherwise where it was.
    """

    def __init__(self, tokenizer: llguidance.LLTokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.num_chars = [0] * vocab_size
        """By which the string grows; 0 for tokens that leave it, or leave it within a character."""
        needed = np.zeros(vocab_size, np.int32)
        is_inside, is_closing, is_plain = np.zeros((3, vocab_size), bool)
        self._min_room = 0  # a pair of Unicode escapes may be one character or two: with less room ask the library
        self.probe = self.quote = -1
        for token in range(vocab_size):
            data = tokenizer.decode_bytes([token])
            if not data or tokenizer.is_special_token(token):
                continue
            self.probe = token if data == PROBE_CHAR.encode() else self.probe
            self.quote = token if data == b'"' else self.quote
            counted = _count_chars(data)
            if counted is None:
                continue
            count, rest, is_cut = counted
            is_inside[token], is_closing[token] = True, bool(rest)
            needed[token] = count + is_cut
            num_escapes = data.count(b"\\u")
            if num_escapes > 1:
                self._min_room = max(self._min_room, count + 1)
            if not rest and not is_cut and not num_escapes:
                self.num_chars[token] = count
                is_plain[token] = b"\\" not in data
        self.max_needed = int(needed.max())
        self._all = _pack(np.ones(vocab_size, bool))
        self._fitting = [_pack(needed <= room) for room in range(min(self.max_needed, _MAX_TABLES))]
        self.plain = _pack(is_plain)
        self.outside = _pack(~is_inside)
        self.without_closing = _pack(~is_closing)
        closing = is_closing.nonzero()[0]
        closing = closing[np.argsort(needed[closing], kind="stable")]
        self._closing: list[int] = closing.tolist()
        self._closing_chars: list[int] = needed[closing].tolist()
        self.max_closing_chars = self._closing_chars[-1] if self._closing else 0

        self.in_value: NDArray[np.int32] | None = None
        """Those without a closing quote that may come in a property's value; None: they are not known yet."""

    def decode(self, token: int) -> bytes:
        """The text of a token."""
        return self._tokenizer.decode_bytes([token])

    def find_fitting(self, room: int) -> NDArray[np.int32] | None:
        """The tokens that need at most ``room`` characters, and those that are never inside. None: it is not known."""
        if room >= self.max_needed:
            return self._all
        return self._fitting[room] if self._min_room <= room < len(self._fitting) else None

    def find_closing(self, least: int, most: int) -> Sequence[int]:
        """Tokens whose closing quote comes after ``least`` to ``most`` characters."""
        chars = self._closing_chars
        return self._closing[bisect_left(chars, least) : bisect_left(chars, most + 1)]


class StringMasks:
    """Where one answer is in a string, and the masks that follow from it."""

    def __init__(
        self, get_matcher: Callable[[], llguidance.LLMatcher], tokens: StringTokens, bounds: StringBounds
    ) -> None:
        """``get_matcher`` returns the library's state of the answer, which it need not keep up with it."""
        self._get_matcher = get_matcher
        self._tokens = tokens
        self._bounds = bounds
        self._base: NDArray[np.int32] | None = None  # the mask where there was more room
        self._tail = b""  # the answer's last text, if that is not in a string that is known
        self._run = 0  # characters of the string so far, or fewer
        self._room = 0  # characters that may follow, or fewer if it is not exact
        self._is_room_exact = False
        self._missing: int | None = None  # that have to follow before a quote, or fewer; None: a quote may come
        self._is_missing_exact = False

    @property
    def is_free(self) -> bool:
        """Whether the next character of the answer is one of many, for sure."""
        return self._base is not None and self._room > 0

    def accept(self, token: int) -> bool:
        """Advance if the token may come next, for sure, and leaves the answer in the string. Whether it did."""
        base = self._base
        count = self._tokens.num_chars[token] if 0 <= token < len(self._tokens.num_chars) else 0
        if base is None or not 0 < count <= self._room or not int(base[token >> 5]) >> (token & 31) & 1:
            return False
        self._run += count
        self._room -= count
        if self._missing is not None:
            self._missing = max(self._missing - count, 0)
        return True

    def advance(self, token: int) -> None:
        """The answer goes on with this token."""
        count = self._tokens.num_chars[token]
        if not count:
            if self._base is not None:
                self.reset()
            self._run = 0
        else:
            self._run += count
            self._room = max(self._room - count, 0)
            if self._missing is not None:
                self._missing = max(self._missing - count, 0)
        if self._base is None and self._bounds.by_name:
            self._tail = (self._tail + self._tokens.decode(token))[-_MAX_TAIL:]

    def reset(self) -> None:
        """The answer is where nothing is known."""
        self._base = None
        self._tail = b""
        self._run = 0

    def find_shared_mask(self) -> NDArray[np.int32] | None:
        """The mask for the next token where it is that of many: there is room for every token, and none may close the
        string, or as many may as before. None: ``write_mask`` has to be asked."""
        if self._room < self._tokens.max_needed:
            return None
        return self._base if self._missing is None or self._missing > self._tokens.max_closing_chars else None

    def write_mask(self, mask: NDArray[np.int32]) -> bool:
        """Write the mask for the next token. False if it is not known."""
        if self._base is None and not self._enter_string():
            return False
        assert self._base is not None
        tokens = self._tokens
        if not self._is_room_exact and self._room < tokens.max_needed:
            self._probe_room()
        candidates: Sequence[int] = ()
        if self._missing is not None:
            if not self._is_missing_exact and self._missing <= tokens.max_closing_chars:
                self._probe_missing()
            if not self._missing:
                self._base = None  # a quote may come now: the library knows what may come behind it
                return False
            if self._missing <= tokens.max_closing_chars:
                candidates = tokens.find_closing(self._missing, self._room)
        fitting = tokens.find_fitting(self._room)
        if not self._room or fitting is None or len(candidates) > _MAX_CANDIDATES:
            return False  # at the end of the room the library offers a forced text as the tokenizer writes it, alone
        np.bitwise_and(self._base, fitting, out=mask)
        words = mask.view(np.uint32)
        for token in candidates:
            if self._get_matcher().validate_tokens([token]):
                words[token // 32] |= np.uint32(1 << token % 32)
        return True

    def write_draft_masks(self, masks: NDArray[np.int32], draft_token_ids: Sequence[int]) -> bool:
        """Write the mask for the next token, and those behind each draft that may come. False if they are not known
        without asking the library, which is not where the drafts are."""
        if self._base is None and not self._enter_string():
            return False
        before = self._run, self._room, self._missing
        try:
            for mask, draft in zip(masks, (*draft_token_ids, None), strict=False):
                if not self._is_mask_known():
                    return False
                self.write_mask(mask)
                if draft is not None and not self.accept(draft):
                    return not 0 <= draft < len(self._tokens.num_chars) or not _is_set(mask, draft)
            return True
        finally:
            self._run, self._room, self._missing = before

    def _is_mask_known(self) -> bool:
        """Whether ``write_mask`` asks the library for nothing."""
        tokens, missing = self._tokens, self._missing
        if self._base is None or not self._room or tokens.find_fitting(self._room) is None:
            return False
        if not self._is_room_exact and self._room < tokens.max_needed:
            return False
        return missing is None or missing > tokens.max_closing_chars

    def learn_mask(self, mask: NDArray[np.int32]) -> None:
        """The library has computed the mask for the next token. If that is in a free string, others follow from it."""
        tokens, bounds = self._tokens, self._bounds
        if self._base is not None or self._run < bounds.min_run or not _is_set(mask, tokens.probe):
            return
        is_value = self._read_lengths()
        if not is_value:
            self._missing = None
            self._probe_room()
        fitting = tokens.find_fitting(self._room)
        if self._room < MIN_PROBE or fitting is None or (mask & tokens.outside).any():
            return
        if not np.array_equal(mask & tokens.plain, fitting & tokens.plain):
            return
        may_close = _is_set(mask, tokens.quote)
        if may_close:
            if self._missing:
                return
            self._missing = None
        elif not bounds.has_min:
            return
        elif self._missing is None:
            self._probe_missing()
        self._base = mask.copy() if may_close else mask & tokens.without_closing
        self._tail = b""
        if tokens.in_value is None and is_value and self._room >= tokens.max_needed:
            tokens.in_value = mask & tokens.without_closing

    def _enter_string(self) -> bool:
        """Whether the answer is in the value of a property that cannot end yet: then nothing is to be learned."""
        if self._tokens.in_value is None or not self._read_lengths():
            return False
        if not self._missing or self._may_close_after(0):
            return False
        self._base = self._tokens.in_value
        self._tail = b""
        return True

    def _read_lengths(self) -> bool:
        """Find the room, and what is missing, by the name of the property whose value the string is."""
        match = _IN_VALUE.search(self._tail)
        if match is None:
            return False
        lengths = self._bounds.by_name.get(_decode_name(match[1]))
        written = _count_chars(match[2])
        if lengths is None or written is None or written[1:] != ("", False) or b"\\u" in match[2]:
            return False
        if self._get_matcher().validate_tokens([self._tokens.probe] * MIN_PROBE) < MIN_PROBE:
            return False  # it is no string, or it ends soon
        least, most = lengths
        self._room, self._is_room_exact = _UNLIMITED if most is None else most - written[0], True
        self._missing, self._is_missing_exact = max(least - written[0], 0), True
        return True

    def _probe_room(self) -> None:
        limit = self._tokens.max_needed + _PROBE_AHEAD if self._bounds.has_max else MIN_PROBE
        self._room = self._get_matcher().validate_tokens([self._tokens.probe] * limit)
        self._is_room_exact = self._room < limit
        if not self._bounds.has_max and not self._is_room_exact:
            self._room, self._is_room_exact = _UNLIMITED, True

    def _probe_missing(self) -> None:
        limit = min(self._room, self._tokens.max_closing_chars + _PROBE_AHEAD)
        if not self._may_close_after(limit):
            self._missing, self._is_missing_exact = limit + 1, False
            return
        least, most = 0, limit
        if limit and not self._may_close_after(limit - 1):
            least = limit
        while least < most:
            middle = (least + most) // 2
            least, most = (least, middle) if self._may_close_after(middle) else (middle + 1, most)
        self._missing, self._is_missing_exact = least, True

    def _may_close_after(self, num_chars: int) -> bool:
        tokens = [self._tokens.probe] * num_chars + [self._tokens.quote]
        return bool(self._get_matcher().validate_tokens(tokens) == len(tokens))


def _count_chars(data: bytes) -> tuple[int, str, bool] | None:
    """What a token adds to a string: whole characters, the text from the closing quote on if it has that, and whether
    it is cut off within one more character. None if no string goes on so."""
    is_cut, tail_is_valid = False, True
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        text = data[: error.start].decode()
        is_cut = tail_is_valid = error.reason == "unexpected end of data"
    chars = _CHARS.match(text)
    assert chars is not None
    count, rest = len(_CHAR.findall(chars[0])), text[chars.end() :]
    if rest.startswith('"'):
        return count, rest, False
    if not tail_is_valid or (rest and (is_cut or not _CUT_ESCAPE.fullmatch(rest))):
        return None
    return count, "", is_cut or bool(rest)


def _decode_name(text: bytes) -> str:
    try:
        return str(json.loads(text))
    except ValueError:
        return ""


def _is_set(mask: NDArray[np.int32], token: int) -> bool:
    return bool(int(mask[token // 32]) >> token % 32 & 1)


def _pack(is_set: NDArray[np.bool_]) -> NDArray[np.int32]:
    words = np.zeros(-(-len(is_set) // 32), np.uint32)
    packed = np.packbits(is_set, bitorder="little")
    words.view(np.uint8)[: len(packed)] = packed
    return words.view(np.int32)
