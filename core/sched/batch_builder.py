"""Turns a plan into a step: finds blocks for every grant, preempts when they run out, admits newcomers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from quire.core.contracts.kv import Allocation, KVAllocator
from quire.core.messages import BlockCopy, SchedulerOutput
from quire.core.request import Request
from quire.core.sched.policy_guard import CheckedPlan
from quire.core.sched.running_batch import NEVER, RunningBatch
from quire.core.sched.scheduled_batch import ScheduledBatch
from quire.core.sched.speculation import Speculation
from quire.core.sched.waiting_queue import WaitingQueue

__all__ = ["BatchBuilder"]

_RETRY_AFTER_STEPS = 8
"""Steps after which a newcomer that found no blocks is tried again in any case."""

_LOOKAHEAD_BLOCKS = 3
"""Blocks given to a decoding request beyond the one it needs, while many are free: fewer calls and fewer messages."""


class BatchBuilder:
    """Carries plans out on the table, the queue and the allocator.

    A running request whose blocks run out preempts others: the plan's victims first, then the youngest, itself
    included, but never the oldest, so the oldest always proceeds. A newcomer never causes a preemption: it must leave
    free what the running prompts still need, its own whole prompt, and the watermark, unless nothing runs.
    """

    def __init__(
        self,
        running: RunningBatch,
        waiting: WaitingQueue,
        allocator: KVAllocator,
        *,
        watermark: int,
        preempt: Callable[[Request], None],
        requests: dict[str, Request],
        clock: Callable[[], int],
        speculation: Speculation | None = None,
    ) -> None:
        self._running = running
        self._waiting = waiting
        self._allocator = allocator
        self._watermark = watermark
        self._lookahead_min_free = max(
            allocator.num_blocks // 4, watermark, 2 * _LOOKAHEAD_BLOCKS * running.max_num_seqs
        )
        self._preempt = preempt
        self._requests = requests
        self._clock = clock
        self._speculation = speculation
        self._num_lookahead_tokens = 0 if speculation is None else speculation.num_lookahead_tokens
        self._backoff = _AdmissionBackoff(None, 0)
        self._window_groups = [
            (g, group.window) for g, group in enumerate(allocator.groups) if group.window is not None
        ]

    def apply_plan(
        self, batch: ScheduledBatch, plan: CheckedPlan, running_rows: NDArray[np.int64], waiting_requests: list[Request]
    ) -> None:
        """Add what is possible of the plan, whose requests are numbered ``order`` then ``window``, to the draft."""
        num_running = len(running_rows)
        if not waiting_requests:
            self._schedule_running(
                batch,
                running_rows[plan.request_indices],
                plan.num_scheduled_tokens,
                [int(running_rows[v]) for v in plan.victims],
            )
            return
        running = plan.request_indices < num_running
        rows = running_rows[plan.request_indices[running]]
        if len(rows):
            self._schedule_running(
                batch, rows, plan.num_scheduled_tokens[running], [int(running_rows[v]) for v in plan.victims]
            )
        batch.reserved_blocks = self._count_reserved_blocks()
        newcomers = plan.request_indices[~running] - num_running
        for index, tokens in zip(newcomers.tolist(), plan.num_scheduled_tokens[~running].tolist(), strict=True):
            request = waiting_requests[index]
            if batch.out_of_blocks:
                break
            if self._backoff.should_skip(request, self._allocator.num_free_blocks(), len(self._running)):
                batch.out_of_blocks = True
            elif not self._admit_request(batch, request, tokens):
                batch.out_of_blocks = True
                self._backoff = _AdmissionBackoff(request, self._allocator.num_free_blocks())

    def make_output(self, batch: ScheduledBatch, step: int) -> SchedulerOutput:
        """Close the draft: apply its grants to the table, and describe the step to the worker."""
        table = self._running
        rows, tokens, drafts = batch.rows[0], batch.num_scheduled_tokens[0], batch.num_draft_tokens[0]
        if len(batch.rows) > 1:
            rows, tokens, drafts = map(np.concatenate, (batch.rows, batch.num_scheduled_tokens, batch.num_draft_tokens))
        reached, known = table.num_computed_tokens[rows] + tokens, table.num_tokens[rows]
        samples = reached == known + drafts
        decodes = samples & (tokens == 1)
        num_decodes = int(np.count_nonzero(decodes))
        if num_decodes != len(rows) and (len(batch.rows) > 1 or drafts.any() or not decodes[:num_decodes].all()):
            sequence = np.argsort(np.where(decodes, 0, np.where(drafts > 0, 1, 2)), kind="stable")
            columns = (rows, tokens, drafts, reached, known, samples)
            rows, tokens, drafts, reached, known, samples = (column[sequence] for column in columns)
        table.num_computed_tokens[rows] = reached
        table.num_tokens[rows] = known + samples + drafts
        table.num_in_flight_tokens[rows] += samples + drafts
        output = SchedulerOutput(
            step=step,
            rows=rows.astype(np.int32),
            num_scheduled_tokens=tokens.astype(np.int32),
            sampling_mask=samples,
            num_decodes=num_decodes,
            total_num_scheduled_tokens=int(np.add.reduce(tokens)),
            max_seq_len=int(np.maximum.reduce(reached)),
            max_seq_lens=reached.astype(np.int32),
            new_requests=batch.new_requests,
            block_diffs=batch.block_diffs,
            block_copies=[BlockCopy(*copy[1:]) for copy in batch.block_copies],
            freed_rows=table.take_freed_rows(),
        )
        if self._speculation is not None:
            if drafts.any():
                output.num_draft_tokens = drafts.astype(np.int32)
                output.host_drafts = self._speculation.make_host_drafts(rows, drafts)
            output.num_tokens_to_propose, output.run_draft_prefill = self._speculation.schedule_proposals(
                rows, samples, drafts
            )
        return output

    def _schedule_running(
        self, batch: ScheduledBatch, rows: NDArray[np.int64], tokens: NDArray[np.int64], victims: list[int]
    ) -> None:
        """Grant tokens to running requests, in order."""
        table = self._running
        drafts = np.zeros_like(rows)
        if self._speculation is not None:
            drafts = self._speculation.get_num_drafts(rows, tokens)
            tokens = tokens + drafts
            batch.reserved_draft_budget -= int(drafts.sum())
        computed = table.num_computed_tokens[rows]
        if self._window_groups:
            for row in rows[computed - table.max_overcount[rows] >= table.free_window_at[rows]].tolist():
                self._free_out_of_window_blocks(row)
        reached = computed + tokens
        if self._num_lookahead_tokens:
            reached = np.maximum(
                np.minimum(reached + self._num_lookahead_tokens, table.max_computed_tokens[rows]), reached
            )
        short = (reached > table.num_slots[rows]).nonzero()[0]
        gone = False
        if len(short):
            needy, size = rows[short], self._allocator.block_size
            needs = -(-reached[short] // size) * size
            if self._allocator.num_free_blocks() > self._lookahead_min_free:
                needs += np.minimum(
                    _LOOKAHEAD_BLOCKS * size,
                    np.maximum(table.max_computed_tokens[needy] - needs + size - 1, 0) // size * size,
                )
            columns = (needy, table.requests[needy], computed[short], needs)
            for row, request, start, need in zip(*(column.tolist() for column in columns), strict=True):
                if request.row >= 0:  # else it was preempted for one before it
                    gone |= not self._extend_blocks(batch, row, request, start, need, victims)
            table.num_slots[needy] = needs
        batch.rows.append(rows)
        batch.num_scheduled_tokens.append(tokens)
        batch.num_draft_tokens.append(drafts)
        batch.token_budget -= int(tokens.sum())
        if gone:
            batch.out_of_blocks = True
            batch.drop_preempted(table.generations)

    def _extend_blocks(
        self,
        batch: ScheduledBatch,
        row: int,
        request: Request,
        num_computed_tokens: int,
        num_slots: int,
        victims: list[int],
    ) -> bool:
        """Give a running request blocks for ``need`` tokens. False if somebody had to go for it."""
        undisturbed = True
        while (
            allocation := self._allocator.allocate(request, num_slots, num_computed_tokens=num_computed_tokens)
        ) is None:
            undisturbed = False
            victim = self._pick_victim(victims)
            self._preempt(self._running.get_request(victim))
            if victim == row:
                return False
        batch.record_allocation(row, allocation)
        return undisturbed

    def _pick_victim(self, victims: list[int]) -> int:
        """Who goes next: as the policy wishes, then the youngest; the oldest never."""
        order = self._running.rows
        assert len(order) > 1, "the only running request ran out of blocks although it was found to fit"
        oldest = int(order[0])
        while victims:
            row = victims.pop(0)
            if row != oldest and (order == row).any():
                return row
        return int(order[-1])

    def _admit_request(self, batch: ScheduledBatch, request: Request, tokens: int) -> bool:
        """Move a request from the queue to the table, if its blocks can be had."""
        table, allocator = self._running, self._allocator
        total = len(request.token_ids)
        tokens = min(tokens, batch.token_budget - batch.reserved_draft_budget)
        forked = self._fork_parent(request)
        match = None
        if forked is None:
            match = allocator.match_prefix(request)
            computed = match.num_tokens
        else:
            computed = request.prompt_len - 1
        granted = min(tokens, total - computed)
        size = allocator.block_size
        need = computed + granted
        need = max(need, min(need + self._num_lookahead_tokens, request.max_total_tokens - 1))
        rest = max(-(-total // size) - -(-need // size), 0)
        reserve = self._watermark + batch.reserved_blocks + rest if len(table) else 0
        allocation = allocator.allocate(
            request, need, num_computed_tokens=computed, prefix_match=match, num_reserved_blocks=reserve
        )
        if allocation is None:
            allocator.free(request)
            return False
        batch.prefix_hit_refund |= granted < tokens
        batch.reserved_blocks += rest
        self._waiting.remove_request(request)
        row = table.add_row(request, computed, table.next_block_boundary(need - 1))
        if self._speculation is not None:
            self._speculation.reset_row(row)
        if forked is not None:
            batch.record_allocation(row, forked)
        batch.record_allocation(row, allocation)
        if not request.first_scheduled_ns:
            request.first_scheduled_ns = self._clock()
            request.num_cached_tokens = computed
        if request.prompt_logprobs is not None and request.num_output_tokens == 0:
            request.prompt_logprobs = []
        batch.add_new_request(request, computed)
        batch.rows.append(np.array([row], np.int64))
        batch.num_scheduled_tokens.append(np.array([granted], np.int64))
        batch.num_draft_tokens.append(np.zeros(1, np.int64))
        batch.token_budget -= granted
        return True

    def _fork_parent(self, request: Request) -> Allocation | None:
        """Share the parent's prompt, if it runs and was wholly computed in earlier steps. The child goes on at the
        last prompt token, so it at once gets a copy of the block that both would write; the parent keeps its own."""
        if request.parent_id is None or request.num_output_tokens or request.skip_prefix_cache:
            return None
        parent = self._requests.get(request.parent_id)
        if parent is None or parent.row < 0 or self._running.num_computed_tokens[parent.row] < parent.prompt_len:
            return None
        same = parent.cache_salt == request.cache_salt and parent.token_ids[: parent.prompt_len] == request.token_ids
        if not same or request.prompt_len == 1:
            return None
        return self._allocator.fork_blocks(parent, request, request.prompt_len - 1)

    def _count_reserved_blocks(self) -> int:
        table, size = self._running, self._allocator.block_size
        order = table.rows
        missing = np.minimum(table.num_tokens[order], table.max_computed_tokens[order]) - table.num_slots[order]
        return int(np.maximum((missing + size - 1) // size, 0).sum())

    def _free_out_of_window_blocks(self, row: int) -> None:
        """Give up blocks that every later query of the row has left behind."""
        table, size = self._running, self._allocator.block_size
        computed = int(table.num_computed_tokens[row] - table.max_overcount[row])
        following = NEVER
        for group, window in self._window_groups:
            before = max(computed - window + 1, 0)
            self._allocator.free_out_of_window_blocks(table.get_request(row), group, before)
            following = min(following, (before // size + 1) * size + window - 1)
        table.free_window_at[row] = following


class _AdmissionBackoff:
    """A newcomer for whom there were no blocks: not worth asking again in every step.

    It is asked for again when more blocks are free, when nothing runs, and now and then, since a prefix of its prompt
    may be cached by now.
    """

    def __init__(self, request: Request | None, num_free: int) -> None:
        self._request = request
        self._num_free = num_free
        self._steps_left = _RETRY_AFTER_STEPS

    def should_skip(self, request: Request, num_free: int, num_running: int) -> bool:
        """Whether to spare the attempt in this step."""
        if request is not self._request or num_free > self._num_free or not num_running:
            return False
        self._steps_left -= 1
        return self._steps_left > 0
