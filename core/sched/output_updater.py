"""Turns what a step drew into tokens, stops and outputs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
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
from quire.core.sched.speculation import Speculation

__all__ = ["InFlightStep", "OutputUpdater"]

_CACHE_EVERY_BLOCKS = 8
"""Generated blocks are made findable so many at a time."""


@dataclass(slots=True)
class InFlightStep:
    """A step on the worker: whom each of its indices belongs to, and how far each had come with it."""

    step: SchedulerOutput
    requests: NDArray[Any]
    generations: NDArray[np.int64]
    num_computed_tokens: NDArray[np.int64]

    @classmethod
    def from_table(cls, step: SchedulerOutput, table: RunningBatch) -> InFlightStep:
        """Note the table as it is right after planning the step."""
        rows = step.rows
        return cls(step, table.requests[rows], table.generations[rows], table.num_computed_tokens[rows])


class OutputUpdater:
    """Applies the results of steps, in order. Results for requests that have ended are dropped; those for requests
    that were preempted meanwhile are kept."""

    def __init__(
        self,
        table: RunningBatch,
        allocator: KVAllocator,
        finish: Callable[[Request, FinishReason, int | str | None], None],
        landed: Callable[[Request], None],
        speculation: Speculation | None = None,
    ) -> None:
        self._running = table
        self._allocator = allocator
        self._finish_request = finish
        self._unpark_request = landed
        self._speculation = speculation
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0

    def update_from_output(self, in_flight_step: InFlightStep, output: ModelRunnerOutput) -> EngineCoreOutputs:
        """What every request gained, and which ended."""
        table, step = self._running, in_flight_step.step
        rows = step.rows
        here = table.generations[rows] == in_flight_step.generations
        all_here = np.count_nonzero(here) == len(here)
        if output.prompt_logprobs:
            self._append_prompt_logprobs(in_flight_step, output, here)
        outputs = [] if all_here else self._update_preempted(in_flight_step, output, here)
        if self._speculation is not None:
            return self._update_with_drafts(in_flight_step, output, here, self._speculation, outputs)
        self._cache_computed_blocks(
            rows if all_here else rows[here],
            in_flight_step.num_computed_tokens if all_here else in_flight_step.num_computed_tokens[here],
        )
        tokens, drawn = output.sampled_token_ids[:, 0], None
        if not all_here or step.num_decodes != len(rows):
            drawn = (here & step.sampling_mask).nonzero()[0]
            rows, tokens = rows[drawn], tokens[drawn]
        in_flight = table.num_in_flight_tokens[rows] - 1
        table.num_in_flight_tokens[rows] = in_flight
        drew = tokens.tolist()
        deque(map(list.append, table.token_ids[rows].tolist(), drew), maxlen=0)
        ids = table.request_ids[rows].tolist()
        self.num_generation_tokens += len(drew)
        special = table.match_stop_tokens(tokens) | (table.num_tokens[rows] - in_flight >= table.output_object_at[rows])
        asked = _requested_logprobs(len(drew), drawn, output.logprobs) if output.logprobs else {}
        special[list(asked)] = True
        indices = special.nonzero()[0].tolist()
        for i in indices:
            outputs.append(self._make_output(int(rows[i]), [drew[i]], asked.get(i)))
        for i in reversed(indices):
            del ids[i], drew[i]
        return EngineCoreOutputs(outputs, ids, drew)

    def _update_with_drafts(
        self, flight: InFlightStep, result: ModelRunnerOutput, here: NDArray[np.bool_], speculation: Speculation,
        outputs: list[EngineCoreOutput],
    ) -> EngineCoreOutputs:  # fmt: skip
        """``land`` where steps may verify drafts: requests gain several tokens, and what was granted for drafts that
        turned out wrong is taken back."""
        table, step = self._running, flight.step
        prompts = (here & ~step.sampling_mask).nonzero()[0]
        self._cache_computed_blocks(step.rows[prompts], flight.num_computed_tokens[prompts])
        drawn = (here & step.sampling_mask).nonzero()[0]
        rows, gained = step.rows[drawn], result.num_sampled_tokens[drawn].astype(np.int64)
        none: NDArray[Any] = np.zeros(len(step.rows), np.int64)
        drafts = (none if step.num_draft_tokens is None else step.num_draft_tokens)[drawn].astype(np.int64)
        vain = drafts + 1 - gained
        in_flight = table.num_in_flight_tokens[rows] - drafts - 1
        table.num_in_flight_tokens[rows] = in_flight
        table.max_overcount[rows] -= drafts
        table.num_computed_tokens[rows] -= vain
        known = table.num_tokens[rows] - vain
        table.num_tokens[rows] = known
        tokens = result.sampled_token_ids[drawn]
        real = np.arange(tokens.shape[1]) < gained[:, None]
        counts = gained.tolist()
        drew = [line[:count] for line, count in zip(tokens.tolist(), counts, strict=True)]
        deque(map(list.extend, table.token_ids[rows].tolist(), drew), maxlen=0)
        ids = table.request_ids[rows].tolist()
        self.num_generation_tokens += int(gained.sum())
        self._cache_computed_blocks(rows, known - in_flight - 1)
        tried: NDArray[Any] = none if result.num_verified_drafts is None else result.num_verified_drafts
        speculation.record_acceptance(rows, tried[drawn], gained - 1)
        speculation.record_step_time(step, 0.0 if result.ran_draft_backfill else result.device_us)
        special = (table.match_stop_tokens(tokens) & real).any(1) | (known - in_flight >= table.output_object_at[rows])
        asked = _requested_logprobs(len(drew), drawn, result.logprobs) if result.logprobs else {}
        special[list(asked)] = True
        indices = special.nonzero()[0].tolist()
        for i in indices:
            outputs.append(self._make_output(int(rows[i]), drew[i], asked.get(i)))
        for i in reversed(indices):
            del ids[i], drew[i], counts[i]
        return EngineCoreOutputs(outputs, ids, [token for line in drew for token in line], counts)

    def _update_preempted(
        self, flight: InFlightStep, result: ModelRunnerOutput, here: NDArray[np.bool_]
    ) -> list[EngineCoreOutput]:
        """Tokens of requests preempted since: they count, though the request now waits."""
        outputs = []
        for i in (~here & flight.step.sampling_mask).nonzero()[0].tolist():
            request: Request = flight.requests[i]
            if request.status is RequestStatus.FINISHED:
                continue
            tokens = result.sampled_token_ids[i, : result.num_sampled_tokens[i]].tolist()
            request.num_in_flight_tokens -= (
                1 if flight.step.num_draft_tokens is None else 1 + int(flight.step.num_draft_tokens[i])
            )
            request.token_ids += tokens
            self.num_generation_tokens += len(tokens)
            output = EngineCoreOutput(request.request_id, tokens)
            if i in result.logprobs:
                output.logprobs = _logprob_positions(result.logprobs[i])
            self._complete_output(request, output)
            if output.finish_reason is None and request.num_in_flight_tokens == 0:
                self._unpark_request(request)
            outputs.append(output)
        return outputs

    def _make_output(self, row: int, tokens: list[int], logprobs: list[TokenLogprob] | None) -> EngineCoreOutput:
        """An output of its own for a request of which there may be more to say."""
        request = self._running.get_request(row)
        self._running.output_object_at[row] = request.max_total_tokens
        output = EngineCoreOutput(request.request_id, tokens, logprobs=logprobs)
        self._complete_output(request, output)
        return output

    def _complete_output(self, request: Request, output: EngineCoreOutput) -> None:
        """Tokens of which one is the first, perhaps one the last: complete their output, and end the request if it is
        over. Tokens after its end are cut off, and log-probabilities of drafts that were not accepted."""
        new = output.new_token_ids
        before = request.num_output_tokens - len(new)
        if not before:
            output.num_cached_tokens = request.num_cached_tokens
            output.queue_ns = max(request.first_scheduled_ns - request.arrival_ns, 0)
            output.prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, None
            self.num_prompt_tokens += request.prompt_len
        for length, token in enumerate(new, before + 1):
            if token in request.stop_token_ids and length >= request.params.min_tokens:
                output.finish_reason = "stop"
                output.stop_reason = token if token in request.params.stop_token_ids else None
            elif request.prompt_len + length >= request.max_total_tokens:
                output.finish_reason = "length"
            else:
                continue
            extra = before + len(new) - length
            if extra:
                self.num_generation_tokens -= extra
                del request.token_ids[-extra:], new[-extra:]
            self._finish_request(request, output.finish_reason, output.stop_reason)
            break
        if output.logprobs:
            del output.logprobs[len(new) :]

    def _cache_computed_blocks(self, rows: NDArray[np.int32], reached: NDArray[np.int64]) -> None:
        """Note how far everybody has come, and make the blocks of prompts findable. Generated blocks follow in
        batches, and when the request leaves."""
        table = self._running
        table.num_committed_tokens[rows] = reached
        due = (reached >= table.cache_blocks_at[rows]).nonzero()[0]
        if len(due):
            rows, reached = rows[due], reached[due]
            for request, num_tokens in zip(table.requests[rows].tolist(), reached.tolist(), strict=True):
                self._allocator.cache_full_blocks(request, num_tokens)
            stride = np.where(reached < table.prompt_len[rows], 1, _CACHE_EVERY_BLOCKS) * self._allocator.block_size
            table.cache_blocks_at[rows] = reached // stride * stride + stride

    def _append_prompt_logprobs(self, flight: InFlightStep, result: ModelRunnerOutput, here: NDArray[np.bool_]) -> None:
        """Keep log-probabilities of the prompt until its first token is out."""
        for i, rows in result.prompt_logprobs.items():
            request: Request = flight.requests[i]
            if request.prompt_logprobs is not None and (here[i] or flight.step.sampling_mask[i]):
                request.prompt_logprobs += _logprob_positions(rows)


def _requested_logprobs(
    count: int, drawn: NDArray[np.int64] | None, logprobs: dict[int, LogprobRows]
) -> dict[int, list[TokenLogprob]]:
    """Log-probabilities by place among the ``count`` that drew, who are at ``drawn`` in the step (None: all are)."""
    indices = range(count) if drawn is None else drawn.tolist()
    return {place: _logprob_positions(logprobs[index]) for place, index in enumerate(indices) if index in logprobs}


def _logprob_positions(rows: LogprobRows) -> list[TokenLogprob]:
    columns = zip(rows.token_ids.tolist(), rows.logprobs.tolist(), rows.ranks.tolist(), strict=True)
    return [TokenLogprob(ids, values, rank) for ids, values, rank in columns]
