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
from quire.core.sched.table import RunningTable

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
    ) -> None:
        self._table = table
        self._allocator = allocator
        self._finish = finish
        self._landed = landed
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
        self._store(flight, here, all_here)
        outputs = [] if all_here else self._land_away(flight, result, here)
        tokens, drawn = result.tokens[:, 0], None
        if not all_here or step.num_decodes != len(rows):
            drawn = (here & step.samples).nonzero()[0]
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
            output = EngineCoreOutput(ids[i], [drew[i]], logprobs=asked.get(i))
            request = table.request(int(rows[i]))
            table.next_event[rows[i]] = request.max_total_tokens
            self._look(request, output)
            outputs.append(output)
        for i in reversed(indices):
            del ids[i], drew[i]
        return EngineCoreOutputs(outputs, ids, drew)

    def _land_away(self, flight: Flight, result: ModelRunnerOutput, here: NDArray[np.bool_]) -> list[EngineCoreOutput]:
        """Tokens of requests preempted since: they count, though the request now waits."""
        outputs = []
        for i in (~here & flight.step.samples).nonzero()[0].tolist():
            request: Request = flight.requests[i]
            if request.status is RequestStatus.FINISHED:
                continue
            token = int(result.tokens[i, 0])
            request.num_in_flight -= 1
            request.token_ids.append(token)
            self.num_generated += 1
            output = EngineCoreOutput(request.request_id, [token])
            if i in result.logprobs:
                output.logprobs = _positions(result.logprobs[i])
            self._look(request, output)
            if output.finish_reason is None and request.num_in_flight == 0:
                self._landed(request)
            outputs.append(output)
        return outputs

    def _look(self, request: Request, output: EngineCoreOutput) -> None:
        """A token that is the first, perhaps the last: complete its output, and end the request if it is over."""
        token, length = request.token_ids[-1], request.num_output_tokens
        if length == 1:
            output.num_cached_tokens = request.num_cached_tokens
            output.queue_ns = max(request.first_grant_ns - request.arrival_ns, 0)
            output.prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, None
            self.num_prompt_tokens += request.prompt_len
        if token in request.stop_ids and length >= request.params.min_tokens:
            output.finish_reason = "stop"
            output.stop_reason = token if token in request.params.stop_token_ids else None
        elif request.num_tokens >= request.max_total_tokens:
            output.finish_reason = "length"
        if output.finish_reason is not None:
            self._finish(request, output.finish_reason, output.stop_reason)

    def _store(self, flight: Flight, here: NDArray[np.bool_], all_here: bool) -> None:
        """Note how far everybody has come, and make the blocks of prompts findable. Generated blocks follow in
        batches, and when the request leaves."""
        table, rows, reached = self._table, flight.step.rows, flight.reached
        if not all_here:
            rows, reached = rows[here], reached[here]
        table.landed[rows] = reached
        due = (reached >= table.next_store[rows]).nonzero()[0]
        if len(due):
            rows, reached = rows[due], reached[due]
            for request, num_tokens in zip(table.requests[rows].tolist(), reached.tolist(), strict=True):
                self._allocator.commit(request, num_tokens)
            stride = np.where(reached < table.prompt_len[rows], 1, _BATCH) * self._allocator.block_size
            table.next_store[rows] = reached // stride * stride + stride

    def _gather(self, flight: Flight, result: ModelRunnerOutput, here: NDArray[np.bool_]) -> None:
        """Keep log-probabilities of the prompt until its first token is out."""
        for i, rows in result.prompt_logprobs.items():
            request: Request = flight.requests[i]
            if request.prompt_logprobs is not None and (here[i] or flight.step.samples[i]):
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
