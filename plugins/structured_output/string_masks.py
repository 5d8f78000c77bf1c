"""Masks inside JSON strings, derived from one that the library computed.

Inside a string whose text is free, all that changes from token to token is how many characters may and have to follow.
For a string of limited length each count is another state of the library's lexer, for which it walks the vocabulary
again. Here the characters of every token are counted once. Of the library it takes one mask in the string, and how many
characters it lets follow: all masks up to the closing quote are derived from these, equal bit for bit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import llguidance
import numpy as np
from numpy.typing import NDArray

from quire.plugins.structured_output.string_bounds import MIN_PROBE, StringBounds
from quire.plugins.structured_output.string_ends import GrammarMemory, StringEnd, StringInside, forget_digits, is_set
from quire.plugins.structured_output.string_tokens import Opening, StringTokens, count_chars

__all__ = ["StringMasks"]

_IN_VALUE = re.compile(rb'[{,\s]("(?:[^"\\]|\\.)*")\s*:\s*"((?:[^"\\]|\\.)*)$')
"""An answer's text in a string that is the value of a property: the property's name, and the string so far."""
_BEHIND_VALUE = re.compile(rb':\s*(?:"[^"]*(?P<text>".*)|(?:[-+.\deE]+|true|false|null)(?P<other>[,}\s].*))', re.DOTALL)
"""Behind a property's name: a value that is whole, and what follows, with the closing quote if there is one."""
_MAX_TAIL = 512
_PROBE_AHEAD = 64
"""Characters that are probed beyond the longest token, so that not every token needs a probe."""
_MAX_AHEAD = 64
"""Characters beyond which a string's end has time."""
_UNLIMITED = 1 << 40


class _CutString(NamedTuple):
    """Where a string was before a token that ends within a character."""

    base: NDArray[np.int32]
    run: int
    room: int
    missing: int | None
    text: bytes
    """Since then."""


