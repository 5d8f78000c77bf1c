"""What is captured of a decode step, and how its padded tokens are found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.core.messages import SchedulerOutput
from quire.core.worker.cuda_graphs.capture import CapturedGraph
from quire.core.worker.input_builder import StepInputs

__all__ = ["CapturedStep", "DecodeShape", "StepLogits"]


class DecodeShape(NamedTuple):
    """A captured shape."""

    query_len: int
    """Tokens of each request: 1, or 1 + the most drafts that it may verify."""
    num_reqs: int
    """Padding included."""

    def find_token_indices(self, step: SchedulerOutput) -> NDArray[np.int64] | None:
        """(num_tokens,) of a step's tokens among the padded ones, in order; None: they are the first."""
        num_drafts = step.num_draft_tokens
        if num_drafts is None or (num_drafts == self.query_len - 1).all():
            return None
        counts = num_drafts.astype(np.int64) + 1
        num_padding_before = np.arange(len(counts)) * self.query_len - (counts.cumsum() - counts)
        return np.arange(int(counts.sum())) + np.repeat(num_padding_before, counts)


@dataclass(slots=True)
class StepLogits:
    """What the model computed of a step, and from which inputs."""

    inputs: StepInputs
    logits: Tensor  # (num_logits_rows, vocab)


@dataclass(slots=True)
class CapturedStep:
    """The graphs of a shape."""

    shape: DecodeShape
    inputs: StepInputs
    output: Tensor
    """What the model's graphs write: (num_reqs * query_len, vocab) logits, which ``sampling_graphs`` read, or hidden
    states (num_reqs * query_len, hidden) of a stage that is not the last."""
    model_graph: torch.cuda.CUDAGraph
    adapter_graphs: dict[int, torch.cuda.CUDAGraph]
    """``model_graph`` of steps in which a request has an adapter, by the slots, of the first, that it reads."""
    sampling_graphs: dict[str, CapturedGraph[Tensor]]
    """By variant; none on a stage that is not the last."""
    draft_prefill_graph: torch.cuda.CUDAGraph | None
