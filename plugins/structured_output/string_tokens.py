"""The tokens of a vocabulary as the inside of a JSON string sees them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import llguidance
import numpy as np
from numpy.typing import NDArray

from quire.plugins.structured_output.string_bounds import PROBE_CHAR
from quire.plugins.structured_output.string_ends import ClosingTokens, StringEnd

__all__ = ["Opening", "StringTokens", "count_chars"]

_CHAR = re.compile(r'[^"\\\x00-\x1f\x7f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4}')
_CHARS = re.compile(f"(?:{_CHAR.pattern})*")
_CUT_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")
_OPENING = re.compile(rb'\s*:?\s*"')
_MAX_TABLES = 256
_MAX_OPENINGS = 512


class Opening(NamedTuple):
    """The place where a property's value begins that is a string, which no token can open and close."""

    form: tuple[bool, bool]
    """``StringBounds.form``."""
    written: bytes
    """Behind the property's name."""
    max_chars: int
    """Of the string, or of what a token has behind the quote if that is less."""


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
        ids: dict[bytes, int] = {}
        ends: dict[int, tuple[int, bytes, bytes]] = {}
        self.max_opened = self.max_opened_and_closed = 0
        """The most characters of a string that a token has which opens it, and of those one which closes it, too."""
        for token in range(vocab_size):
            data = tokenizer.decode_bytes([token])
            if not data or tokenizer.is_special_token(token):
                continue
            if (opening := _OPENING.match(data)) and (counted := count_chars(data[opening.end() :])) is not None:
                num_chars = counted[0] + counted[2]
                self.max_opened = max(self.max_opened, num_chars)
                self.max_opened_and_closed = max(self.max_opened_and_closed, num_chars if counted[1] else 0)
            ids.setdefault(data, token)
            self.probe = token if data == PROBE_CHAR.encode() else self.probe
            self.quote = token if data == b'"' else self.quote
            counted = count_chars(data)
            if counted is None:
                continue
            count, rest, is_cut = counted
            is_inside[token], is_closing[token] = True, bool(rest)
            if rest:
                ends[token] = count, *_cut_at_quote(data)
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
        self.closing_ids = {data: token for data, token in ids.items() if data.startswith(b'"')}
        """Tokens that begin with a quote, by what they write."""
        self.ends = ClosingTokens(ends, ids, partial(_pack_ids, vocab_size))
        plain = is_plain.nonzero()[0]
        self._plain_by_chars = dict(zip(needed[plain].tolist(), plain.tolist(), strict=True))
        """A token that adds so many characters."""
        self._max_plain_chars = max(self._plain_by_chars, default=0)

        self.in_value: NDArray[np.int32] | None = None
        """Those without a closing quote that may come in a property's value; None: they are not known yet."""
        self.openings: dict[Opening, NDArray[np.int32]] = {}
        """Masks where a property's value begins that is a string, of all grammars: ``learn_opening`` adds to them."""

    def learn_opening(self, opening: Opening, mask: NDArray[np.int32]) -> None:
        """Keep it, while there is room."""
        if len(self.openings) < _MAX_OPENINGS:
            self.openings[opening] = mask

    def decode(self, token: int) -> bytes:
        """The text of a token."""
        return self._tokenizer.decode_bytes([token])

    def find_fitting(self, room: int) -> NDArray[np.int32] | None:
        """The tokens that need at most ``room`` characters, and those that are never inside. None: it is not known."""
        if room >= self.max_needed:
            return self._all
        return self._fitting[room] if self._min_room <= room < len(self._fitting) else None

    def find_end(self, matcher: llguidance.LLMatcher, missing: int, room: int) -> StringEnd | None:
        """Look behind the string that ``matcher`` is in, which has to grow by ``missing`` characters and may by
        ``room``. None: that is not so."""
        if not self.ends.is_decidable or 1 not in self._plain_by_chars:
            return None
        path = self.split_chars(missing)
        if matcher.validate_tokens([*path, self.quote]) <= len(path):
            return None
        self.ends.learn_escapes(matcher)
        if path:
            matcher.consume_tokens(path)
        forced = matcher.compute_ff_tokens() if missing == room else []
        text = self._tokenizer.decode_bytes(forced)
        if len(text) > 1:
            closing = self.ends.find_valid(matcher, text[1:], [self.quote])
        else:
            matcher.consume_tokens([self.quote])
            path.append(self.quote)
            text = self._tokenizer.decode_bytes(matcher.compute_ff_tokens())
            closing = self.ends.find_valid(matcher, text, [])
        matcher.rollback(len(path))
        return StringEnd(closing, forced)

    def split_chars(self, num_chars: int) -> list[int]:
        """Plain tokens that have together so many characters. There has to be one of a single character."""
        token_ids: list[int] = []
        while num_chars:
            part = next(
                part for part in range(min(num_chars, self._max_plain_chars), 0, -1) if part in self._plain_by_chars
            )
            token_ids.append(self._plain_by_chars[part])
            num_chars -= part
        return token_ids


def count_chars(data: bytes) -> tuple[int, str, bool] | None:
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


def _cut_at_quote(data: bytes) -> tuple[bytes, bytes]:
    """What a token writes before a closing quote and behind it, which may be cut off within a character."""
    text = data.decode(errors="surrogateescape")
    chars = _CHARS.match(text)
    assert chars is not None
    return chars[0].encode(), text[chars.end() + 1 :].encode(errors="surrogateescape")


def _pack_ids(vocab_size: int, token_ids: Sequence[int]) -> NDArray[np.int32]:
    is_set = np.zeros(vocab_size, bool)
    is_set[np.asarray(token_ids, np.int64)] = True
    return _pack(is_set)


def _pack(is_set: NDArray[np.bool_]) -> NDArray[np.int32]:
    words = np.zeros(-(-len(is_set) // 32), np.uint32)
    packed = np.packbits(is_set, bitorder="little")
    words.view(np.uint8)[: len(packed)] = packed
    return words.view(np.int32)
