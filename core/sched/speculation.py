"""Speculative decoding in the scheduler: how many drafts each request verifies in a step, and what came of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.core.config import SpeculationConfig
from quire.core.contracts.spec_decode import HostProposer
from quire.core.messages import HostDraft, SchedulerOutput
from quire.core.plugin.quarantine import Quarantine, class_path
from quire.core.request import Request
from quire.core.sched.draft_length import DraftLengthSettings, DraftLengthTuner
from quire.core.sched.running_batch import RunningBatch
from quire.core.stats import QuarantinedPlugin

__all__ = ["Speculation", "make_speculation"]

_TIME_LIMIT_S, _MAX_SLOW_CALLS, _HANG_LIMIT_S = 0.05, 3, 5.0
"""A proposer on the host is at fault if drafting for a step takes longer, so many times in a row: no step waits for it
otherwise. The limits of a policy."""


class Speculation:
    """A decoding request is granted its drafts beside its one token, as if all were accepted; what was granted for
    rejected drafts is taken back when the step's output is in.

    A proposer on the device drafts behind every step, so that the next step can verify. A proposer on the host is asked
    while a step is scheduled. ``tuner`` says how many drafts pay.
    """

    def __init__(
        self,
        config: SpeculationConfig,
        running: RunningBatch,
        tuner: DraftLengthTuner,
        on_quarantine: Callable[[QuarantinedPlugin], None],
        host: HostProposer | None = None,
        host_name: str | None = None,
    ) -> None:
        self.num_speculative_tokens = config.num_speculative_tokens
        self.num_lookahead_tokens = 0 if host is not None else config.num_speculative_tokens
        """Slots beyond a grant that a proposer on the device may fill with keys and values of its own."""
        self._running = running
        self._host = host
        self.tuner = tuner
        self._num_drafts = np.zeros(running.max_num_seqs, np.int64)  # by row: what the step may verify
        self._host_drafts: dict[int, list[int]] = {}  # by row: what the proposer on the host expects
        self._num_drafted_at = np.zeros(self.num_speculative_tokens, np.int64)  # by position in the draft
        self._num_accepted_at = np.zeros(self.num_speculative_tokens, np.int64)
        self._num_verifications = self._num_accepted = 0
        self._disabled = False
        self._quarantine = Quarantine(
            "spec_decode",
            host_name or class_path(host),
            self._disable_host,
            time_limit_s=_TIME_LIMIT_S,
            hang_limit_s=_HANG_LIMIT_S,
            max_slow_calls=_MAX_SLOW_CALLS,
        )
        self._on_quarantine = on_quarantine

    @property
    def run_draft_prefill(self) -> bool:
        """Whether a proposer on the device should read the prompts of a step: read after ``schedule_proposals``."""
        return self._host is None and not self._disabled and self.tuner.run_draft_prefill

    def plan_drafts(self, token_budget: int) -> int:
        """Before a step is planned: settle how many drafts each decoding request would verify. Returns their sum, at
        most what ``token_budget`` leaves beside one token for each."""
        self._num_drafts[:] = 0
        self._host_drafts.clear()
        table = self._running
        rows = table.rows
        # Decoding: one token is left to compute, and it is a generated one.
        rows = rows[table.num_tokens[rows] - table.num_computed_tokens[rows] == 1]
        rows = rows[(table.num_tokens[rows] > table.prompt_len[rows]) & ~table.is_held[rows]]
        if self._disabled or not len(rows):
            return 0
        share = min(self.num_speculative_tokens, token_budget // len(rows) - 1)
        if share <= 0:
            return 0
        # No draft may lie beyond the last token that the request will compute.
        before_end = table.max_computed_tokens[rows] - table.num_computed_tokens[rows] - 1
        num_drafts = np.minimum(np.minimum(before_end, self.tuner.limit_per_request(rows)), share)
        if self._host is None:
            num_drafts = np.minimum(num_drafts, table.num_device_drafts[rows])
        else:
            num_drafts = self._propose_on_host(self._host, rows, num_drafts)
            num_drafts = np.minimum(num_drafts, self.tuner.choose_length(rows, np.maximum(num_drafts, 0)))
        self._num_drafts[rows] = np.maximum(num_drafts, 0)
        return int(self._num_drafts.sum())

    def get_num_drafts(self, rows: NDArray[np.int64], num_scheduled_tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Drafts to grant to running rows beside what the policy's plan grants them."""
        return np.where(num_scheduled_tokens == 1, self._num_drafts[rows], 0)

    def schedule_proposals(
        self, rows: NDArray[np.int64], sampling_mask: NDArray[np.bool_], num_draft_tokens: NDArray[np.int64]
    ) -> int:
        """After a step is scheduled: count its drafts as in flight. How many tokens a proposer on the device drafts
        behind it, for each row that samples."""
        table = self._running
        table.max_overcount[rows] += num_draft_tokens
        if self._host is not None or self._disabled:
            return 0
        sampling_rows = rows[sampling_mask]
        count = 0
        if len(sampling_rows):
            available = np.full(len(sampling_rows), self.num_speculative_tokens)
            count = self.tuner.choose_length(sampling_rows, available)
        table.num_device_drafts[sampling_rows] = count
        return count

    def make_host_drafts(self, rows: NDArray[np.int64], num_draft_tokens: NDArray[np.int64]) -> list[HostDraft]:
        """What the proposer on the host expects to follow in the rows that verify drafts; empty for one on the
        device."""
        if self._host is None:
            return []
        table = self._running
        return [
            HostDraft(row, table.get_request(row).num_tokens, self._host_drafts[row])
            for row in rows[num_draft_tokens > 0].tolist()
        ]

    def reset_row(self, row: int) -> None:
        """Another request takes the row."""
        self.tuner.reset_row(row)

    def record_step_time(self, step: SchedulerOutput, device_us: float) -> None:
        """A step took ``device_us`` microseconds (0: not known). That tells what a number of drafts costs if the step
        did nothing but decode, and verified as many drafts as it proposed."""
        num_drafts = total_drafts = 0
        if step.num_draft_tokens is not None:
            num_drafts, total_drafts = int(step.num_draft_tokens.max()), int(step.num_draft_tokens.sum())
        only_decodes = step.total_num_scheduled_tokens == len(step.rows) + total_drafts and step.sampling_mask.all()
        if device_us and only_decodes and (self._host is not None or num_drafts == step.num_tokens_to_propose):
            self.tuner.record_step_time(len(step.rows), num_drafts, device_us)

    def record_acceptance(
        self, rows: NDArray[Any], num_verified: NDArray[Any], num_accepted: NDArray[np.int64]
    ) -> None:
        """``rows`` verified and accepted so many drafts each."""
        verified = num_verified > 0
        self.tuner.record_acceptance(rows[verified], num_verified[verified], num_accepted[verified])
        self._num_verifications += int(np.count_nonzero(verified))
        self._num_accepted += int(num_accepted.sum())
        for position in range(int(num_verified.max(initial=0))):
            self._num_drafted_at[position] += np.count_nonzero(num_verified > position)
            self._num_accepted_at[position] += np.count_nonzero(num_accepted > position)

    def request_finished(self, request: Request) -> None:
        """Tell a proposer on the host that a request has ended."""
        if self._host is not None and not self._disabled:
            self._quarantine.call_timed(self._host.request_finished, request)

    def disable_drafting(self) -> None:
        """The proposer failed: nothing is drafted any more."""
        self._disabled = True

    def stats(self) -> dict[str, float]:
        """Counters, by the names of ``quire.core.stats.ENGINE_STATS``, and one more for each position in a draft."""
        drafted, accepted = int(self._num_drafted_at.sum()), int(self._num_accepted_at.sum())
        accepted_per_step = self._num_accepted / self._num_verifications if self._num_verifications else 0.0
        return {
            "spec_decode_num_drafts_total": float(self._num_verifications),
            "spec_decode_num_draft_tokens_total": float(drafted),
            "spec_decode_num_accepted_tokens_total": float(accepted),
            "spec_decode_draft_acceptance_rate": accepted / drafted if drafted else 0.0,
            "spec_decode_efficiency": 1.0 + accepted_per_step,
            "spec_decode_num_speculative_tokens": float(0 if self._disabled else self.tuner.last_length),
            **{f"spec_decode_drafted_at_{i}_total": float(n) for i, n in enumerate(self._num_drafted_at)},
            **{f"spec_decode_accepted_at_{i}_total": float(n) for i, n in enumerate(self._num_accepted_at)},
        }

    def _propose_on_host(
        self, host: HostProposer, rows: NDArray[np.int64], limits: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Ask for what follows the tokens that the host has. The first of those are sampled already, by steps in
        flight: at least ``num_sampled``, and at most ``max_overcount`` more. Only what lies behind them can be a draft:
        how many each row has, at most ``limits`` (negative: too few)."""
        table = self._running
        num_sampled = table.num_in_flight_tokens[rows] - table.max_overcount[rows]
        lengths = (table.num_in_flight_tokens[rows] + limits).tolist()
        proposed = self._quarantine.call_timed(self._propose, host, rows, limits, lengths)
        return np.zeros(len(rows), np.int64) if proposed is None else np.minimum(limits, proposed - num_sampled)

    def _propose(
        self, host: HostProposer, rows: NDArray[np.int64], limits: NDArray[np.int64], lengths: list[int]
    ) -> NDArray[np.int64]:
        """How many tokens the proposer expects to follow for each row; keeps them in ``_host_drafts``."""
        num_proposed = np.zeros(len(rows), np.int64)
        for i, (row, length) in enumerate(zip(rows.tolist(), lengths, strict=True)):
            if limits[i] > 0:
                request = self._running.get_request(row)
                # What a grammar forces is surer than anything that a proposer expects.
                forced = () if request.grammar is None else request.grammar.forced_tokens(length)
                proposed = forced or host.propose(request, length)
                if len(proposed):
                    self._host_drafts[row] = [int(token) for token in proposed[:length]]
                    num_proposed[i] = len(self._host_drafts[row])
        return num_proposed

    def _disable_host(self, plugin: QuarantinedPlugin) -> None:
        self._disabled = True
        self._on_quarantine(plugin)


def make_speculation(
    config: SpeculationConfig | None,
    running: RunningBatch,
    num_stages: int,
    on_quarantine: Callable[[QuarantinedPlugin], None],
    host: HostProposer | None = None,
    host_name: str | None = None,
) -> Speculation | None:
    """Of an engine that keeps a step more in flight than it has stages; None where nothing is drafted."""
    if config is None:
        return None
    settings = DraftLengthSettings(steps_until_committed=num_stages + 1)
    tuner = DraftLengthTuner(
        config.num_speculative_tokens, running.max_num_seqs, config.adaptive, on_device=host is None, settings=settings
    )
    return Speculation(config, running, tuner, on_quarantine, host, host_name)
