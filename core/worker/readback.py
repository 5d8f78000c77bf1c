"""A step's results on their way from the device to the host."""

from __future__ import annotations

import time

import numpy as np
import torch
from numpy.typing import NDArray

from quire.core.messages import LogprobRows, ModelRunnerOutput, SchedulerOutput
from quire.core.ops.pinned import copy_to_host
from quire.core.sample.logprobs import LogprobsTensors
from quire.core.worker.sampling import SampledTokens

__all__ = ["Readback", "StepTimer"]


class StepTimer:
    """Times a step where it runs: between two events on a GPU, by the host's clock on a CPU. Starts at construction."""

    def __init__(self, device: torch.device) -> None:
        self._start_event: torch.cuda.Event | None = None
        self._end_event: torch.cuda.Event | None = None
        self._start_ns = self._end_ns = 0
        if device.type == "cuda":
            self._start_event = torch.cuda.Event(enable_timing=True)
            self._end_event = torch.cuda.Event(enable_timing=True)
            self._start_event.record()
        else:
            self._start_ns = time.perf_counter_ns()

    def record_end(self) -> None:
        """Everything the step does is queued (or, on a CPU, done)."""
        if self._end_event is not None:
            self._end_event.record()
        else:
            self._end_ns = time.perf_counter_ns()

    def is_done(self) -> bool:
        """Whether the step has run. Does not wait."""
        return self._end_event is None or self._end_event.query()

    def wait_until_done(self) -> None:
        """Wait until the step has run. Steps queued behind it are not waited for."""
        if self._end_event is not None:
            self._end_event.synchronize()

    def device_us(self) -> float:
        """How long the step took, microseconds. Only after ``wait_until_done``."""
        if self._start_event is not None and self._end_event is not None:
            return self._start_event.elapsed_time(self._end_event) * 1e3
        return (self._end_ns - self._start_ns) / 1e3


class Readback:
    """A step's results on their way to the host: a ``StepFuture``.

    Copies are queued at construction, behind the step's kernels on the same stream, into pinned memory: torch keeps a
    cache of it, from which a buffer is taken for each copy and to which it returns with the tensor, so that nothing is
    allocated under traffic (see ``reserve_pinned_memory``). The end event is queued behind the copies, and ``result``
    waits for that event alone: never for the device, which would wait for the steps launched since.
    """

    def __init__(
        self,
        step: SchedulerOutput,
        sampled: SampledTokens | None,
        prompt_logprobs: dict[int, LogprobsTensors],
        timer: StepTimer,
    ) -> None:
        self._step = step
        self._quarantined = sampled.quarantined if sampled else []
        self._ran_draft_backfill = sampled is not None and sampled.ran_draft_backfill
        self._sampled_buffer = copy_to_host(sampled.token_ids) if sampled else None
        drafts = sampled.draft_token_ids if sampled else None
        self._draft_buffer = None if drafts is None else copy_to_host(drafts)
        self._requested_logprobs = sampled.logprobs if sampled else None
        self._logprob_buffers = _copy_logprobs(self._requested_logprobs.tensors) if self._requested_logprobs else None
        self._prompt_logprob_buffers = {i: _copy_logprobs(tensors) for i, tensors in prompt_logprobs.items()}
        self.num_compiled_kernels = 0
        """Kernels that had to be compiled to launch the step."""
        self._timer = timer
        timer.record_end()

    def done(self) -> bool:
        """Whether ``result`` would return at once."""
        return self._timer.is_done()

    def result(self) -> ModelRunnerOutput:
        """The step's tokens, once they are on the host."""
        self._timer.wait_until_done()
        step = self._step
        num_reqs = len(step.rows)
        # (num_sampling_reqs,) tokens; or (num_sampling_reqs, 2 + max_len) where drafts were verified, see below
        sampled = np.empty(0, np.int32) if self._sampled_buffer is None else self._sampled_buffer.numpy()
        token_ids = np.zeros((num_reqs, 1 if sampled.ndim == 1 else sampled.shape[1] - 2), dtype=np.int32)
        num_sampled, num_verified_drafts = step.sampling_mask.astype(np.int32), None
        if sampled.ndim == 2:  # as ``verify_drafts`` packs them: tokens appended, drafts verified, the tokens
            num_verified_drafts = np.zeros(num_reqs, np.int32)
            num_sampled[step.sampling_mask] = sampled[:, 0]
            num_verified_drafts[step.sampling_mask] = sampled[:, 1]
            token_ids[step.sampling_mask] = sampled[:, 2:]
        elif self._sampled_buffer is not None:
            token_ids[step.sampling_mask, 0] = sampled
        row_faults = self._take_row_faults(token_ids, num_sampled)
        draft_token_ids = None
        if self._draft_buffer is not None:
            draft_token_ids = np.full((num_reqs, self._draft_buffer.shape[1]), -1, np.int32)
            draft_token_ids[step.sampling_mask] = self._draft_buffer.numpy()
        return ModelRunnerOutput(
            step=step.step,
            sampled_token_ids=token_ids,
            num_sampled_tokens=num_sampled,
            num_verified_drafts=num_verified_drafts,
            logprobs=self._split_logprobs(),
            prompt_logprobs={i: _to_logprob_rows(buffers) for i, buffers in self._prompt_logprob_buffers.items()},
            device_us=self._timer.device_us(),
            quarantined=self._quarantined,
            num_compiled_kernels=self.num_compiled_kernels,
            draft_token_ids=draft_token_ids,
            ran_draft_backfill=self._ran_draft_backfill,
            row_faults=row_faults,
        )

    def _take_row_faults(self, token_ids: NDArray[np.int32], num_sampled: NDArray[np.int32]) -> dict[int, int]:
        """The faults that stand in the place of tokens, by index into the step; they are overwritten. Only the last
        token of a request can be one: no draft equals a fault, so what comes before it was accepted."""
        if not token_ids.size or token_ids.min() >= 0:
            return {}
        last = token_ids[np.arange(len(token_ids)), np.maximum(num_sampled - 1, 0)]
        faults = {int(i): int(last[i]) for i in ((last < 0) & (num_sampled > 0)).nonzero()[0]}
        np.maximum(token_ids, 0, out=token_ids)
        return faults

    def _split_logprobs(self) -> dict[int, LogprobRows]:
        """By index into the step. All were gathered with the largest k: each request gets the columns it asked for."""
        if self._requested_logprobs is None or self._logprob_buffers is None:
            return {}
        token_ids, logprobs, ranks = (buffer.numpy() for buffer in self._logprob_buffers)
        request_indices = self._requested_logprobs.request_indices
        num_columns = self._requested_logprobs.num_columns
        starts = np.flatnonzero(np.diff(request_indices, prepend=-1)).tolist()  # a request's rows are neighbours
        return {
            int(request_indices[start]): LogprobRows(
                token_ids[start:end, : num_columns[start]],
                logprobs[start:end, : num_columns[start]],
                ranks[start:end],
            )
            for start, end in zip(starts, [*starts[1:], len(request_indices)], strict=True)
        }


def _copy_logprobs(tensors: LogprobsTensors) -> LogprobsTensors:
    return LogprobsTensors(*(copy_to_host(tensor) for tensor in tensors))


def _to_logprob_rows(buffers: LogprobsTensors) -> LogprobRows:
    return LogprobRows(*(buffer.numpy() for buffer in buffers))
