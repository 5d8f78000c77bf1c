"""How many drafts each request gets in a step, and what came of them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quire.core.config import SpeculationConfig
from quire.core.contracts.spec_decode import HostProposer
from quire.core.messages import HostDraft, SchedulerOutput
from quire.core.request import Request
from quire.core.sched.running_batch import RunningTable

if TYPE_CHECKING:
    from quire.core.sched.draft_length import Pace

__all__ = ["Speculation"]

_log = logging.getLogger("quire.sched")


class Speculation:
    """A decoding request is granted its drafts beside its one token, as if all were right; what was granted in vain is
    taken back when the step lands.

    A proposer on the device drafts behind every step, so that the next one can verify; a ``host`` proposer is asked
    while a step is planned. ``pace`` says how many drafts pay.
    """

    def __init__(
        self, config: SpeculationConfig, table: RunningTable, pace: Pace, host: HostProposer | None = None
    ) -> None:
        self.most = config.num_speculative_tokens
        self.ahead = 0 if host is not None else config.num_speculative_tokens
        """Slots beyond its grant that a proposer's own keys and values may take."""
        self.num_quarantines = 0
        self._table = table
        self._host = host
        self._pace = pace
        self._wanted = np.zeros(table.size, np.int64)
        self._continuations: dict[int, list[int]] = {}
        self._drafted = np.zeros(self.most, np.int64)
        self._accepted = np.zeros(self.most, np.int64)
        self._verified = self._gained = 0
        self._off = False

    def begin(self, budget: int) -> int:
        """A step is to be planned: settle who would verify how many drafts. Their sum, at most what ``budget`` leaves
        beside a token for each."""
        self._wanted[:] = 0
        self._continuations.clear()
        table = self._table
        rows = table.order
        rows = rows[table.known[rows] - table.computed[rows] == 1]
        rows = rows[table.known[rows] > table.prompt_len[rows]]
        most = 0 if self._off or not len(rows) else min(self.most, budget // len(rows) - 1)
        if most <= 0:
            return 0
        room = np.minimum(np.minimum(table.limit[rows] - table.computed[rows] - 1, self._pace.each(rows)), most)
        if self._host is None:
            room = np.minimum(room, table.drafts[rows])
        else:
            room = self._ask(self._host, rows, room)
            room = np.minimum(room, self._pace.choose(rows, np.maximum(room, 0)))
        self._wanted[rows] = np.maximum(room, 0)
        return int(self._wanted.sum())

    def grants(self, rows: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Drafts for running requests that are granted ``tokens``."""
        return np.where(tokens == 1, self._wanted[rows], 0)

    def launched(
        self, rows: NDArray[np.int64], samples: NDArray[np.bool_], drafts: NDArray[np.int64]
    ) -> tuple[int, bool]:
        """A step was planned: note the drafts in flight. How many tokens to propose behind it, and whether a proposer
        should read it."""
        table = self._table
        table.slack[rows] += drafts
        if self._host is not None or self._off:
            return 0, False
        drew = rows[samples]
        count = self._pace.choose(drew, np.full(len(drew), self.most)) if len(drew) else 0
        table.drafts[drew] = count
        return count, self._pace.reads

    def continuations(self, rows: NDArray[np.int64], drafts: NDArray[np.int64]) -> list[HostDraft]:
        """What the host expects of the rows that verify drafts."""
        if self._host is None:
            return []
        table = self._table
        return [
            HostDraft(row, table.request(row).num_tokens, self._continuations[row]) for row in rows[drafts > 0].tolist()
        ]

    def entered(self, row: int) -> None:
        """A request enters a row."""
        self._pace.enter(row)

    def timed(self, step: SchedulerOutput, took_us: float) -> None:
        """A step has landed. It tells what a number of drafts costs if it did nothing else than decode, and verified as
        many as it proposed."""
        drafts = 0 if step.num_draft_tokens is None else int(step.num_draft_tokens.max())
        alone = step.total_num_scheduled_tokens == len(step.rows) + (
            0 if step.num_draft_tokens is None else int(step.num_draft_tokens.sum())
        )
        if (
            took_us
            and alone
            and step.sampling_mask.all()
            and (self._host is not None or drafts == step.num_tokens_to_propose)
        ):
            self._pace.timed(len(step.rows), drafts, took_us)

    def landed(self, rows: NDArray[Any], drafted: NDArray[Any], accepted: NDArray[np.int64]) -> None:
        """So many drafts were verified and accepted for requests that decode."""
        tried = drafted > 0
        self._pace.learn(rows[tried], drafted[tried], accepted[tried])
        self._verified += int(np.count_nonzero(tried))
        self._gained += int(accepted.sum())
        for place in range(int(drafted.max(initial=0))):
            self._drafted[place] += np.count_nonzero(drafted > place)
            self._accepted[place] += np.count_nonzero(accepted > place)

    def forget(self, request: Request) -> None:
        """The request has ended."""
        if self._host is not None and not self._off:
            try:
                self._host.request_finished(request)
            except Exception as error:
                self._quarantine(error)

    def switch_off(self) -> None:
        """The proposer failed: nothing is drafted any more."""
        self._off = True

    def stats(self) -> dict[str, float]:
        """Counters, by the names of ``quire.core.stats.ENGINE_STATS``, and one more a position."""
        drafted, accepted = int(self._drafted.sum()), int(self._accepted.sum())
        return {
            "plugin_quarantines_total": float(self.num_quarantines),
            "spec_decode_num_drafts_total": float(self._verified),
            "spec_decode_num_draft_tokens_total": float(drafted),
            "spec_decode_num_accepted_tokens_total": float(accepted),
            "spec_decode_draft_acceptance_rate": accepted / drafted if drafted else 0.0,
            "spec_decode_efficiency": 1.0 + self._gained / self._verified if self._verified else 1.0,
            "spec_decode_num_speculative_tokens": float(0 if self._off else self._pace.last),
            **{f"spec_decode_drafted_at_{i}_total": float(n) for i, n in enumerate(self._drafted)},
            **{f"spec_decode_accepted_at_{i}_total": float(n) for i, n in enumerate(self._accepted)},
        }

    def _ask(self, host: HostProposer, rows: NDArray[np.int64], room: NDArray[np.int64]) -> NDArray[np.int64]:
        """Continuations from the tokens on the host on. Some of what follows is drawn already: at least ``drawn``
        tokens, at most ``slack`` more."""
        table = self._table
        drawn = table.in_flight[rows] - table.slack[rows]
        found = np.zeros(len(rows), np.int64)
        reach = (table.in_flight[rows] + room).tolist()
        try:
            for i, (row, count) in enumerate(zip(rows.tolist(), reach, strict=True)):
                if room[i] > 0:
                    guess = host.propose(table.request(row), count)
                    if len(guess):
                        self._continuations[row] = [int(token) for token in guess[:count]]
                        found[i] = len(self._continuations[row])
        except Exception as error:
            self._quarantine(error)
            return np.zeros(len(rows), np.int64)
        return np.minimum(room, found - drawn)

    def _quarantine(self, error: Exception) -> None:
        _log.error("switched off the proposer %s", type(self._host).__name__, exc_info=error)
        self.num_quarantines += 1
        self._off = True
