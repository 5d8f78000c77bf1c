"""A step's results on their way from the device to the host."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from quire.core.messages import LogprobRows, ModelRunnerOutput, SchedulerOutput
from quire.core.ops.pinned import copy_to_host
from quire.core.worker.sampling import SampledTokens

__all__ = ["Readback", "StepTimer"]

_Rows = dict[int, tuple[Tensor, Tensor, Tensor]]


class StepTimer:
    """Times a step where it runs: between two events on a GPU, by the host's clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self._start = self._end = 0
        if device.type == "cuda":
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events[0].record()
        else:
            self._start = time.perf_counter_ns()

    def record_end(self) -> None:
        """Everything the step does is queued (or, on a CPU, done)."""
        if self._events is not None:
            self._events[1].record()
        else:
            self._end = time.perf_counter_ns()

    def is_done(self) -> bool:
        """Whether the step has run."""
        return self._events is None or self._events[1].query()

    def wait_until_done(self) -> None:
        """Until it has."""
        if self._events is not None:
            self._events[1].synchronize()

    def device_us(self) -> float:
        """How long it took. Only after ``wait``."""
        if self._events is not None:
            return self._events[0].elapsed_time(self._events[1]) * 1e3
        return (self._end - self._start) / 1e3


class Readback:
    """Copies start at construction, behind the step's kernels on its stream; ``result`` waits for them alone.

    On a GPU the copies land in pinned memory and an event marks them; later steps are queued behind without waiting.
    """

    def __init__(self, step: SchedulerOutput, sampled: SampledTokens | None, prompt: _Rows, clock: StepTimer) -> None:
        self._step = step
        self._quarantined = sampled.quarantined if sampled else []
        self._ran_draft_backfill = sampled is not None and sampled.ran_draft_backfill
        self._tokens = copy_to_host(sampled.token_ids) if sampled else None
        self._requested_logprobs = sampled.logprobs if sampled else None
        self._logprobs = _download_columns(self._requested_logprobs.tensors) if self._requested_logprobs else None
        self._prompt = {i: _download_columns(rows) for i, rows in prompt.items()}
        self.num_compiled_kernels = 0
        """Kernels that had to be compiled to launch the step."""
        self._timer = clock
        clock.record_end()

    def done(self) -> bool:
        """Whether ``result`` would return at once."""
        return self._timer.is_done()

    def result(self) -> ModelRunnerOutput:
        """The step's tokens, once they are here."""
        self._timer.wait_until_done()
        step = self._step
        num_reqs = len(step.rows)
        home = np.empty(0, np.int32) if self._tokens is None else self._tokens.numpy()
        tokens = np.zeros((num_reqs, 1 if home.ndim == 1 else home.shape[1] - 2), dtype=np.int32)
        num_sampled, num_drafted = step.sampling_mask.astype(np.int32), None
        if home.ndim == 2:  # as ``verify`` packs them
            num_drafted = np.zeros(num_reqs, np.int32)
            num_sampled[step.sampling_mask], num_drafted[step.sampling_mask] = home[:, 0], home[:, 1]
            tokens[step.sampling_mask] = home[:, 2:]
        elif self._tokens is not None:
            tokens[step.sampling_mask, 0] = home
        return ModelRunnerOutput(
            step=step.step,
            sampled_token_ids=tokens,
            num_sampled_tokens=num_sampled,
            num_verified_drafts=num_drafted,
            logprobs=self._split_logprobs(),
            prompt_logprobs={i: _to_logprob_rows(rows) for i, rows in self._prompt.items()},
            device_us=self._timer.device_us(),
            quarantined=self._quarantined,
            num_compiled_kernels=self.num_compiled_kernels,
            ran_draft_backfill=self._ran_draft_backfill,
        )

    def _split_logprobs(self) -> dict[int, LogprobRows]:
        if self._requested_logprobs is None or self._logprobs is None:
            return {}
        ids, values, ranks = (column.numpy() for column in self._logprobs)
        index, widths = self._requested_logprobs.request_indices, self._requested_logprobs.num_columns
        starts = np.flatnonzero(np.diff(index, prepend=-1)).tolist()  # a request's lines are neighbours
        return {
            int(index[start]): LogprobRows(
                ids[start:end, : widths[start]], values[start:end, : widths[start]], ranks[start:end]
            )
            for start, end in zip(starts, [*starts[1:], len(index)], strict=True)
        }


def _download_columns(rows: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    ids, values, ranks = rows
    return copy_to_host(ids), copy_to_host(values), copy_to_host(ranks)


def _to_logprob_rows(rows: tuple[Tensor, Tensor, Tensor]) -> LogprobRows:
    ids, values, ranks = rows
    return LogprobRows(ids.numpy(), values.numpy(), ranks.numpy())
