"""Logits processor: changes logits between the model and the sampler."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from quire.core.messages import NewRequest
from quire.core.plugin.arguments import parse_arguments
from quire.core.sampling_params import SamplingParams

__all__ = ["LogitsBatch", "LogitsProcessor"]


@dataclass(slots=True)
class LogitsBatch:
    """Which request each row of the logits belongs to. A row of the *table* is where a request stays while it runs."""

    rows: list[int]
    """(n,) row of the request table for each row of the logits, on the host. A request that verifies drafts has several
    rows of logits, one after the other: each follows the tokens before it, the earlier drafts included."""
    max_positions: list[int]
    """(n,) upper bounds, on the host, of the position of the token to be sampled (exact without drafts)."""
    token_ids: Tensor
    """(rows, any) int32 on the device: every row's tokens so far, the last sampled one included, then its drafts."""
    num_tokens: Tensor
    """(n,) int32 on the device, for each row of the logits: how many of them come before the token to be sampled, which
    is also its position."""


class LogitsProcessor(ABC):
    """Keeps state per row. Called between two graphs, so it may run any tensor code, but never reads the device, nor
    waits for it: ``quire.sdk.ops.copy_to_device`` brings values there, and ``index_fill_`` writes a number
    where an assignment through an index (``x[rows] = 0``) waits for the step in flight.

    What it does to a row of the logits depends on the request and on the ``num_tokens`` tokens before it alone: those
    of drafts may be rejected, and then never count.

    After one that raises in ``add_row`` or ``apply``, the requests for which it has something to do end with an error
    that names it: a constraint is never lifted in silence. One that may be left out says so in ``on_failure``. A call
    that takes as long as a step may (``--step-timeout``) is interrupted, and has failed; ``apply`` is then called no
    more, since all requests wait for it, and requests for which ``add_row`` returns True end.
    """

    Arguments: ClassVar[type[Any] | None] = None
    """A frozen dataclass of what a request may say to it in ``extra_args`` (``vllm_xargs`` over HTTP), each field with
    a default. A name that no plugin declares, and a value of another type, is refused before the request begins."""
    on_failure: Literal["fail", "skip"] = "fail"
    """What becomes of a request if the processor fails: it ends with an error; or, with ``skip``, it goes on, and the
    processor is quarantined, which is right for one that only biases."""
    argmax_invariant: bool = False
    """True if it can never change which token is the largest; then it is skipped for greedy requests."""

    def __init__(self, vocab_size: int, device: torch.device, options: Any = None) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self.options = options
        """An instance of the class's ``Options`` dataclass, None without one."""

    @classmethod
    def example_params(cls) -> SamplingParams | None:
        """A request that it works on, for the conformance checks; its vocabulary has 32 tokens. None: one with
        ``min_tokens``, ``logit_bias``, ``allowed_token_ids`` and ``bad_words``."""
        return None

    @classmethod
    def validate_params(cls, params: SamplingParams, vocab_size: int) -> None:
        """Raise ``InvalidRequestError`` for parameters this processor cannot honour. Runs in the API process."""

    @classmethod
    def read_arguments(cls, params: SamplingParams) -> Any:
        """What a request says: an instance of ``Arguments``, with defaults for what it leaves out."""
        return parse_arguments(cls, params.extra_args)

    @abstractmethod
    def add_row(self, request: NewRequest) -> bool:
        """A request enters row ``request.row``. Returns whether this processor has anything to do for it."""

    @abstractmethod
    def remove_row(self, row: int) -> None:
        """The row's request left (finished, aborted or preempted). Only for rows whose ``add_row`` returned True."""

    @abstractmethod
    def apply(self, logits: Tensor, batch: LogitsBatch) -> None:
        """Change ``logits`` (n, vocab) float32 in place. Called only when ``add_row`` returned True for the request of
        some row."""
