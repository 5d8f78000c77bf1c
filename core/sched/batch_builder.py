"""Turns a policy's plan into a step: allocates blocks for every grant, preempts when they run out, admits waiting
requests, and describes the result to the worker."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from quire.core.contracts.kv import KVAllocator
from quire.core.messages import SchedulerOutput
from quire.core.request import Request
from quire.core.sched.adapter_slots import AdapterSlots
from quire.core.sched.checked_plan import CheckedPlan
from quire.core.sched.running_batch import NEVER, RunningBatch
from quire.core.sched.scheduled_batch import Fork, ScheduledBatch, ScheduledRows
from quire.core.sched.speculation import Speculation
from quire.core.sched.waiting_queue import WaitingQueue

__all__ = ["LOOKAHEAD_BLOCKS", "BatchBuilder"]

_RETRY_AFTER_STEPS = 8
"""Steps after which a waiting request that found no blocks is tried again in any case."""

LOOKAHEAD_BLOCKS = 3
"""Blocks that a decoding request gets beyond the one it needs while many are free: fewer calls of the allocator, and
fewer block diffs for the worker."""


class BatchBuilder:
    """Carries plans out on the running batch, the waiting queue and the allocator.

    A running request that finds no free block preempts others: first the plan's victims, then those that the policy
    ranked last when they arrived, itself included, but never the one that it ranked first, so that this one always
    proceeds. A waiting request never causes a preemption: unless nothing runs, it must leave free what the running
    requests still need, the rest of its own prompt and the watermark.
    """

    def __init__(
        self,
        running: RunningBatch,
        waiting: WaitingQueue,
        allocator: KVAllocator,
        *,
        watermark: int,
        preempt: Callable[[Request], None],
        requests: dict[int, Request],
        clock: Callable[[], int],
        speculation: Speculation | None = None,
        adapter_slots: AdapterSlots | None = None,
    ) -> None:
        self._running = running
        self._waiting = waiting
        self._allocator = allocator
        self._watermark = watermark  # blocks
        # More free blocks than this: every running request could take its lookahead twice.
        self.lookahead_above = max(allocator.num_blocks // 4, watermark, 2 * LOOKAHEAD_BLOCKS * running.max_num_seqs)
        self._preempt = preempt
        self._requests = requests
        self._clock = clock
        self._speculation = speculation
        self._adapter_slots = adapter_slots
        self._num_lookahead_tokens = 0 if speculation is None else speculation.num_lookahead_tokens
        self._backoff = _AdmissionBackoff(None, 0)
        self._window_of_group = {
            index: group.window for index, group in enumerate(allocator.groups) if group.window is not None
        }

    def apply_plan(
        self, batch: ScheduledBatch, plan: CheckedPlan, running_rows: NDArray[np.int64], waiting_requests: list[Request]
    ) -> None:
        """Add to the batch what is possible of the plan. Its request indices count ``running_rows`` first, then
        ``waiting_requests``, as in the view that the policy saw."""
        indices, tokens = plan.request_indices, plan.num_scheduled_tokens
        victims = [int(running_rows[index]) for index in plan.victims]
        if not waiting_requests:  # the common case, without masks
            self._schedule_running(batch, running_rows[indices], tokens, victims)
            return
        is_running = indices < len(running_rows)
        rows = running_rows[indices[is_running]]
        if len(rows):
            self._schedule_running(batch, rows, tokens[is_running], victims)
        # After the running requests have their blocks, because it is what they lack now that must stay free.
        batch.reserved_blocks = self._count_reserved_blocks()
        waiting_indices = (indices[~is_running] - len(running_rows)).tolist()
        for index, num_tokens in zip(waiting_indices, tokens[~is_running].tolist(), strict=True):
            request = waiting_requests[index]
            if batch.out_of_blocks:
                break
            if self._backoff.should_skip(request, self._allocator.num_free_blocks(), len(self._running)):
                batch.out_of_blocks = True
            elif not self._admit_request(batch, request, num_tokens):
                batch.out_of_blocks = True
                self._backoff = _AdmissionBackoff(request, self._allocator.num_free_blocks())
        if batch.prefix_hit_refund and not self._waiting.count_visible(self._running.num_free_rows):
            # Where all that run are served, no request is left that could use what was given back.
            batch.prefix_hit_refund = batch.num_scheduled_rows < self._running.count_runnable()

    def make_output(self, batch: ScheduledBatch, step: int) -> SchedulerOutput:
        """Close the batch: add its grants to the counts of the running batch, and describe the step to the worker."""
        table = self._running
        if len(batch.groups) == 1:
            rows, tokens, drafts = batch.groups[0]
        else:
            rows, tokens, drafts = map(np.concatenate, zip(*batch.groups, strict=True))
        computed, known = table.num_computed_tokens[rows] + tokens, table.num_tokens[rows]
        # A grant that reaches the last token there is (after the drafts, if any) samples the next one.
        samples = computed == known + drafts
        is_decode = samples & (tokens == 1)
        num_decodes = int(np.count_nonzero(is_decode))
        # The worker expects decodes, then requests with drafts, then prompts. One group without drafts whose decodes
        # already come first needs no sort.
        if num_decodes != len(rows) and (len(batch.groups) > 1 or drafts.any() or not is_decode[:num_decodes].all()):
            order = np.argsort(np.where(is_decode, 0, np.where(drafts > 0, 1, 2)), kind="stable")
            columns = (rows, tokens, drafts, computed, known, samples)
            rows, tokens, drafts, computed, known, samples = (column[order] for column in columns)
        # Sampled tokens and drafts count as known from here on: the device feeds them back by itself, so the next step
        # can be scheduled before they are read. ``OutputUpdater`` takes rejected drafts back.
        num_new_tokens = samples + drafts
        table.num_computed_tokens[rows] = computed
        table.num_tokens[rows] = known + num_new_tokens
        table.num_in_flight_tokens[rows] += num_new_tokens
        output = SchedulerOutput(
            step=step,
            rows=rows.astype(np.int32),
            num_scheduled_tokens=tokens.astype(np.int32),
            sampling_mask=samples,
            num_decodes=num_decodes,
            total_num_scheduled_tokens=int(np.add.reduce(tokens)),
            max_seq_len=int(np.maximum.reduce(computed)),
            max_seq_lens=computed.astype(np.int32),
            new_requests=batch.new_requests,
            block_diffs=batch.block_diffs,
            block_copies=[entry.copy for entry in batch.block_copies],
            freed_rows=table.take_freed_rows(),
        )
        if self._speculation is not None:
            if drafts.any():
                output.num_draft_tokens = drafts.astype(np.int32)
                output.host_drafts = self._speculation.make_host_drafts(rows, drafts)
            output.num_tokens_to_propose = self._speculation.schedule_proposals(rows, samples, drafts)
            output.run_draft_prefill = self._speculation.run_draft_prefill
        return output

    def _schedule_running(
        self, batch: ScheduledBatch, rows: NDArray[np.int64], tokens: NDArray[np.int64], victims: list[int]
    ) -> None:
        """Grant ``tokens`` to the running ``rows``, in order, with the blocks for them. ``victims`` are rows."""
        table = self._running
        drafts = np.zeros(len(rows), np.int64)
        if self._speculation is not None:
            drafts = self._speculation.get_num_drafts(rows, tokens)
            tokens = tokens + drafts
            batch.reserved_draft_budget -= int(drafts.sum())
        computed = table.num_computed_tokens[rows]
        if self._window_of_group:
            # The lower bound of what is computed: blocks that a rejected draft would read again must stay.
            left_behind = computed - table.max_overcount[rows] >= table.free_window_at[rows]
            for row in rows[left_behind].tolist():
                self._free_out_of_window_blocks(row)
        # Slots for the grant, and for what a draft model writes beyond it, within the tokens ever computed.
        num_slots = computed + tokens
        if self._num_lookahead_tokens:
            ahead = np.minimum(num_slots + self._num_lookahead_tokens, table.max_computed_tokens[rows])
            num_slots = np.maximum(ahead, num_slots)
        short = (num_slots > table.num_slots[rows]).nonzero()[0]  # in most steps few rows begin a block
        preempted = False
        if len(short):
            preempted = self._allocate_blocks(batch, rows[short], computed[short], num_slots[short], victims)
        batch.groups.append(ScheduledRows(rows, tokens, drafts))
        batch.token_budget -= int(np.add.reduce(tokens))
        if preempted:
            batch.out_of_blocks = True
            batch.drop_preempted(table.generations)

    def _allocate_blocks(
        self,
        batch: ScheduledBatch,
        rows: NDArray[np.int64],
        computed: NDArray[np.int64],
        num_slots: NDArray[np.int64],
        victims: list[int],
    ) -> bool:
        """Give each row blocks for at least ``num_slots`` tokens. Whether a request was preempted for it."""
        table, size = self._running, self._allocator.block_size
        num_slots = -(-num_slots // size) * size  # whole blocks
        if self._allocator.num_free_blocks() > self.lookahead_above:
            # Some blocks ahead, but none that the request would never fill.
            unfilled = np.maximum(table.max_computed_tokens[rows] - num_slots + size - 1, 0) // size * size
            num_slots += np.minimum(LOOKAHEAD_BLOCKS * size, unfilled)
        preempted = False
        columns = (rows, table.requests[rows], computed, num_slots)
        for row, request, start, end in zip(*(column.tolist() for column in columns), strict=True):
            if request.row >= 0:  # else it was preempted for a row before it
                preempted |= self._extend_blocks(batch, row, request, start, end, victims)
        table.num_slots[rows] = num_slots
        return preempted

    def _extend_blocks(
        self, batch: ScheduledBatch, row: int, request: Request, computed: int, num_slots: int, victims: list[int]
    ) -> bool:
        """Give a running request blocks for ``num_slots`` tokens. Whether a request was preempted for it, perhaps
        itself."""
        preempted = False
        while (allocation := self._allocator.allocate(request, num_slots, num_computed_tokens=computed)) is None:
            preempted = True
            victim = self._pick_victim(victims)
            self._preempt(self._running.get_request(victim))
            if victim == row:
                return True
        batch.record_allocation(row, allocation)
        return preempted

    def _pick_victim(self, victims: list[int]) -> int:
        """The row that is preempted next: the policy's choice, then the last by its rank, never the first."""
        running: list[Request] = self._running.requests[self._running.rows].tolist()
        assert len(running) > 1, "the only running request ran out of blocks although it was found to fit"
        by_rank = attrgetter("queue_key")
        first = min(running, key=by_rank)
        while victims:
            row = victims.pop(0)
            if row != first.row and self._running.generations[row]:  # it may have been preempted already
                return row
        return max(running, key=by_rank).row

    def _admit_request(self, batch: ScheduledBatch, request: Request, num_tokens: int) -> bool:
        """Move a request from the queue to the running batch and grant it up to ``num_tokens`` tokens. False, and
        nothing changes, if its blocks cannot be had."""
        table, allocator, size = self._running, self._allocator, self._allocator.block_size
        total = len(request.token_ids)
        num_tokens = min(num_tokens, batch.token_budget - batch.reserved_draft_budget)

        # What is computed already: a parent's prompt (all but its last token, which gives the first logits), or a
        # prefix that is cached.
        prefix_match = None
        parent = self._find_fork_parent(request)
        forked = None if parent is None else allocator.fork_blocks(parent, request, request.prompt_len - 1)
        if parent is not None and forked is not None:
            computed = request.prompt_len - 1
            # Steps in flight may still have to compute the parent's prompt, and may fail.
            committed = min(int(table.num_committed_tokens[parent.row]), computed)
            num_cached = parent.num_cached_tokens  # what the parent computes for both was not in the cache
        else:
            prefix_match = allocator.match_prefix(request)
            computed = committed = num_cached = prefix_match.num_tokens
        granted = min(num_tokens, total - computed)
        num_slots = computed + granted
        num_slots = max(num_slots, min(num_slots + self._num_lookahead_tokens, request.max_total_tokens - 1))

        # Blocks that later chunks of its prompt will need, beside those of this grant.
        rest = max(-(-total // size) - -(-num_slots // size), 0)
        num_reserved = self._watermark + batch.reserved_blocks + rest if len(table) else 0
        allocation = allocator.allocate(
            request,
            num_slots,
            num_computed_tokens=computed,
            prefix_match=prefix_match,
            num_reserved_blocks=num_reserved,
        )
        if allocation is None:
            allocator.free(request)  # the blocks of a fork
            return False

        batch.prefix_hit_refund |= granted < num_tokens
        batch.reserved_blocks += rest
        self._waiting.remove_request(request)
        row = table.add_row(request, computed, committed, table.next_block_boundary(num_slots - 1))
        if self._speculation is not None:
            self._speculation.reset_row(row)
        if self._adapter_slots is not None and request.adapter is not None:
            self._adapter_slots.admit_request(request)
        if parent is not None and forked is not None:
            batch.record_allocation(row, forked)
            batch.forks.append(Fork(request, parent))
        batch.record_allocation(row, allocation)
        if not request.first_scheduled_ns:  # else it was preempted
            request.first_scheduled_ns = self._clock()
            request.num_cached_tokens = num_cached
        if request.prompt_logprobs is not None and request.num_output_tokens == 0:
            request.prompt_logprobs = []  # of a prompt that was preempted half way: gathered again from its start
        batch.add_new_request(request, computed)
        batch.groups.append(
            ScheduledRows(np.array([row], np.int64), np.array([granted], np.int64), np.zeros(1, np.int64))
        )
        batch.token_budget -= granted
        return True

    def _find_fork_parent(self, request: Request) -> Request | None:
        """The request's parent, if its prompt can be shared: it runs, and earlier steps compute the whole prompt. The
        child goes on at the last prompt token, so its allocation at once copies the block that both would write; the
        parent keeps its own."""
        if request.parent_id is None or request.num_output_tokens or request.skip_prefix_cache:
            return None
        parent = self._requests.get(request.parent_id)
        if parent is None or parent.row < 0 or self._running.num_computed_tokens[parent.row] < parent.prompt_len:
            return None
        same = parent.extra_keys == request.extra_keys and parent.token_ids[: parent.prompt_len] == request.token_ids
        return parent if same and request.prompt_len > 1 else None

    def _count_reserved_blocks(self) -> int:
        """Blocks per group that the running requests lack for the tokens that they have."""
        table, size = self._running, self._allocator.block_size
        rows = table.rows
        missing = np.minimum(table.num_tokens[rows], table.max_computed_tokens[rows]) - table.num_slots[rows]
        return int(np.maximum((missing + size - 1) // size, 0).sum())

    def _free_out_of_window_blocks(self, row: int) -> None:
        """Free blocks that every later query of the row has left behind, and note when the next one is."""
        table, size = self._running, self._allocator.block_size
        computed = int(table.num_computed_tokens[row] - table.max_overcount[row])
        free_next_at = NEVER
        for group, window in self._window_of_group.items():
            first_read = max(computed - window + 1, 0)  # the next query is at position ``computed``
            self._allocator.free_out_of_window_blocks(table.get_request(row), group, first_read)
            free_next_at = min(free_next_at, (first_read // size + 1) * size + window - 1)
        table.free_window_at[row] = free_next_at


class _AdmissionBackoff:
    """A waiting request for which there were no blocks: not worth another attempt in every step.

    It is tried again when more blocks are free, when nothing runs, and every few steps, since a prefix of its prompt
    may have been cached meanwhile.
    """

    def __init__(self, request: Request | None, num_free_blocks: int) -> None:
        self._request = request
        self._num_free_blocks = num_free_blocks
        self._steps_left = _RETRY_AFTER_STEPS

    def should_skip(self, request: Request, num_free_blocks: int, num_running: int) -> bool:
        """Whether to spare the attempt in this step."""
        if request is not self._request or num_free_blocks > self._num_free_blocks or not num_running:
            return False
        self._steps_left -= 1
        return self._steps_left > 0
