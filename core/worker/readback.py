"""A step's results on their way from the device to the host."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quire.core.messages import LogprobRows, ModelRunnerOutput, SchedulerOutput
from quire.core.worker.token_drawer import Drawn

__all__ = ["Readback"]

_Rows = dict[int, tuple[Tensor, Tensor, Tensor]]


class Readback:
    """Copies start at construction, behind the step's kernels on its stream; ``result`` waits for them alone.

    On a GPU the copies land in pinned memory and an event marks them; later steps are queued behind without waiting.
    """

    def __init__(self, step: SchedulerOutput, drawn: Drawn | None, prompt: _Rows, device: torch.device) -> None:
        self._step = step
        self._quarantined = drawn.quarantined if drawn else []
        self._tokens = _home(drawn.tokens) if drawn else None
        self._logprobs = {i: _home_rows(rows) for i, rows in drawn.logprobs.items()} if drawn else {}
        self._prompt = {i: _home_rows(rows) for i, rows in prompt.items()}
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record()

    def done(self) -> bool:
        """Whether ``result`` would return at once."""
        return self._event is None or self._event.query()

    def result(self) -> ModelRunnerOutput:
        """The step's tokens, once they are here."""
        if self._event is not None:
            self._event.synchronize()
        step = self._step
        tokens = np.zeros((len(step.rows), 1), dtype=np.int32)
        if self._tokens is not None:
            tokens[step.samples, 0] = self._tokens.numpy()
        return ModelRunnerOutput(
            step=step.step,
            tokens=tokens,
            num_sampled=step.samples.astype(np.int32),
            logprobs={i: _as_rows(rows) for i, rows in self._logprobs.items()},
            prompt_logprobs={i: _as_rows(rows) for i, rows in self._prompt.items()},
            quarantined=self._quarantined,
        )


def _home(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _home_rows(rows: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    ids, values, ranks = rows
    return _home(ids), _home(values), _home(ranks)


def _as_rows(rows: tuple[Tensor, Tensor, Tensor]) -> LogprobRows:
    ids, values, ranks = rows
    return LogprobRows(ids.numpy(), values.numpy(), ranks.numpy())
