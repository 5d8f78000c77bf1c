"""A scheduler for simulators: it can skip steps of which it is known what they would do."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.core.sched.batch_builder import LOOKAHEAD_BLOCKS
from quire.core.sched.running_batch import NEVER
from quire.core.sched.scheduler import Scheduler

__all__ = ["SkippingScheduler"]


class SkippingScheduler(Scheduler):
    """Skips steps that only repeat the step before: every running request decodes one token more, none arrives, ends or
    is admitted, and the policy promises to grant the same (``BatchingPolicy.changes_only_at_events``).

    After ``skip_steps(n)`` everything is as if ``n`` steps had been scheduled, run and applied, except for the numbers
    of the blocks that requests hold.
    """

    def count_skippable_steps(self, limit: int) -> int:
        """How many steps may be skipped now, with one step in flight, at most ``limit``: 0 if the next step differs
        from it, or may."""
        table, allocator = self._running, self._allocator
        rows = table.rows
        if not len(rows) or len(self.in_flight) != 1 or self._speculation is not None:
            return 0
        if len(self._waiting) and (table.num_free_rows or self._waiting.num_ready != len(self._waiting)):
            return 0
        step = self.in_flight[0].step
        # The step in flight is one of decodes, of all that run.
        if step.num_decodes != len(rows) or len(step.rows) != len(rows) or not step.sampling_mask.all():
            return 0
        if not np.array_equal(np.sort(step.rows), np.sort(rows)) or not self._promises_equal_plans():
            return 0
        computed = table.num_computed_tokens[rows]
        if (table.num_tokens[rows] - computed != 1).any() or table.max_overcount[rows].any():
            return 0
        if (table.free_window_at[rows] != NEVER).any():
            return 0
        # Outputs beyond a token: a first one, and the last. Behind the last but one, a request is left out of the step.
        num_steps = int(
            min(
                limit,
                (table.output_object_at[rows] - table.num_tokens[rows]).min(),
                (table.max_computed_tokens[rows] - table.num_tokens[rows]).min(),
            )
        )
        if num_steps <= 0:
            return 0
        # While many blocks are free, the order in which requests take theirs is of no consequence.
        num_needed = int((self._extend_slots(rows, num_steps) - table.num_slots[rows]).sum()) // allocator.block_size
        if allocator.num_free_blocks() - num_needed <= self._batch_builder.lookahead_above:
            return 0
        return num_steps

    def skip_steps(self, num_steps: int, token_ids: list[list[int]]) -> None:
        """Skip ``num_steps``, at most ``count_skippable_steps``. ``token_ids`` are the tokens whose outputs are
        skipped, ``num_steps`` for each request in the order of ``RunningBatch.rows``: the first is that of the step in
        flight."""
        table = self._running
        rows = table.rows
        num_slots = self._extend_slots(rows, num_steps)
        short = (num_slots > table.num_slots[rows]).nonzero()[0]
        computed = table.num_computed_tokens[rows]
        for i in short.tolist():
            request = table.get_request(int(rows[i]))
            allocation = self._allocator.allocate(
                request, int(num_slots[i]), num_computed_tokens=int(max(computed[i], table.num_slots[rows[i]]))
            )
            assert allocation is not None, "blocks ran out though many were free"
        table.num_slots[rows] = num_slots
        for row, new in zip(rows.tolist(), token_ids, strict=True):
            table.token_ids[row].extend(new)
        # As ``OutputUpdater`` does: the tokens of the step that was in flight, and of all but the last that is now.
        in_flight_step = self.in_flight[0]
        step = in_flight_step.step
        table.num_computed_tokens[rows] = computed + num_steps
        table.num_tokens[rows] += num_steps
        self._output_updater.skip_decodes(rows, table.num_computed_tokens[rows] - 1, num_steps)
        in_flight_step.num_computed_tokens = in_flight_step.num_computed_tokens + num_steps
        step.step += num_steps
        step.max_seq_len += num_steps
        step.max_seq_lens = step.max_seq_lens + np.int32(num_steps)
        self._num_steps += num_steps

    def count_needed_blocks(self, num_steps: int) -> list[int]:
        """How many blocks ``skip_steps(n)`` allocates, for each n from 0 to ``num_steps``."""
        table, size = self._running, self._allocator.block_size
        rows = table.rows
        computed, slots = table.num_computed_tokens[rows], table.num_slots[rows]
        num_needed = np.zeros(num_steps + 1, np.int64)
        while (short := slots < computed + num_steps).any():
            extended = self._extend_once(rows, slots)
            after = np.maximum(slots - computed + 1, 1)  # a step is one too many for the slots
            np.add.at(num_needed, after[short], (extended - slots)[short] // size)
            slots = np.where(short, extended, slots)
        needed: list[int] = num_needed.cumsum().tolist()
        return needed

    def _promises_equal_plans(self) -> bool:
        guard = self.policy_runner.guard
        promised = guard.changes_only_at_events or guard.has_default_plan
        return promised and not guard.wants_reports and not guard.has_groups

    def _extend_slots(self, rows: NDArray[np.int64], num_steps: int) -> NDArray[np.int64]:
        """Tokens for which the rows will have blocks ``num_steps`` later, as ``BatchBuilder`` extends them."""
        table = self._running
        slots: NDArray[Any] = table.num_slots[rows]
        wanted = table.num_computed_tokens[rows] + num_steps
        while (short := slots < wanted).any():
            slots = np.where(short, self._extend_once(rows, slots), slots)
        return slots

    def _extend_once(self, rows: NDArray[np.int64], slots: NDArray[Any]) -> NDArray[Any]:
        size = self._allocator.block_size
        whole = (slots // size + 1) * size  # the block of the next token
        unfilled = np.maximum(self._running.max_computed_tokens[rows] - whole + size - 1, 0) // size * size
        extended: NDArray[Any] = whole + np.minimum(LOOKAHEAD_BLOCKS * size, unfilled)
        return extended
