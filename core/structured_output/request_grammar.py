"""Where one request is in its grammar."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from quire.core.contracts.structured_output import GrammarState
from quire.core.plugin.quarantine import NEVER_CONTAINED, class_path

__all__ = ["RequestGrammar"]

_log = logging.getLogger("quire.structured_output")


class RequestGrammar:
    """A grammar that follows the tokens of one request, as far as the host knows them.

    It catches up when it is asked for something, so whatever appends tokens need not know of it. A grammar that raises,
    or does not take a token that it had allowed, has an ``error`` from then on, with which its request ends.
    """

    def __init__(self, state: GrammarState, token_ids: list[int], prompt_len: int) -> None:
        self.state = state
        self.error: str | None = None
        self.device_draft_token_ids: list[int] = []
        """Drafts that the last step left on the device for the next one."""
        self._token_ids = token_ids  # the request's own list, which grows
        self._num_advanced = prompt_len

    def catch_up(self) -> bool:
        """Advance by the tokens that were added since. False if the grammar has failed, now or before."""
        if self.error is not None:
            return False
        new_token_ids = self._token_ids[self._num_advanced :]
        if not new_token_ids:
            return True
        try:
            num_taken = self.state.advance(new_token_ids)
        except NEVER_CONTAINED:
            raise
        except BaseException as error:
            self._note_failure(error)
            return False
        if num_taken != len(new_token_ids):
            self.error = f"its grammar does not take token {new_token_ids[num_taken]}, which it had allowed"
            return False
        self._num_advanced += num_taken
        return True

    def forced_tokens(self, max_tokens: int) -> Sequence[int]:
        """Tokens that have to follow those that the host knows; see ``GrammarState.forced_tokens``."""
        if not self.catch_up():
            return ()
        try:
            return self.state.forced_tokens(max_tokens)
        except NEVER_CONTAINED:
            raise
        except BaseException as error:
            self._note_failure(error)
            return ()

    def _note_failure(self, error: BaseException) -> None:
        _log.error("%s: a grammar failed", class_path(self.state), exc_info=error)
        self.error = "its grammar failed; the engine's log says why"
