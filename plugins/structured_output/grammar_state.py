"""Where one answer is in a grammar of llguidance, and what of its next masks is known without asking the library.

The library takes some 25 microseconds to follow a token, and 75 or more for a mask. Most tokens need neither at once:
inside a string masks follow from one that was computed (``string_masks.py``), and where a text is forced its tokens are
known all together. What is known to be allowed is noted, and the matcher follows behind the step, in a thread.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable, Sequence

import llguidance
import numpy as np
from numpy.typing import NDArray

from quire.plugins.structured_output.string_bounds import StringBounds
from quire.plugins.structured_output.string_ends import GrammarMemory, is_set
from quire.plugins.structured_output.string_masks import StringMasks
from quire.plugins.structured_output.string_tokens import Opening, StringTokens
from quire.sdk import GrammarState

_STATES_AT_A_TIME = 32

__all__ = ["Follower", "GuidanceState", "catch_up_together", "first_line"]


class Follower:
    """Lets the matchers of answers consume tokens in a thread while no request needs them.

    Nothing depends on when the thread wakes: who needs matchers takes ``lock``, which the thread holds for a few tokens
    at a time, and consumes what it did not come to.
    """

    def __init__(self, executor: llguidance.LLExecutor) -> None:
        self.executor = executor
        self.lock = threading.RLock()
        """Of all matchers: whoever holds it may use any."""
        self._is_wanted = False
        self._has_work = threading.Event()
        self._behind: list[GuidanceState] = []
        self._is_started = False

    def take_matchers(self) -> threading.RLock:
        """The lock, for ``with``: the thread leaves the matchers alone until ``begin_catch_up``."""
        self._is_wanted = True
        return self.lock

    def begin_catch_up(self, behind: list[GuidanceState]) -> None:
        """Let the matchers of ``behind`` catch up from now on."""
        self._behind, self._is_wanted = behind, False
        if not self._is_started:
            self._is_started = True
            threading.Thread(target=self._run, name="quire-grammar-follow", daemon=True).start()
            atexit.register(_stop, weakref.ref(self))
        self._has_work.set()

    def _run(self) -> None:
        while self._has_work.wait():
            self._has_work.clear()
            behind = self._behind
            for start in range(0, len(behind), _STATES_AT_A_TIME):
                if self._is_wanted:
                    break
                with self.lock:
                    states = behind[start : start + _STATES_AT_A_TIME]
                    catch_up_together(self.executor, states, 0, lambda: not self._is_wanted)
                    for state in states:
                        if not self._is_wanted:
                            state.look_ahead()


def catch_up_together(
    executor: llguidance.LLExecutor,
    states: list[GuidanceState],
    num_left: int,
    may_go_on: Callable[[], bool] = lambda: True,
) -> None:
    """Let matchers consume what they have not, a token of each at a time: by the library's threads, in calls that leave
    the interpreter to others. Where at most ``num_left`` are behind, they stay so."""
    while len(states := [state for state in states if state.pending]) > num_left and may_go_on():
        executor.consume_token_par([(state.matcher, state.pending[0]) for state in states])
        for state in states:
            del state.pending[0]
            state.has_failed = state.matcher.is_error()


def _stop(follower: weakref.ref[Follower]) -> None:
    """No thread may be in the library when the process ends."""
    if (each := follower()) is not None:
        each.take_matchers().acquire(timeout=1)


class GuidanceState(GrammarState):
    """One answer. The thread of ``follower`` may use the matcher: so does every other thread behind ``get_matcher``."""

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        follower: Follower | None,
        tokens: StringTokens | None,
        bounds: StringBounds | None,
        eos_token_ids: frozenset[int],
        memory: GrammarMemory | None = None,
    ) -> None:
        self.matcher = matcher
        self._memory = memory
        self._place: tuple[bytes, bytes] | None = None  # for whose mask the library is asked
        self._opening: Opening | None = None  # the same, as all grammars know it
        self.follower = follower
        self.strings: StringMasks | None = None
        if tokens is not None and bounds is not None:
            self.strings = StringMasks(self.get_matcher, tokens, bounds, memory)
        self.pending: list[int] = []
        """Tokens that the matcher is still to consume, and will."""
        self.forced: list[int] = []
        """Tokens that have to come next, each alone in its mask; empty: none, or it is not known."""
        self.allowed: NDArray[np.int32] | None = None
        """The mask for the next token, where the library computed it."""
        self.has_failed = False
        """The matcher did not take what it had allowed."""
        self._unread: list[int] = []  # forced tokens of which ``strings`` knows nothing yet
        self._eos_token_ids = eos_token_ids
        self._has_ended = False  # an EOS token came, which the matcher is not told: it stops at the last token before

    def get_matcher(self) -> llguidance.LLMatcher:
        """The matcher, where the answer is."""
        if self.follower is None:
            self.catch_up()
        else:
            with self.follower.take_matchers():
                self.catch_up()
        return self.matcher

    def catch_up(self) -> None:
        """Let the matcher consume what it has not. If it does not take a token, it has failed."""
        if count := len(self.pending):
            self.matcher.consume_tokens(self.pending[:count])
            del self.pending[:count]
            self.has_failed = self.matcher.is_error()

    @property
    def is_behind(self) -> bool:
        """Whether there is something to do before the next tokens come."""
        return bool(self.pending) or (self.strings is not None and self.strings.wants_end)

    def look_ahead(self) -> None:
        """Find out what may end the string that the answer is in, if the matcher is there."""
        if self.strings is not None and self.strings.wants_end and not self.pending:
            self.strings.look_ahead(self.matcher)

    def recall_mask(self, mask: NDArray[np.int32]) -> bool:
        """Write the mask for the next token as another answer found it in the same place. False: none did."""
        if self.strings is None or self._memory is None or (place := self.strings.find_place()) is None:
            return False
        if (known := self._memory.masks.get(place)) is not None:
            self.allowed, self.forced = known.write(mask), known.forced.copy()
            return True
        opening = self.strings.find_opening(place)
        if opening is not None and (shared := self.strings.tokens.openings.get(opening)) is not None:
            self.allowed = shared
            mask[:] = shared
            return True
        self._place, self._opening = place, opening  # to which ``learn_mask`` comes next
        return False

    def learn_mask(self, mask: NDArray[np.int32]) -> None:
        """The library has computed the mask for the next token. If that is a forced one, so may be those behind it."""
        self.allowed = mask.copy()
        if self.strings is not None:
            self.strings.learn_mask(mask)
        self.forced = _find_forced(self.matcher, mask)
        place, opening, self._place, self._opening = self._place, self._opening, None, None
        if place is None or self._memory is None or self.strings is None or self.matcher.is_error():
            return
        if opening is not None and not self.forced:
            self.strings.tokens.learn_opening(opening, self.allowed)
        else:
            self._memory.add_mask(place, self.allowed, self.forced)

    def learn_ends(self, texts: Sequence[bytes]) -> None:
        """Find out the masks behind each of ``texts``, if they may close the string that the answer is in, and are
        tokens."""
        if self.strings is None or self._memory is None or (name := self.strings.property_name) is None:
            return
        mask = np.empty_like(self.strings.tokens.without_closing)
        for text in texts:
            token = self.strings.tokens.closing_ids.get(text)
            if token is None or (name, text) in self._memory.masks:
                continue
            matcher = self.get_matcher().deep_copy()
            if matcher.try_consume_tokens([token]):
                matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
                forced = _find_forced(matcher, mask)
                if not matcher.is_error():
                    self._memory.add_mask((name, text), mask.copy(), forced)

    def write_draft_masks(self, masks: NDArray[np.int32], draft_token_ids: Sequence[int]) -> bool:
        """Write the mask for the next token, and those behind each draft that may come. False where they are not
        known: the answer is in no string, or drafts leave it."""
        forced, num_drafts = self.forced, len(draft_token_ids)
        if not forced:
            return self.strings is not None and self.strings.write_draft_masks(masks, draft_token_ids)
        if len(forced) <= num_drafts or forced[:num_drafts] != list(draft_token_ids):
            return False
        for mask, token in zip(masks, forced[: num_drafts + 1], strict=False):
            _write_token(mask, token)
        return True

    def fill_mask(self, mask: NDArray[np.int32]) -> None:
        """From what is known, or by the library."""
        if self._has_ended:
            mask.fill(0)
        elif self.forced:
            _write_token(mask, self.forced[0])
        elif self.strings is None or not (self.strings.write_mask(mask) or self.recall_mask(mask)):
            self.get_matcher().unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            self._raise_error()
            self.learn_mask(mask)

    def advance(self, token_ids: Sequence[int]) -> int:
        """A token that is known to be allowed is noted; others are asked of the library."""
        if self._has_ended:
            return 0
        num_known = 0
        for token in token_ids:
            if self.forced:
                if token != self.forced[0]:
                    break
                self._take_forced()
            elif self.allowed is not None:
                if token in self._eos_token_ids or not is_set(self.allowed, token):
                    break
                self._go_on(token)
            elif (strings := self.strings) is None:
                break
            elif strings.accept(token):
                self.forced = strings.take_forced_end()
            elif strings.may_close(token) or strings.may_cut(token):
                self._go_on(token)
            else:
                break
            self.pending.append(token)
            num_known += 1
        return num_known + (self._consume(token_ids[num_known:]) if num_known < len(token_ids) else 0)

    def rollback(self, num_tokens: int) -> None:
        """By the library: nothing is known then."""
        if self._has_ended and num_tokens:
            self._has_ended = False
            num_tokens -= 1
        if num_tokens:
            self.get_matcher().rollback(num_tokens)
            self.forced, self.allowed = [], None
            self._unread.clear()
            if self.strings is not None:
                self.strings.reset()

    def forced_tokens(self, max_tokens: int) -> Sequence[int]:
        """As the library says them, but not inside a string, where there are none."""
        if self._has_ended:
            return ()
        if not self.forced and self.strings is not None and self.strings.is_free:
            return ()
        forced = self.forced or self.get_matcher().compute_ff_tokens()
        return forced[:max_tokens]

    def _consume(self, token_ids: Sequence[int]) -> int:
        """Advance by what the library takes of tokens that are not known to be allowed."""
        matcher = self.get_matcher()
        count = next((i for i, token in enumerate(token_ids) if token in self._eos_token_ids), len(token_ids))
        num_taken = matcher.try_consume_tokens(list(token_ids[:count])) if count else 0
        self._raise_error()
        for token in token_ids[:num_taken]:
            self._go_on(token)
        if num_taken == count < len(token_ids) and matcher.is_accepting():
            self._has_ended = True
            num_taken += 1
        return num_taken

    def _take_forced(self) -> None:
        """Go on by the first forced token. ``strings`` is told of all together, since it is not asked meanwhile."""
        self.allowed = None
        self._unread.append(self.forced.pop(0))
        if not self.forced:
            self._read_forced()

    def _read_forced(self) -> None:
        if self.strings is not None:
            for token in self._unread:
                self.strings.advance(token)
        self._unread.clear()

    def _go_on(self, token: int) -> None:
        self._read_forced()
        self.allowed, self.forced = None, []
        if self.strings is not None:
            self.strings.advance(token)

    def _raise_error(self) -> None:
        if self.matcher.is_error():
            raise RuntimeError(first_line(self.matcher.get_error()))


def first_line(text: str) -> str:
    """What the library says of an error, in one line."""
    lines = [line.strip() for line in text.replace("<non-verbose/>", "").splitlines() if line.strip()]
    return " ".join(lines)[:300] if lines else "it cannot be compiled"


def _find_forced(matcher: llguidance.LLMatcher, mask: NDArray[np.int32]) -> list[int]:
    """Tokens that have to come next, if ``mask``, that of the library, has but one."""
    if np.count_nonzero(mask) != 1 or int(mask.view(np.uint32).sum(dtype=np.uint64)).bit_count() != 1:
        return []
    forced: list[int] = matcher.compute_ff_tokens()
    return forced if forced and is_set(mask, forced[0]) else []


def _write_token(mask: NDArray[np.int32], token: int) -> None:
    mask.fill(0)
    mask.view(np.uint32)[token // 32] = 1 << token % 32
