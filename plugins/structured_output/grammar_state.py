"""Where one answer is in a grammar of llguidance, and what of its next masks is known without asking the library.

The library takes some 25 microseconds to follow a token, and 75 or more for a mask. Most tokens need neither at once:
inside a string masks follow from one that was computed (``string_masks.py``), and where a text is forced its tokens are
known all together. What is known to be allowed is noted, and the matcher follows behind the step, in a thread.
"""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections.abc import Sequence

import llguidance
import numpy as np
from numpy.typing import NDArray

from quire.plugins.structured_output.string_bounds import StringBounds
from quire.plugins.structured_output.string_masks import StringMasks, StringTokens
from quire.sdk import GrammarState

__all__ = ["Follower", "GuidanceState", "first_line"]


class Follower:
    """Lets the matchers of answers consume tokens in a thread, on several of the library's, while nobody needs them."""

    def __init__(self, executor: llguidance.LLExecutor) -> None:
        self.executor = executor
        self._jobs: queue.SimpleQueue[tuple[list[GuidanceState], list[GuidanceState]]] | None = None
        self.is_busy = False
        """Whether it may be using matchers."""
        self._is_idle = threading.Event()
        self._is_idle.set()

    def submit(self, behind: list[GuidanceState], forced: list[GuidanceState]) -> None:
        """Let the matchers of ``behind`` catch up, and find which tokens are forced where ``forced`` are. Their states
        wait for it before they use their matchers."""
        if not behind and not forced:
            return
        if self._jobs is None:
            self._jobs = queue.SimpleQueue()
            threading.Thread(target=self._run, args=(self._jobs,), name="quire-grammar-follow", daemon=True).start()
            atexit.register(_wait_for, weakref.ref(self))  # no thread may be in the library when the process ends
        self._is_idle.clear()
        self.is_busy = True
        self._jobs.put((behind, forced))

    def wait(self) -> None:
        """Until it has nothing to do."""
        if self.is_busy:
            self._is_idle.wait()
            self.is_busy = False

    def catch_up(self, states: Sequence[GuidanceState]) -> None:
        """Now: every matcher is where its answer is."""
        tokens = []
        for state in states:
            if len(state.pending) == 1:
                tokens.append((state.matcher, state.pending.pop()))
            elif state.pending:
                state.matcher.consume_tokens(state.pending)
                state.pending.clear()
        if tokens:
            self.executor.consume_token_par(tokens)

    def _run(self, jobs: queue.SimpleQueue[tuple[list[GuidanceState], list[GuidanceState]]]) -> None:
        while True:
            behind, forced = jobs.get()
            try:
                self.catch_up(behind)
                for state in behind:
                    state.has_failed = state.matcher.is_error()
                for state in forced:
                    state.find_forced()
            finally:
                self._is_idle.set()


def _wait_for(follower: weakref.ref[Follower]) -> None:
    if (each := follower()) is not None:
        each.wait()


class GuidanceState(GrammarState):
    """One answer. ``follower`` may be busy with its matcher: ``get_matcher`` waits for it."""

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
        """The matcher, where the answer is. If it does not take its tokens, it has failed."""
        self._wait()
        if self.pending:
            self.matcher.consume_tokens(self.pending)
            self.pending.clear()
        return self.matcher

    def learn_mask(self, mask: NDArray[np.int32]) -> bool:
        """The library has computed the mask for the next token. Whether it may be a forced one."""
        self.allowed = mask.copy()
        if self.strings is not None:
            self.strings.learn_mask(mask)
        words = mask.nonzero()[0]
        return len(words) == 1 and int(mask[words[0]]).bit_count() == 1

    def find_forced(self) -> None:
        """Ask the library which tokens have to come next, where the mask allows one alone. By the follower's thread, or
        after ``get_matcher``."""
        if self.allowed is not None and not self.pending:
            forced = self.matcher.compute_ff_tokens()
            self.forced = forced if forced and _is_set(self.allowed, forced[0]) else []

    def fill_mask(self, mask: NDArray[np.int32]) -> None:
        """From what is known, or by the library."""
        self._wait()
        if self._has_ended:
            mask.fill(0)
        elif self.forced:
            mask.fill(0)
            mask.view(np.uint32)[self.forced[0] // 32] = 1 << self.forced[0] % 32
        elif self.strings is None or not self.strings.write_mask(mask):
            self.get_matcher().unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            self._raise_error()
            if self.learn_mask(mask):
                self.find_forced()

    def advance(self, token_ids: Sequence[int]) -> int:
        """A token that is known to be allowed is noted; others are asked of the library."""
        if self.follower is not None and self.follower.is_busy:
            self.follower.wait()
        if self._has_ended:
            return 0
        if len(token_ids) == 1:
            token = token_ids[0]
            if self.forced or self.allowed is not None:
                is_known = self._knows(token)
                if is_known:
                    self._go_on(token)
            else:
                is_known = self.strings is not None and self.strings.accept(token)
            if is_known:
                self.pending.append(token)
                return 1
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

    def rollback(self, num_tokens: int) -> None:
        """By the library: nothing is known then."""
        self._wait()
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
        self._wait()
        if self._has_ended or (self.strings is not None and self.strings.is_free):
            return ()
        forced = self.forced or self.get_matcher().compute_ff_tokens()
        return forced[:max_tokens]

    def _wait(self) -> None:
        if self.follower is not None:
            self.follower.wait()

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


def _is_set(mask: NDArray[np.int32], token: int) -> bool:
    return bool(int(mask[token // 32]) >> token % 32 & 1)
