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
from quire.core.sched.running_batch import RunningBatch

if TYPE_CHECKING:
    from quire.core.sched.draft_length import DraftLengthTuner

__all__ = ["Speculation"]

_log = logging.getLogger("quire.sched")


class Speculation:
    """A decoding request is granted its drafts beside its one token, as if all were right; what was granted in vain is
    taken back when the step lands.

    A proposer on the device drafts behind every step, so that the next one can verify; a ``host`` proposer is asked
    while a step is planned. ``pace`` says how many drafts pay.
    """

    def __init__(
        self,
        config: SpeculationConfig,
        running: RunningBatch,
        tuner: DraftLengthTuner,
        host: HostProposer | None = None,
    ) -> None:
        self.num_speculative_tokens = config.num_speculative_tokens
        self.num_lookahead_tokens = 0 if host is not None else config.num_speculative_tokens
        """Slots beyond its grant that a proposer's own keys and values may take."""
        self.num_quarantines = 0
        self._running = running
        self._host = host
        self._tuner = tuner
        self._num_drafts = np.zeros(running.max_num_seqs, np.int64)
        self._host_drafts: dict[int, list[int]] = {}
        self._num_drafted_at = np.zeros(self.num_speculative_tokens, np.int64)
        self._num_accepted_at = np.zeros(self.num_speculative_tokens, np.int64)
        self._num_verifications = self._num_accepted = 0
        self._disabled = False

    def plan_drafts(self, budget: int) -> int:
        """A step is to be planned: settle who would verify how many drafts. Their sum, at most what ``budget`` leaves
        beside a token for each."""
        self._num_drafts[:] = 0
        self._host_drafts.clear()
        table = self._running
        rows = table.rows
        rows = rows[table.num_tokens[rows] - table.num_computed_tokens[rows] == 1]
        rows = rows[table.num_tokens[rows] > table.prompt_len[rows]]
        most = 0 if self._disabled or not len(rows) else min(self.num_speculative_tokens, budget // len(rows) - 1)
        if most <= 0:
            return 0
        room = np.minimum(
            np.minimum(
                table.max_computed_tokens[rows] - table.num_computed_tokens[rows] - 1,
                self._tuner.limit_per_request(rows),
            ),
            most,
        )
        if self._host is None:
            room = np.minimum(room, table.num_device_drafts[rows])
        else:
            room = self._propose_on_host(self._host, rows, room)
            room = np.minimum(room, self._tuner.choose_length(rows, np.maximum(room, 0)))
        self._num_drafts[rows] = np.maximum(room, 0)
        return int(self._num_drafts.sum())

    def get_num_drafts(self, rows: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Drafts for running requests that are granted ``tokens``."""
        return np.where(tokens == 1, self._num_drafts[rows], 0)

    def schedule_proposals(
        self, rows: NDArray[np.int64], samples: NDArray[np.bool_], drafts: NDArray[np.int64]
    ) -> tuple[int, bool]:
        """A step was planned: note the drafts in flight. How many tokens to propose behind it, and whether a proposer
        should read it."""
        table = self._running
        table.max_overcount[rows] += drafts
        if self._host is not None or self._disabled:
            return 0, False
        drew = rows[samples]
        count = self._tuner.choose_length(drew, np.full(len(drew), self.num_speculative_tokens)) if len(drew) else 0
        table.num_device_drafts[drew] = count
        return count, self._tuner.run_draft_prefill

    def make_host_drafts(self, rows: NDArray[np.int64], drafts: NDArray[np.int64]) -> list[HostDraft]:
        """What the host expects of the rows that verify drafts."""
        if self._host is None:
            return []
        table = self._running
        return [
            HostDraft(row, table.get_request(row).num_tokens, self._host_drafts[row])
            for row in rows[drafts > 0].tolist()
        ]

    def reset_row(self, row: int) -> None:
        """A request enters a row."""
        self._tuner.reset_row(row)

    def record_step_time(self, step: SchedulerOutput, took_us: float) -> None:
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
            self._tuner.record_step_time(len(step.rows), drafts, took_us)

    def record_acceptance(self, rows: NDArray[Any], drafted: NDArray[Any], accepted: NDArray[np.int64]) -> None:
        """So many drafts were verified and accepted for requests that decode."""
        tried = drafted > 0
        self._tuner.record_acceptance(rows[tried], drafted[tried], accepted[tried])
        self._num_verifications += int(np.count_nonzero(tried))
        self._num_accepted += int(accepted.sum())
        for place in range(int(drafted.max(initial=0))):
            self._num_drafted_at[place] += np.count_nonzero(drafted > place)
            self._num_accepted_at[place] += np.count_nonzero(accepted > place)

    def request_finished(self, request: Request) -> None:
        """The request has ended."""
        if self._host is not None and not self._disabled:
            try:
                self._host.request_finished(request)
            except Exception as error:
                self._quarantine(error)

    def disable_drafting(self) -> None:
        """The proposer failed: nothing is drafted any more."""
        self._disabled = True

    def stats(self) -> dict[str, float]:
        """Counters, by the names of ``quire.core.stats.ENGINE_STATS``, and one more a position."""
        drafted, accepted = int(self._num_drafted_at.sum()), int(self._num_accepted_at.sum())
        return {
            "plugin_quarantines_total": float(self.num_quarantines),
            "spec_decode_num_drafts_total": float(self._num_verifications),
            "spec_decode_num_draft_tokens_total": float(drafted),
            "spec_decode_num_accepted_tokens_total": float(accepted),
            "spec_decode_draft_acceptance_rate": accepted / drafted if drafted else 0.0,
            "spec_decode_efficiency": 1.0 + self._num_accepted / self._num_verifications
            if self._num_verifications
            else 1.0,
            "spec_decode_num_speculative_tokens": float(0 if self._disabled else self._tuner.last_length),
            **{f"spec_decode_drafted_at_{i}_total": float(n) for i, n in enumerate(self._num_drafted_at)},
            **{f"spec_decode_accepted_at_{i}_total": float(n) for i, n in enumerate(self._num_accepted_at)},
        }

    def _propose_on_host(
        self, host: HostProposer, rows: NDArray[np.int64], room: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Continuations from the tokens on the host on. Some of what follows is drawn already: at least ``drawn``
        tokens, at most ``slack`` more."""
        table = self._running
        drawn = table.num_in_flight_tokens[rows] - table.max_overcount[rows]
        found = np.zeros(len(rows), np.int64)
        reach = (table.num_in_flight_tokens[rows] + room).tolist()
        try:
            for i, (row, count) in enumerate(zip(rows.tolist(), reach, strict=True)):
                if room[i] > 0:
                    guess = host.propose(table.get_request(row), count)
                    if len(guess):
                        self._host_drafts[row] = [int(token) for token in guess[:count]]
                        found[i] = len(self._host_drafts[row])
        except Exception as error:
            self._quarantine(error)
            return np.zeros(len(rows), np.int64)
        return np.minimum(room, found - drawn)

    def _quarantine(self, error: Exception) -> None:
        _log.error("switched off the proposer %s", type(self._host).__name__, exc_info=error)
        self.num_quarantines += 1
        self._disabled = True
