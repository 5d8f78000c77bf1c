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
from quire.core.sched.running_batch import RunningTable
from quire.core.sched.speculation import Speculation

__all__ = ["Flight", "Landing"]

_BATCH = 8
"""Generated blocks are made findable so many at a time."""


@dataclass(slots=True)
class Flight:
    """A step on the worker: whom each of its indices belongs to, and how far each had come with it."""

    step: SchedulerOutput
    requests: NDArray[Any]
    stamps: NDArray[np.int64]
    reached: NDArray[np.int64]

    @classmethod
    def of(cls, step: SchedulerOutput, table: RunningTable) -> Flight:
        """Note the table as it is right after planning the step."""
        rows = step.rows
        return cls(step, table.requests[rows], table.stamps[rows], table.computed[rows])


class Landing:
    """Applies the results of steps, in order. Results for requests that have ended are dropped; those for requests
    that were preempted meanwhile are kept."""

    def __init__(
        self,
        table: RunningTable,
        allocator: KVAllocator,
        finish: Callable[[Request, FinishReason, int | str | None], None],
        landed: Callable[[Request], None],
        speculation: Speculation | None = None,
    ) -> None:
        self._table = table
        self._allocator = allocator
        self._finish = finish
        self._landed = landed
        self._speculation = speculation
        self.num_prompt_tokens = 0
        self.num_generated = 0

    def land(self, flight: Flight, result: ModelRunnerOutput) -> EngineCoreOutputs:
        """What every request gained, and which ended."""
        table, step = self._table, flight.step
        rows = step.rows
        here = table.stamps[rows] == flight.stamps
        all_here = np.count_nonzero(here) == len(here)
        if result.prompt_logprobs:
            self._gather(flight, result, here)
        outputs = [] if all_here else self._land_away(flight, result, here)
        if self._speculation is not None:
            return self._land_drafts(flight, result, here, self._speculation, outputs)
        self._store(rows if all_here else rows[here], flight.reached if all_here else flight.reached[here])
        tokens, drawn = result.sampled_token_ids[:, 0], None
        if not all_here or step.num_decodes != len(rows):
            drawn = (here & step.sampling_mask).nonzero()[0]
            rows, tokens = rows[drawn], tokens[drawn]
        in_flight = table.in_flight[rows] - 1
        table.in_flight[rows] = in_flight
        drew = tokens.tolist()
        deque(map(list.append, table.tokens[rows].tolist(), drew), maxlen=0)
        ids = table.ids[rows].tolist()
        self.num_generated += len(drew)
        special = table.may_stop(tokens) | (table.known[rows] - in_flight >= table.next_event[rows])
        asked = _asked(len(drew), drawn, result.logprobs) if result.logprobs else {}
        special[list(asked)] = True
        indices = special.nonzero()[0].tolist()
        for i in indices:
            outputs.append(self._single_out(int(rows[i]), [drew[i]], asked.get(i)))
        for i in reversed(indices):
            del ids[i], drew[i]
        return EngineCoreOutputs(outputs, ids, drew)

    def _land_drafts(
        self, flight: Flight, result: ModelRunnerOutput, here: NDArray[np.bool_], speculation: Speculation,
        outputs: list[EngineCoreOutput],
    ) -> EngineCoreOutputs:  # fmt: skip
        """``land`` where steps may verify drafts: requests gain several tokens, and what was granted for drafts that
        turned out wrong is taken back."""
        table, step = self._table, flight.step
        prompts = (here & ~step.sampling_mask).nonzero()[0]
        self._store(step.rows[prompts], flight.reached[prompts])
        drawn = (here & step.sampling_mask).nonzero()[0]
        rows, gained = step.rows[drawn], result.num_sampled_tokens[drawn].astype(np.int64)
        none: NDArray[Any] = np.zeros(len(step.rows), np.int64)
        drafts = (none if step.num_draft_tokens is None else step.num_draft_tokens)[drawn].astype(np.int64)
        vain = drafts + 1 - gained
        in_flight = table.in_flight[rows] - drafts - 1
        table.in_flight[rows] = in_flight
        table.slack[rows] -= drafts
        table.computed[rows] -= vain
        known = table.known[rows] - vain
        table.known[rows] = known
        tokens = result.sampled_token_ids[drawn]
        real = np.arange(tokens.shape[1]) < gained[:, None]
        counts = gained.tolist()
        drew = [line[:count] for line, count in zip(tokens.tolist(), counts, strict=True)]
        deque(map(list.extend, table.tokens[rows].tolist(), drew), maxlen=0)
        ids = table.ids[rows].tolist()
        self.num_generated += int(gained.sum())
        self._store(rows, known - in_flight - 1)
        tried: NDArray[Any] = none if result.num_verified_drafts is None else result.num_verified_drafts
        speculation.landed(rows, tried[drawn], gained - 1)
        speculation.timed(step, 0.0 if result.ran_draft_backfill else result.device_us)
        special = (table.may_stop(tokens) & real).any(1) | (known - in_flight >= table.next_event[rows])
        asked = _asked(len(drew), drawn, result.logprobs) if result.logprobs else {}
        special[list(asked)] = True
        indices = special.nonzero()[0].tolist()
        for i in indices:
            outputs.append(self._single_out(int(rows[i]), drew[i], asked.get(i)))
        for i in reversed(indices):
            del ids[i], drew[i], counts[i]
        return EngineCoreOutputs(outputs, ids, [token for line in drew for token in line], counts)

    def _land_away(self, flight: Flight, result: ModelRunnerOutput, here: NDArray[np.bool_]) -> list[EngineCoreOutput]:
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
            self.num_generated += len(tokens)
            output = EngineCoreOutput(request.request_id, tokens)
            if i in result.logprobs:
                output.logprobs = _positions(result.logprobs[i])
            self._look(request, output)
            if output.finish_reason is None and request.num_in_flight_tokens == 0:
                self._landed(request)
            outputs.append(output)
        return outputs

    def _single_out(self, row: int, tokens: list[int], logprobs: list[TokenLogprob] | None) -> EngineCoreOutput:
        """An output of its own for a request of which there may be more to say."""
        request = self._table.request(row)
        self._table.next_event[row] = request.max_total_tokens
        output = EngineCoreOutput(request.request_id, tokens, logprobs=logprobs)
        self._look(request, output)
        return output

    def _look(self, request: Request, output: EngineCoreOutput) -> None:
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
                self.num_generated -= extra
                del request.token_ids[-extra:], new[-extra:]
            self._finish(request, output.finish_reason, output.stop_reason)
            break
        if output.logprobs:
            del output.logprobs[len(new) :]

    def _store(self, rows: NDArray[np.int32], reached: NDArray[np.int64]) -> None:
        """Note how far everybody has come, and make the blocks of prompts findable. Generated blocks follow in
        batches, and when the request leaves."""
        table = self._table
        table.landed[rows] = reached
        due = (reached >= table.next_store[rows]).nonzero()[0]
        if len(due):
            rows, reached = rows[due], reached[due]
            for request, num_tokens in zip(table.requests[rows].tolist(), reached.tolist(), strict=True):
                self._allocator.cache_full_blocks(request, num_tokens)
            stride = np.where(reached < table.prompt_len[rows], 1, _BATCH) * self._allocator.block_size
            table.next_store[rows] = reached // stride * stride + stride

    def _gather(self, flight: Flight, result: ModelRunnerOutput, here: NDArray[np.bool_]) -> None:
        """Keep log-probabilities of the prompt until its first token is out."""
        for i, rows in result.prompt_logprobs.items():
            request: Request = flight.requests[i]
            if request.prompt_logprobs is not None and (here[i] or flight.step.sampling_mask[i]):
                request.prompt_logprobs += _positions(rows)


def _asked(
    count: int, drawn: NDArray[np.int64] | None, logprobs: dict[int, LogprobRows]
) -> dict[int, list[TokenLogprob]]:
    """Log-probabilities by place among the ``count`` that drew, who are at ``drawn`` in the step (None: all are)."""
    indices = range(count) if drawn is None else drawn.tolist()
    return {place: _positions(logprobs[index]) for place, index in enumerate(indices) if index in logprobs}


def _positions(rows: LogprobRows) -> list[TokenLogprob]:
    columns = zip(rows.token_ids.tolist(), rows.logprobs.tolist(), rows.ranks.tolist(), strict=True)
    return [TokenLogprob(ids, values, rank) for ids, values, rank in columns]
