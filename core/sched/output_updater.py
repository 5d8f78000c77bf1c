"""Applies the output of a step: tokens, stops, log-probabilities, and what the prefix cache may hold from now on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.core.contracts.kv import KVAllocator
from quire.core.messages import (
    EngineCoreOutput,
    EngineCoreOutputs,
    FinishReason,
    LogprobRows,
    ModelRunnerOutput,
    SchedulerOutput,
    TokenLogprob,
)
from quire.core.request import Request, RequestStatus
from quire.core.sched.running_batch import RunningBatch
from quire.core.sched.scheduled_batch import Fork
from quire.core.sched.speculation import Speculation

__all__ = ["InFlightStep", "OutputUpdater"]

_CACHE_EVERY_BLOCKS = 8
"""Blocks of generated tokens enter the prefix cache so many at a time (those of prompts one by one, because other
requests may need them at once): few calls of the allocator."""


@dataclass(slots=True)
class InFlightStep:
    """A step that the worker runs, with what the running batch said of its rows when it was scheduled."""

    step: SchedulerOutput
    requests: NDArray[Any]  # (num_reqs,) Request objects
    generations: NDArray[np.int64]  # (num_reqs,)
    num_computed_tokens: NDArray[np.int64]  # (num_reqs,) after the step
    forks: list[Fork] = field(default_factory=list)
    """Requests that were admitted with the blocks of their parents."""

    @classmethod
    def from_running(cls, step: SchedulerOutput, running: RunningBatch, forks: list[Fork]) -> InFlightStep:
        """Take the state right after the step was scheduled."""
        rows = step.rows
        return cls(step, running.requests[rows], running.generations[rows], running.num_computed_tokens[rows], forks)

    def prompt_requests(self) -> list[Request]:
        """The requests of whose prompt the step computes a part that children share: all but its last token."""
        num_computed_before = self.num_computed_tokens - self.step.num_scheduled_tokens
        requests: list[Request] = self.requests.tolist()
        return [
            request
            for request, num_tokens in zip(requests, num_computed_before.tolist(), strict=True)
            if num_tokens < request.prompt_len - 1
        ]

    def find_children(self, later_steps: Iterable[InFlightStep]) -> list[Request]:
        """Requests in later steps that share blocks which this one was to fill with a prompt, if it has failed: what
        those steps sample for them is worthless."""
        without_prompt, children = set(self.prompt_requests()), []
        for later in later_steps:
            for fork in later.forks:
                if fork.parent in without_prompt:
                    without_prompt.add(fork.child)
                    children.append(fork.child)
        return children


class OutputUpdater:
    """Applies the outputs of steps, in order. Outputs for requests that have ended are dropped; those for requests that
    were preempted meanwhile are kept."""

    def __init__(
        self,
        running: RunningBatch,
        allocator: KVAllocator,
        finish_request: Callable[[Request, FinishReason, int | str | None], None],
        unpark_request: Callable[[Request], None],
        speculation: Speculation | None = None,
        in_flight: Collection[InFlightStep] = (),
    ) -> None:
        """``in_flight``: the steps behind the one that is applied, as the scheduler has them."""
        self._running = running
        self._in_flight = in_flight
        self._allocator = allocator
        self._finish_request = finish_request
        self._unpark_request = unpark_request
        self._speculation = speculation
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0

    def update_from_output(self, in_flight_step: InFlightStep, output: ModelRunnerOutput) -> EngineCoreOutputs:
        """The new tokens of every request in the step, and which requests end with them."""
        table, step = self._running, in_flight_step.step
        rows = step.rows
        # A row of another generation was freed since: its request has ended or was preempted.
        is_current = table.generations[rows] == in_flight_step.generations
        all_current = np.count_nonzero(is_current) == len(is_current)
        if output.prompt_logprobs:
            self._append_prompt_logprobs(in_flight_step, output, is_current)
        outputs = [] if all_current else self._update_preempted(in_flight_step, output, is_current)
        if self._speculation is not None:
            return self._update_with_drafts(in_flight_step, output, is_current, self._speculation, outputs)
        computed = in_flight_step.num_computed_tokens
        if all_current:
            self._cache_computed_blocks(rows, computed)
        else:
            self._cache_computed_blocks(rows[is_current], computed[is_current])

        # Rows that sampled a token. If all decoded and are still there, ``sampled`` stays None: nothing is copied.
        token_ids, sampled = output.sampled_token_ids[:, 0], None
        if not all_current or step.num_decodes != len(rows):
            sampled = (is_current & step.sampling_mask).nonzero()[0]
            rows, token_ids = rows[sampled], token_ids[sampled]
        in_flight = table.num_in_flight_tokens[rows] - 1
        table.num_in_flight_tokens[rows] = in_flight
        new_token_ids = token_ids.tolist()
        # ``request.token_ids.append(token)`` for every request, without a loop in Python.
        deque(map(list.append, table.token_ids[rows].tolist(), new_token_ids), maxlen=0)
        request_ids = table.request_ids[rows].tolist()
        self.num_generation_tokens += len(new_token_ids)

        # Most requests gain a token and nothing else: they leave as columns. The few of which there may be more to say
        # (a first token, a stop token, the last token, log-probabilities) get an output object instead.
        needs_output_object = table.match_stop_tokens(token_ids)
        needs_output_object |= table.num_tokens[rows] - in_flight >= table.output_object_at[rows]
        requested_logprobs = _select_logprobs(len(new_token_ids), sampled, output.logprobs) if output.logprobs else {}
        if requested_logprobs:
            needs_output_object[list(requested_logprobs)] = True
        indices = needs_output_object.nonzero()[0].tolist()
        for i in indices:
            outputs.append(self._make_output(int(rows[i]), [new_token_ids[i]], requested_logprobs.get(i)))
        for i in reversed(indices):
            del request_ids[i], new_token_ids[i]
        return EngineCoreOutputs(outputs, request_ids, new_token_ids)

    def skip_decodes(self, rows: NDArray[np.int64], num_committed_tokens: NDArray[np.int64], num_steps: int) -> None:
        """``num_steps`` steps of one token for each of ``rows``, whose outputs no one needs; the tokens are in place.
        Blocks are cached up to where these steps would have cached them."""
        table, stride = self._running, _CACHE_EVERY_BLOCKS * self._allocator.block_size
        self.num_generation_tokens += len(rows) * num_steps
        table.num_committed_tokens[rows] = num_committed_tokens
        due = (num_committed_tokens >= table.cache_blocks_at[rows]).nonzero()[0]
        if len(due):
            rows, num_committed_tokens = rows[due], num_committed_tokens[due]
            last = np.maximum(table.cache_blocks_at[rows], num_committed_tokens // stride * stride)
            for request, num_tokens in zip(table.requests[rows].tolist(), last.tolist(), strict=True):
                self._allocator.cache_full_blocks(request, num_tokens)
            table.cache_blocks_at[rows] = num_committed_tokens // stride * stride + stride

    def _update_with_drafts(
        self,
        in_flight_step: InFlightStep,
        output: ModelRunnerOutput,
        is_current: NDArray[np.bool_],
        speculation: Speculation,
        outputs: list[EngineCoreOutput],
    ) -> EngineCoreOutputs:
        """``update_from_output`` where steps may verify drafts: requests gain several tokens, and what was granted for
        rejected drafts is taken back."""
        table, step = self._running, in_flight_step.step
        prompts = (is_current & ~step.sampling_mask).nonzero()[0]  # chunks that do not reach the prompt's end
        self._cache_computed_blocks(step.rows[prompts], in_flight_step.num_computed_tokens[prompts])
        sampled = (is_current & step.sampling_mask).nonzero()[0]
        rows = step.rows[sampled]
        num_new = output.num_sampled_tokens[sampled].astype(np.int64)  # accepted drafts and one token more
        no_drafts: NDArray[Any] = np.zeros(len(step.rows), np.int64)
        num_drafts = no_drafts if step.num_draft_tokens is None else step.num_draft_tokens
        num_drafts = num_drafts[sampled].astype(np.int64)

        # The counts assumed that every draft is accepted: take the rejected ones back.
        num_rejected = num_drafts + 1 - num_new
        in_flight = table.num_in_flight_tokens[rows] - num_drafts - 1
        table.num_in_flight_tokens[rows] = in_flight
        table.max_overcount[rows] -= num_drafts
        table.num_computed_tokens[rows] -= num_rejected
        if table.groups is not None:
            table.groups.count_rejected_drafts(rows, num_rejected)
        num_tokens = table.num_tokens[rows] - num_rejected
        table.num_tokens[rows] = num_tokens

        sampled_token_ids = output.sampled_token_ids[sampled]  # (len(sampled), 1 + k), left-aligned
        is_token = np.arange(sampled_token_ids.shape[1]) < num_new[:, None]
        num_new_tokens = num_new.tolist()
        new_token_ids = [
            padded[:count] for padded, count in zip(sampled_token_ids.tolist(), num_new_tokens, strict=True)
        ]
        deque(map(list.extend, table.token_ids[rows].tolist(), new_token_ids), maxlen=0)
        request_ids = table.request_ids[rows].tolist()
        self.num_generation_tokens += int(num_new.sum())
        # Of the tokens that the host has now, all but the last are computed.
        self._cache_computed_blocks(rows, num_tokens - in_flight - 1)

        num_verified: NDArray[Any] = no_drafts if output.num_verified_drafts is None else output.num_verified_drafts
        speculation.record_acceptance(rows, num_verified[sampled], num_new - 1)
        # A step that also made up for prompts that the proposer had not read says nothing of what drafts take.
        speculation.record_step_time(step, 0.0 if output.ran_draft_backfill else output.device_us)

        # As in ``update_from_output``.
        needs_output_object = (table.match_stop_tokens(sampled_token_ids) & is_token).any(1)
        needs_output_object |= num_tokens - in_flight >= table.output_object_at[rows]
        requested_logprobs = _select_logprobs(len(new_token_ids), sampled, output.logprobs) if output.logprobs else {}
        if requested_logprobs:
            needs_output_object[list(requested_logprobs)] = True
        indices = needs_output_object.nonzero()[0].tolist()
        for i in indices:
            outputs.append(self._make_output(int(rows[i]), new_token_ids[i], requested_logprobs.get(i)))
        for i in reversed(indices):
            del request_ids[i], new_token_ids[i], num_new_tokens[i]
        flat_token_ids = [token for token_ids in new_token_ids for token in token_ids]
        return EngineCoreOutputs(outputs, request_ids, flat_token_ids, num_new_tokens)

    def _update_preempted(
        self, in_flight_step: InFlightStep, output: ModelRunnerOutput, is_current: NDArray[np.bool_]
    ) -> list[EngineCoreOutput]:
        """Tokens of requests that were preempted while the step ran: they count, though the request now waits."""
        outputs, step = [], in_flight_step.step
        for i in (~is_current & step.sampling_mask).nonzero()[0].tolist():
            request: Request = in_flight_step.requests[i]
            if request.status is RequestStatus.FINISHED:
                continue
            new_token_ids = output.sampled_token_ids[i, : output.num_sampled_tokens[i]].tolist()
            request.num_in_flight_tokens -= 1 if step.num_draft_tokens is None else 1 + int(step.num_draft_tokens[i])
            request.token_ids += new_token_ids
            self.num_generation_tokens += len(new_token_ids)
            request_output = EngineCoreOutput(request.request_id, new_token_ids)
            if i in output.logprobs:
                request_output.logprobs = _split_positions(output.logprobs[i])
            self._complete_output(request, request_output)
            # It was parked until its last token in flight: only then is it known what it has to compute again.
            if request_output.finish_reason is None and request.num_in_flight_tokens == 0:
                self._unpark_request(request)
            outputs.append(request_output)
        return outputs

    def _make_output(self, row: int, new_token_ids: list[int], logprobs: list[TokenLogprob] | None) -> EngineCoreOutput:
        """An output object for a running request of which there may be more to say than its tokens."""
        request = self._running.get_request(row)
        self._running.output_object_at[row] = request.max_total_tokens  # the first token is out: next is the last
        output = EngineCoreOutput(request.request_id, new_token_ids, logprobs=logprobs)
        self._complete_output(request, output)
        return output

    def _complete_output(self, request: Request, output: EngineCoreOutput) -> None:
        """Complete the output of a request whose ``token_ids`` already end with the new ones: add what is sent with a
        first token, and end the request at its stop token or length. Tokens after its end are cut off, and so are
        log-probabilities of drafts that were not accepted."""
        new_token_ids = output.new_token_ids
        num_before = request.num_output_tokens - len(new_token_ids)
        output.num_preemptions = request.num_preemptions
        if not num_before:
            output.num_cached_tokens = request.num_cached_tokens
            output.queue_ns = max(request.first_scheduled_ns - request.arrival_ns, 0)
            output.prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, None
            if request.parent_id is None:  # the prompt of n continuations counts once
                self.num_prompt_tokens += request.prompt_len
        for num_output_tokens, token in enumerate(new_token_ids, num_before + 1):
            if token in request.stop_token_ids and num_output_tokens >= request.min_tokens:
                output.finish_reason = "stop"
                output.stop_reason = token if token in request.params.stop_token_ids else None
            elif request.prompt_len + num_output_tokens >= request.max_total_tokens:
                output.finish_reason = "length"
            else:
                continue
            num_extra = num_before + len(new_token_ids) - num_output_tokens
            if num_extra:
                self.num_generation_tokens -= num_extra
                del request.token_ids[-num_extra:], new_token_ids[-num_extra:]
            self._finish_request(request, output.finish_reason, output.stop_reason)
            break
        if output.logprobs:
            del output.logprobs[len(new_token_ids) :]

    def _cache_computed_blocks(self, rows: NDArray[np.int32], num_computed_tokens: NDArray[np.int64]) -> None:
        """Note that the tokens are computed, and put blocks that are full into the prefix cache: at once those of
        prompts, in batches those of generated tokens. What is missing then follows when the request leaves its row."""
        table = self._running
        table.num_committed_tokens[rows] = num_computed_tokens
        due = (num_computed_tokens >= table.cache_blocks_at[rows]).nonzero()[0]
        if len(due):
            rows, num_computed_tokens = rows[due], num_computed_tokens[due]
            for request, num_tokens in zip(table.requests[rows].tolist(), num_computed_tokens.tolist(), strict=True):
                self._allocator.cache_full_blocks(request, num_tokens)
            in_prompt = num_computed_tokens < table.prompt_len[rows]
            stride = np.where(in_prompt, 1, _CACHE_EVERY_BLOCKS) * self._allocator.block_size
            table.cache_blocks_at[rows] = num_computed_tokens // stride * stride + stride

    def _append_prompt_logprobs(
        self, in_flight_step: InFlightStep, output: ModelRunnerOutput, is_current: NDArray[np.bool_]
    ) -> None:
        """Keep log-probabilities of prompt chunks until the first token is out. A preempted request computes its prompt
        again, so those of a chunk count only if it still runs, or if the last chunk was computed, or is in flight."""
        for i, logprobs in output.prompt_logprobs.items():
            request: Request = in_flight_step.requests[i]
            if request.prompt_logprobs is None:
                continue
            steps = (in_flight_step, *self._in_flight)
            generation = in_flight_step.generations[i]
            if is_current[i] or any((generation == s.generations[s.step.sampling_mask]).any() for s in steps):
                request.prompt_logprobs += _split_positions(logprobs)


def _select_logprobs(
    count: int, sampled: NDArray[np.int64] | None, logprobs: dict[int, LogprobRows]
) -> dict[int, list[TokenLogprob]]:
    """Log-probabilities by place among the ``count`` requests that sampled; ``sampled`` has their indices in the step
    (None: the same), by which ``logprobs`` is keyed."""
    indices = range(count) if sampled is None else sampled.tolist()
    return {place: _split_positions(logprobs[index]) for place, index in enumerate(indices) if index in logprobs}


def _split_positions(logprobs: LogprobRows) -> list[TokenLogprob]:
    """One object per position."""
    columns = zip(logprobs.token_ids.tolist(), logprobs.logprobs.tolist(), logprobs.ranks.tolist(), strict=True)
    return [TokenLogprob(token_ids, values, rank) for token_ids, values, rank in columns]
