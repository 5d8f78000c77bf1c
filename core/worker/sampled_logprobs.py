"""Log-probabilities of sampled tokens, for the requests that want them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.core.ops.pinned import copy_to_device
from quire.core.sample.logprobs import LogprobsTensors, gather_logprobs
from quire.core.sampling_params import SamplingParams
from quire.core.worker.input_builder import LogitsIndices

__all__ = ["RequestedLogprobs", "SampledLogprobs"]


@dataclass(slots=True)
class SampledLogprobs:
    """Log-probabilities of a step's tokens, of those requests alone that want any."""

    request_indices: NDArray[np.int64]
    """(m,) index into the step's requests; a request that verifies drafts has one entry for each of its logits rows."""
    num_columns: NDArray[np.int32]
    """(m,) columns of ``tensors`` that the request wants: 1 + k."""
    tensors: LogprobsTensors
    """m rows, for the largest k."""


class RequestedLogprobs:
    """What each request wants, on the host, by row of the request table."""

    def __init__(self, num_rows: int) -> None:
        self._num_logprobs = np.full(num_rows, -1, dtype=np.int32)  # -1: none, 0: the sampled token's alone
        self._logprob_token_ids: dict[int, list[int]] = {}  # by row, where a request names them in place of the best

    def set_row(self, row: int, params: SamplingParams) -> None:
        """A request enters ``row``."""
        self._num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self._logprob_token_ids.pop(row, None)
        if params.logprob_token_ids:
            self._logprob_token_ids[row] = params.logprob_token_ids
            self._num_logprobs[row] = len(params.logprob_token_ids)

    def is_any_requested(self, rows: NDArray[np.int32]) -> bool:
        """Whether one of ``rows`` wants any."""
        return bool((self._num_logprobs[rows] >= 0).any())

    def gather(
        self, logits: Tensor, tokens: Tensor, host_rows: NDArray[np.int32], logits_indices: LogitsIndices
    ) -> SampledLogprobs | None:
        """Those of ``tokens`` (num_logits_rows,) that were sampled from ``logits`` (num_logits_rows, vocab) for
        ``host_rows``; None where none are wanted."""
        num_logprobs = self._num_logprobs[host_rows]
        requested = np.flatnonzero(num_logprobs >= 0)
        if not len(requested):
            return None
        if len(requested) < len(num_logprobs):  # the k best of a row are a pass over it: only where they are wanted
            logits_rows = copy_to_device(requested, torch.int64, logits.device)
            logits, tokens = logits[logits_rows], tokens[logits_rows]
        tokens = tokens.clamp(min=0)  # in the place of faults
        num_logprobs = num_logprobs[requested]
        num_best, named = int(num_logprobs.max()), None
        if self._logprob_token_ids:
            num_best, named = self._place_named_tokens(host_rows[requested], num_logprobs, logits.device)
        tensors = gather_logprobs(logits, tokens, num_best, named)
        return SampledLogprobs(logits_indices.request_indices[requested], num_logprobs + 1, tensors)

    def _place_named_tokens(
        self, host_rows: NDArray[np.int32], num_logprobs: NDArray[np.int32], device: torch.device
    ) -> tuple[int, Tensor]:
        """How many of the best tokens are wanted, and ``logprob_token_ids`` for ``gather_logprobs``."""
        named = np.full((len(host_rows), num_logprobs.max()), -1, dtype=np.int64)
        num_best = 0
        for i, row in enumerate(host_rows.tolist()):
            token_ids = self._logprob_token_ids.get(row)
            if token_ids is None:
                num_best = max(num_best, int(num_logprobs[i]))
            else:
                named[i, : len(token_ids)] = token_ids
        return num_best, copy_to_device(named, torch.int64, device)