class StringMasks:
    """Where one answer is in a string, and the masks that follow from it."""

    def __init__(
        self,
        get_matcher: Callable[[], llguidance.LLMatcher],
        tokens: StringTokens,
        bounds: StringBounds,
        memory: GrammarMemory | None = None,
    ) -> None:
        """``get_matcher`` returns the library's state of the answer, which it need not keep up with it. ``memory`` is
        that of all answers of its grammar."""
        self._get_matcher = get_matcher
        self.tokens = tokens
        self._bounds = bounds
        self._memory = memory if bounds.has_places else None
        self._name: bytes | None = b""  # of the property whose value the last string was; None: it is not known
        self._is_tail_whole = True  # since the answer's begin, or the last string's end
        self._begins_in_string = False  # the tail: with the last characters of a string that was free
        self._base: NDArray[np.int32] | None = None  # the mask where there was more room
        self._tail = b""  # the answer's last text, if that is not in a string that is known
        self._run = 0  # characters of the string so far, or fewer
        self._room = 0  # characters that may follow, or fewer if it is not exact
        self._is_room_exact = False
        self._is_place_known = False  # of the string whose lengths were read last
        self._missing: int | None = None  # that have to follow before a quote, or fewer; None: a quote may come
        self._is_missing_exact = False
        self._end: StringEnd | None = None
        self._cut: _CutString | None = None  # which goes on when the character is whole
        self.wants_end = False
        """``look_ahead`` would be of use."""

    @property
    def is_free(self) -> bool:
        """Whether the next character of the answer is one of many, for sure."""
        return self._base is not None and self._room > 0

    @property
    def property_name(self) -> bytes | None:
        """Of the property whose value the string is that the answer is in. None: it is in none, or it is not known."""
        return None if self._base is None else self._name

    def accept(self, token: int) -> bool:
        """Advance if the token may come next, for sure, and leaves the answer in the string. Whether it did."""
        base = self._base
        count = self.tokens.num_chars[token] if 0 <= token < len(self.tokens.num_chars) else 0
        if base is None or not 0 < count <= self._room or not int(base[token >> 5]) >> (token & 31) & 1:
            return False
        self._run += count
        self._room -= count
        if self._missing is not None:
            self._missing = max(self._missing - count, 0)
        return True

    def may_close(self, token: int) -> bool:
        """Whether the token may come next, for sure, and ends the string."""
        end, missing = self._end, self._missing
        if self._base is None or end is None or missing is None:
            return False
        count = self.tokens.ends.num_chars.get(token, -1)
        return missing <= count <= self._room and is_set(end.closing, token)

    def may_cut(self, token: int) -> bool:
        """Whether the token may come next, for sure, and ends within a character of the string."""
        tokens, fitting = self.tokens, self.tokens.find_fitting(self._room)
        if self._base is None or fitting is None or not 0 <= token < len(tokens.num_chars):
            return False
        is_cut = not tokens.num_chars[token] and token not in tokens.ends.num_chars
        return is_cut and is_set(self._base, token) and is_set(fitting, token)

    def take_forced_end(self) -> list[int]:
        """Tokens that have to come next because the string has all characters that it may; empty: it has not, or they
        are not known."""
        if self._room or self._missing != 0 or self._base is None or self._end is None:
            return []
        return self._end.forced.copy()

    def look_ahead(self, matcher: llguidance.LLMatcher) -> None:
        """Find out what may end the string. ``matcher`` is where the answer is; nobody else may use it meanwhile."""
        base, missing = self._base, self._missing
        if base is not None and missing is not None and 0 < missing <= _MAX_AHEAD:
            self.wants_end = False
            self._end = end = self.tokens.find_end(matcher, missing, self._room)
            if self._memory is not None and end is not None and self._name:
                self._memory.add_end(self._name, end)

    def advance(self, token: int) -> None:
        """The answer goes on with this token."""
        count = self.tokens.num_chars[token]
        cut, self._cut = self._cut, None
        if not count:
            if self._base is not None:
                cut = _CutString(self._base, self._run, self._room, self._missing, b"")
                self._leave_string()
                self._is_tail_whole = self._begins_in_string = True
            self._run = 0
        else:
            self._run += count
            self._room = max(self._room - count, 0)
            if self._missing is not None:
                self._missing = max(self._missing - count, 0)
        if self._base is None and (self._bounds.by_name or self._memory is not None):
            self._tail = (self._tail + self.tokens.decode(token))[-_MAX_TAIL:]
        if cut is not None:
            self._go_on_from(cut, token)

    def _go_on_from(self, cut: _CutString, token: int) -> None:
        """Be in the string again if ``token`` ends with a whole character; wait for that if it does not."""
        text = cut.text + self.tokens.decode(token)
        counted = None if b"\\u" in text else count_chars(text)  # a pair of Unicode escapes may be one character
        if counted is None or counted[1] or counted[0] > cut.room:
            return
        if counted[2]:
            self._cut = cut._replace(text=text)
            return
        self._leave_string()
        self._base, self._run, self._room = cut.base, cut.run + counted[0], cut.room - counted[0]
        self._missing = None if cut.missing is None else max(cut.missing - counted[0], 0)

    def find_place(self) -> tuple[bytes, bytes] | None:
        """Where the answer is in its grammar, if not in a free string: equal for equal places. None: that is not
        known."""
        tail = self._tail
        if self._memory is None or self._base is not None or not self._is_tail_whole:
            return None
        if len(tail) >= _MAX_TAIL or b"\\" in tail:
            return None
        texts = tail.split(b'"')  # by turns in strings and between them
        is_odd_in_string = not self._begins_in_string
        for index in range(len(texts) - 2, 0, -1):
            behind = texts[index + 1].lstrip()
            if index % 2 == is_odd_in_string and behind.startswith(b":"):  # a property's name, and what follows it
                behind = b'"'.join((behind, *texts[index + 2 :]))
                if value := _BEHIND_VALUE.fullmatch(behind):  # what it was makes no difference any more
                    behind = value["text"] or value["other"]
                name = b'"%b"' % texts[index]
                is_number = bool(self._bounds.numbers) and _decode_name(name) in self._bounds.numbers
                return name, forget_digits(behind) if is_number else behind
        if not self._begins_in_string:
            return b"", tail
        if self._name is None or len(texts) == 1:
            return None
        return self._name, tail[len(texts[0]) :]

    def find_opening(self, place: tuple[bytes, bytes]) -> Opening | None:
        """The place as all grammars know it, if the value of a property begins there that is a string; else None."""
        name, behind = place
        if behind.strip() != b":" or (lengths := self._bounds.by_name.get(_decode_name(name))) is None:
            return None
        (least, most), tokens = lengths, self.tokens
        if least <= tokens.max_opened_and_closed:  # what comes behind the string is the grammar's
            return None
        return Opening(self._bounds.form, behind, tokens.max_opened if most is None else min(most, tokens.max_opened))

    def reset(self) -> None:
        """The answer is where nothing is known."""
        self._leave_string()
        self._is_tail_whole = False
        self._cut = None

    def _leave_string(self) -> None:
        self._base = None
        self._tail = b""
        self._run = 0

    def find_shared_mask(self) -> NDArray[np.int32] | None:
        """The mask for the next token where it is that of many: there is room for every token, and none may close the
        string, or as many may as before. None: ``write_mask`` has to be asked."""
        if self._room < self.tokens.max_needed:
            return None
        return self._base if self._missing is None or self._missing > self.tokens.ends.max_chars else None

    def write_mask(self, mask: NDArray[np.int32]) -> bool:
        """Write the mask for the next token. False if it is not known."""
        if self._base is None and not self._enter_string():
            return False
        assert self._base is not None
        tokens = self.tokens
        if not self._is_room_exact and self._room < tokens.max_needed:
            self._probe_room()
        if self._missing is not None and self._missing <= tokens.ends.max_chars:
            if not self._is_missing_exact:
                self._probe_missing()
            if self._missing <= tokens.ends.max_chars:
                return self._write_near_end(mask)
        fitting = tokens.find_fitting(self._room)
        if not self._room or fitting is None:
            return False  # at the end of the room the library offers a forced text as the tokenizer writes it, alone
        np.bitwise_and(self._base, fitting, out=mask)
        return True

    def _write_near_end(self, mask: NDArray[np.int32]) -> bool:
        """Where tokens with the closing quote may come."""
        tokens = self.tokens
        if self._end is None and self._missing and self._is_room_exact:
            self.look_ahead(self._get_matcher())
        if self._end is None:
            if not self._missing:
                self._base = None  # a quote may come now: the library knows what may come behind it
                self._is_tail_whole = False
            return False
        assert self._base is not None and self._missing is not None
        fitting = tokens.find_fitting(self._room)
        if not self._room or fitting is None:
            return False
        np.bitwise_and(self._end.closing, tokens.ends.find_at_least(self._missing), out=mask)
        mask |= self._base
        mask &= fitting
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
                    return not 0 <= draft < len(self.tokens.num_chars) or not is_set(mask, draft)
            return True
        finally:
            self._run, self._room, self._missing = before

    def _is_mask_known(self) -> bool:
        """Whether ``write_mask`` asks the library for nothing."""
        tokens, missing = self.tokens, self._missing
        if self._base is None or not self._room or tokens.find_fitting(self._room) is None:
            return False
        if not self._is_room_exact and self._room < tokens.max_needed:
            return False
        return missing is None or missing > tokens.ends.max_chars

    def learn_mask(self, mask: NDArray[np.int32]) -> None:
        """The library has computed the mask for the next token. If that is in a free string, others follow from it."""
        tokens, bounds = self.tokens, self._bounds
        if self._base is not None or self._run < bounds.min_run or not is_set(mask, tokens.probe):
            return
        is_value = self._read_lengths()
        if not is_value:
            self._name, self._missing = None, None
            self._probe_room()
        fitting = tokens.find_fitting(self._room)
        if self._room < MIN_PROBE or fitting is None or (mask & tokens.outside).any():
            return
        if not np.array_equal(mask & tokens.plain, fitting & tokens.plain):
            return
        may_close = is_set(mask, tokens.quote)
        if may_close:
            if self._missing:
                return
            self._missing = None
        elif not bounds.has_min:
            return
        elif self._missing is None:
            self._probe_missing()
        self._base = mask.copy() if may_close else mask & tokens.without_closing
        self._begin_string()
        if is_value and self._room >= tokens.max_needed and tokens.in_value is None:
            tokens.in_value = mask & tokens.without_closing
        if is_value and may_close and self._memory is not None and self._name is not None:
            self._memory.add_inside(self._name, StringInside(self._base, self._room))

    def _enter_string(self) -> bool:
        """Whether the answer is in the value of a property of which nothing is to be learned: it cannot end yet, or
        another answer was in it."""
        has_masks = self._memory is not None and bool(self._memory.inside)
        if not (has_masks or self.tokens.in_value is not None) or not self._read_lengths():
            return False
        if not self._missing:
            known = None if self._memory is None or self._name is None else self._memory.inside.get(self._name)
            if known is None or known.room < self._room or not (self._is_place_known or self._may_close_after(0)):
                return False
            self._base, self._missing = known.mask, None
        elif self.tokens.in_value is None or (not self._is_place_known and self._may_close_after(0)):
            return False
        else:
            self._base = self.tokens.in_value
        self._begin_string()
        return True

    def _begin_string(self) -> None:
        self._tail = b""
        self._end = None if self._memory is None or self._name is None else self._memory.ends.get(self._name)
        is_exact = self._is_missing_exact and self._is_room_exact
        self.wants_end = self._end is None and bool(self._missing) and is_exact

    def _read_lengths(self) -> bool:
        """Find the room, and what is missing, by the name of the property whose value the string is."""
        match = _IN_VALUE.search(self._tail)
        if match is None:
            return False
        lengths = self._bounds.by_name.get(_decode_name(match[1]))
        written = count_chars(match[2])
        if lengths is None or written is None or written[1:] != ("", False) or b"\\u" in match[2]:
            return False
        least, most = lengths
        room = _UNLIMITED if most is None else most - written[0]
        self._is_place_known = self._is_value_of(match)
        if self._is_place_known:
            if room < 1:
                return False
        elif self._get_matcher().validate_tokens([self.tokens.probe] * MIN_PROBE) < MIN_PROBE:
            return False  # it is no string, or it ends soon
        self._name = match[1]
        self._room, self._is_room_exact = room, True
        self._missing, self._is_missing_exact = max(least - written[0], 0), True
        return True

    def _is_value_of(self, match: re.Match[bytes]) -> bool:
        """Whether the answer is in the value of the property that ``match`` of ``_IN_VALUE`` names, and in nothing that
        looks like it: then the schema says what the library would."""
        if self._bounds.form[1] or (place := self.find_place()) is None:
            return False
        return place == (match[1], self._tail[match.end(1) :].lstrip())

    def _probe_room(self) -> None:
        limit = self.tokens.max_needed + _PROBE_AHEAD if self._bounds.has_max else MIN_PROBE
        self._room = self._get_matcher().validate_tokens([self.tokens.probe] * limit)
        self._is_room_exact = self._room < limit
        if not self._bounds.has_max and not self._is_room_exact:
            self._room, self._is_room_exact = _UNLIMITED, True

    def _probe_missing(self) -> None:
        limit = min(self._room, self.tokens.ends.max_chars + _PROBE_AHEAD)
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
        tokens = [self.tokens.probe] * num_chars + [self.tokens.quote]
        return bool(self._get_matcher().validate_tokens(tokens) == len(tokens))


def _decode_name(text: bytes) -> str:
    try:
        return str(json.loads(text))
    except ValueError:
        return ""
