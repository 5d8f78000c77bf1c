"""Turns a plan into a step: finds blocks for every grant, preempts when they run out, admits newcomers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from quire.core.contracts.kv import Allocation, KVAllocator
from quire.core.messages import SchedulerOutput
from quire.core.request import Request
from quire.core.sched.policy_guard import Plan
from quire.core.sched.running_batch import NEVER, RunningTable
from quire.core.sched.scheduled_batch import Draft
from quire.core.sched.speculation import Speculation
from quire.core.sched.waiting_queue import WaitingQueue

__all__ = ["Realiser"]

_RETRY = 8
"""Steps after which a newcomer that found no blocks is tried again in any case."""

_AHEAD = 3
"""Blocks given to a decoding request beyond the one it needs, while many are free: fewer calls and fewer messages."""


class Realiser:
    """Carries plans out on the table, the queue and the allocator.

    A running request whose blocks run out preempts others: the plan's victims first, then the youngest, itself
    included, but never the oldest, so the oldest always proceeds. A newcomer never causes a preemption: it must leave
    free what the running prompts still need, its own whole prompt, and the watermark, unless nothing runs.
    """

    def __init__(
        self,
        table: RunningTable,
        queue: WaitingQueue,
        allocator: KVAllocator,
        *,
        watermark: int,
        preempt: Callable[[Request], None],
        requests: dict[str, Request],
        clock: Callable[[], int],
        speculation: Speculation | None = None,
    ) -> None:
        self._table = table
        self._queue = queue
        self._allocator = allocator
        self._watermark = watermark
        self._roomy = max(allocator.num_blocks // 4, watermark, 2 * _AHEAD * table.size)
        self._preempt = preempt
        self._requests = requests
        self._clock = clock
        self._speculation = speculation
        self._ahead = 0 if speculation is None else speculation.ahead
        self._refused = _Refusal(None, 0)
        self._windows = [(g, group.window) for g, group in enumerate(allocator.groups) if group.window is not None]

    def realise(self, draft: Draft, plan: Plan, order: NDArray[np.int64], window: list[Request]) -> None:
        """Add what is possible of the plan, whose requests are numbered ``order`` then ``window``, to the draft."""
        num_running = len(order)
        if not window:
            self._serve(draft, order[plan.rows], plan.tokens, [int(order[v]) for v in plan.victims])
            return
        running = plan.rows < num_running
        rows = order[plan.rows[running]]
        if len(rows):
            self._serve(draft, rows, plan.tokens[running], [int(order[v]) for v in plan.victims])
        draft.owed = self._owed()
        newcomers = plan.rows[~running] - num_running
        for index, tokens in zip(newcomers.tolist(), plan.tokens[~running].tolist(), strict=True):
            request = window[index]
            if draft.blocked:
                break
            if self._refused.still(request, self._allocator.num_free_blocks(), len(self._table)):
                draft.blocked = True
            elif not self._admit(draft, request, tokens):
                draft.blocked = True
                self._refused = _Refusal(request, self._allocator.num_free_blocks())

    def output(self, draft: Draft, step: int) -> SchedulerOutput:
        """Close the draft: apply its grants to the table, and describe the step to the worker."""
        table = self._table
        rows, tokens, drafts = draft.rows[0], draft.tokens[0], draft.drafts[0]
        if len(draft.rows) > 1:
            rows, tokens, drafts = map(np.concatenate, (draft.rows, draft.tokens, draft.drafts))
        reached, known = table.computed[rows] + tokens, table.known[rows]
        samples = reached == known + drafts
        decodes = samples & (tokens == 1)
        num_decodes = int(np.count_nonzero(decodes))
        if num_decodes != len(rows) and (len(draft.rows) > 1 or drafts.any() or not decodes[:num_decodes].all()):
            sequence = np.argsort(np.where(decodes, 0, np.where(drafts > 0, 1, 2)), kind="stable")
            columns = (rows, tokens, drafts, reached, known, samples)
            rows, tokens, drafts, reached, known, samples = (column[sequence] for column in columns)
        table.computed[rows] = reached
        table.known[rows] = known + samples + drafts
        table.in_flight[rows] += samples + drafts
        output = SchedulerOutput(
            step=step,
            rows=rows.astype(np.int32),
            num_scheduled_tokens=tokens.astype(np.int32),
            sampling_mask=samples,
            num_decodes=num_decodes,
            total_num_scheduled_tokens=int(np.add.reduce(tokens)),
            max_seq_len=int(np.maximum.reduce(reached)),
            max_seq_lens=reached.astype(np.int32),
            new_requests=draft.new_requests,
            block_diffs=draft.diffs,
            block_copies=[copy[1:] for copy in draft.copies],
            freed_rows=table.take_left(),
        )
        if self._speculation is not None:
            if drafts.any():
                output.num_draft_tokens = drafts.astype(np.int32)
                output.host_drafts = self._speculation.continuations(rows, drafts)
            output.num_tokens_to_propose, output.run_draft_prefill = self._speculation.launched(rows, samples, drafts)
        return output

    def _serve(self, draft: Draft, rows: NDArray[np.int64], tokens: NDArray[np.int64], victims: list[int]) -> None:
        """Grant tokens to running requests, in order."""
        table = self._table
        drafts = np.zeros_like(rows)
        if self._speculation is not None:
            drafts = self._speculation.grants(rows, tokens)
            tokens = tokens + drafts
            draft.promised -= int(drafts.sum())
        computed = table.computed[rows]
        if self._windows:
            for row in rows[computed - table.slack[rows] >= table.next_trim[rows]].tolist():
                self._trim(row)
        reached = computed + tokens
        if self._ahead:
            reached = np.maximum(np.minimum(reached + self._ahead, table.limit[rows]), reached)
        short = (reached > table.capacity[rows]).nonzero()[0]
        gone = False
        if len(short):
            needy, size = rows[short], self._allocator.block_size
            needs = -(-reached[short] // size) * size
            if self._allocator.num_free_blocks() > self._roomy:
                needs += np.minimum(_AHEAD * size, np.maximum(table.limit[needy] - needs + size - 1, 0) // size * size)
            columns = (needy, table.requests[needy], computed[short], needs)
            for row, request, start, need in zip(*(column.tolist() for column in columns), strict=True):
                if request.row >= 0:  # else it was preempted for one before it
                    gone |= not self._extend(draft, row, request, start, need, victims)
            table.capacity[needy] = needs
        draft.rows.append(rows)
        draft.tokens.append(tokens)
        draft.drafts.append(drafts)
        draft.budget_left -= int(tokens.sum())
        if gone:
            draft.blocked = True
            draft.scrub(table.stamps)

    def _extend(self, draft: Draft, row: int, request: Request, computed: int, need: int, victims: list[int]) -> bool:
        """Give a running request blocks for ``need`` tokens. False if somebody had to go for it."""
        undisturbed = True
        while (allocation := self._allocator.allocate(request, need, num_computed_tokens=computed)) is None:
            undisturbed = False
            victim = self._victim(victims)
            self._preempt(self._table.request(victim))
            if victim == row:
                return False
        draft.record(row, allocation)
        return undisturbed

    def _victim(self, victims: list[int]) -> int:
        """Who goes next: as the policy wishes, then the youngest; the oldest never."""
        order = self._table.order
        assert len(order) > 1, "the only running request ran out of blocks although it was found to fit"
        oldest = int(order[0])
        while victims:
            row = victims.pop(0)
            if row != oldest and (order == row).any():
                return row
        return int(order[-1])

    def _admit(self, draft: Draft, request: Request, tokens: int) -> bool:
        """Move a request from the queue to the table, if its blocks can be had."""
        table, allocator = self._table, self._allocator
        total = len(request.token_ids)
        tokens = min(tokens, draft.budget_left - draft.promised)
        forked = self._fork(request)
        match = None
        if forked is None:
            match = allocator.match_prefix(request)
            computed = match.num_tokens
        else:
            computed = request.prompt_len - 1
        granted = min(tokens, total - computed)
        size = allocator.block_size
        need = computed + granted
        need = max(need, min(need + self._ahead, request.max_total_tokens - 1))
        rest = max(-(-total // size) - -(-need // size), 0)
        reserve = self._watermark + draft.owed + rest if len(table) else 0
        allocation = allocator.allocate(
            request, need, num_computed_tokens=computed, prefix_match=match, num_reserved_blocks=reserve
        )
        if allocation is None:
            allocator.free(request)
            return False
        draft.refunded |= granted < tokens
        draft.owed += rest
        self._queue.remove(request)
        row = table.admit(request, computed, table.block_end(need - 1))
        if self._speculation is not None:
            self._speculation.entered(row)
        if forked is not None:
            draft.record(row, forked)
        draft.record(row, allocation)
        if not request.first_scheduled_ns:
            request.first_scheduled_ns = self._clock()
            request.num_cached_tokens = computed
        if request.prompt_logprobs is not None and request.num_output_tokens == 0:
            request.prompt_logprobs = []
        draft.introduce(request, computed)
        draft.rows.append(np.array([row], np.int64))
        draft.tokens.append(np.array([granted], np.int64))
        draft.drafts.append(np.zeros(1, np.int64))
        draft.budget_left -= granted
        return True

    def _fork(self, request: Request) -> Allocation | None:
        """Share the parent's prompt, if it runs and was wholly computed in earlier steps. The child goes on at the
        last prompt token, so it at once gets a copy of the block that both would write; the parent keeps its own."""
        if request.parent_id is None or request.num_output_tokens or request.skip_prefix_cache:
            return None
        parent = self._requests.get(request.parent_id)
        if parent is None or parent.row < 0 or self._table.computed[parent.row] < parent.prompt_len:
            return None
        same = parent.cache_salt == request.cache_salt and parent.token_ids[: parent.prompt_len] == request.token_ids
        if not same or request.prompt_len == 1:
            return None
        return self._allocator.fork_blocks(parent, request, request.prompt_len - 1)

    def _owed(self) -> int:
        table, size = self._table, self._allocator.block_size
        order = table.order
        missing = np.minimum(table.known[order], table.limit[order]) - table.capacity[order]
        return int(np.maximum((missing + size - 1) // size, 0).sum())

    def _trim(self, row: int) -> None:
        """Give up blocks that every later query of the row has left behind."""
        table, size = self._table, self._allocator.block_size
        computed = int(table.computed[row] - table.slack[row])
        following = NEVER
        for group, window in self._windows:
            before = max(computed - window + 1, 0)
            self._allocator.free_out_of_window_blocks(table.request(row), group, before)
            following = min(following, (before // size + 1) * size + window - 1)
        table.next_trim[row] = following


class _Refusal:
    """A newcomer for whom there were no blocks: not worth asking again in every step.

    It is asked for again when more blocks are free, when nothing runs, and now and then, since a prefix of its prompt
    may be cached by now.
    """

    def __init__(self, request: Request | None, num_free: int) -> None:
        self._request = request
        self._num_free = num_free
        self._steps_left = _RETRY

    def still(self, request: Request, num_free: int, num_running: int) -> bool:
        """Whether to spare the attempt in this step."""
        if request is not self._request or num_free > self._num_free or not num_running:
            return False
        self._steps_left -= 1
        return self._steps_left > 0
