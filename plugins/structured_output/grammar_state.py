"""Where one answer is in a grammar of llguidance, and what of its next masks is known without asking the library.

The library takes some 25 microseconds to follow a token, and 75 or more for a mask. Most tokens need neither at once:
inside a string masks follow from one that was computed (``string_masks.py``), and where a text is forced its tokens are
known all together. What is known to be allowed is noted, and the matcher follows behind the step, in a thread.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Sequence

import llguidance
import numpy as np
from numpy.typing import NDArray

from quire.plugins.structured_output.string_bounds import StringBounds
from quire.plugins.structured_output.string_masks import StringMasks, StringTokens
from quire.sdk import GrammarState

_STATES_AT_A_TIME = 32

__all__ = ["Follower", "GuidanceState", "first_line"]


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
        if behind:
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
                    if not self._is_wanted:
                        self._catch_up(behind[start : start + _STATES_AT_A_TIME])

    def _catch_up(self, states: list[GuidanceState]) -> None:
        """By a call that leaves the interpreter to others."""
        while states := [state for state in states if state.pending]:
            self.executor.consume_token_par([(state.matcher, state.pending[0]) for state in states])
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
    ) -> None:
        self.matcher = matcher
        self.follower = follower
        self.strings: StringMasks | None = None
        if tokens is not None and bounds is not None:
            self.strings = StringMasks(self.get_matcher, tokens, bounds)
        self.pending: list[int] = []
        """Tokens that the matcher is still to consume, and will."""
        self.forced: list[int] = []
        """Tokens that have to come next, each alone in its mask; empty: none, or it is not known."""
        self.allowed: NDArray[np.int32] | None = None
        """The mask for the next token, where the library computed it."""
        self.has_failed = False
        """The matcher did not take what it had allowed."""
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

    def learn_mask(self, mask: NDArray[np.int32]) -> None:
        """The library has computed the mask for the next token. If that is a forced one, so may be those behind it."""
        self.allowed = mask.copy()
        if self.strings is not None:
            self.strings.learn_mask(mask)
        if np.count_nonzero(mask) == 1 and int(mask.view(np.uint32).sum(dtype=np.uint64)).bit_count() == 1:
            forced = self.matcher.compute_ff_tokens()
            self.forced = forced if forced and _is_set(mask, forced[0]) else []

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
        elif self.strings is None or not self.strings.write_mask(mask):
            self.get_matcher().unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            self._raise_error()
            self.learn_mask(mask)

    def advance(self, token_ids: Sequence[int]) -> int:
        """A token that is known to be allowed is noted; others are asked of the library."""
        if self._has_ended:
            return 0
        num_known = 0
        for token in token_ids:
            if self.forced or self.allowed is not None:
                if not self._knows(token):
                    break
                self._go_on(token)
            elif self.strings is None or not self.strings.accept(token):
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
            if self.strings is not None:
                self.strings.reset()

    def forced_tokens(self, max_tokens: int) -> Sequence[int]:
        """As the library says them, but not inside a string, where there are none."""
        if self._has_ended or (self.strings is not None and self.strings.is_free):
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

    def _knows(self, token: int) -> bool:
        """Whether the token may come, for sure, and no EOS token is meant."""
        if self.forced:
            return token == self.forced[0]
        return self.allowed is not None and token not in self._eos_token_ids and _is_set(self.allowed, token)

    def _go_on(self, token: int) -> None:
        self.allowed = None
        self.forced = self.forced[1:] if self.forced[:1] == [token] else []
        if self.strings is not None:
            self.strings.advance(token)

    def _raise_error(self) -> None:
        if self.matcher.is_error():
            raise RuntimeError(first_line(self.matcher.get_error()))


def first_line(text: str) -> str:
    """What the library says of an error, in one line."""
    lines = [line.strip() for line in text.replace("<non-verbose/>", "").splitlines() if line.strip()]
    return " ".join(lines)[:300] if lines else "it cannot be compiled"


def _write_token(mask: NDArray[np.int32], token: int) -> None:
    mask.fill(0)
    mask.view(np.uint32)[token // 32] = 1 << token % 32


def _is_set(mask: NDArray[np.int32], token: int) -> bool:
    return bool(int(mask[token // 32]) >> token % 32 & 1)
