"""Sampler: from logits to tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Sampler", "SamplingBatch", "SamplingTable"]


@dataclass(slots=True)
class SamplingBatch:
    """Sampling parameters by row of the logits; device tensors unless said.

    Min-p, top-k and top-p forbid tokens in this order, each by the probabilities of those that are left.
    The booleans are known on the host: true when any row needs the feature, so that a sampler can skip it.
    """

    temperature: Tensor  # (n,) float32, 0 is greedy
    top_k: Tensor  # (n,) int32, 0 is off
    top_p: Tensor  # (n,) float32
    min_p: Tensor  # (n,) float32
    seed: Tensor  # (n,) int64
    position: Tensor  # (n,) int64: index in the sequence of the token to sample
    any_random: bool
    any_top_k: bool
    any_top_p: bool
    any_min_p: bool

    @classmethod
    def from_table(cls, table: SamplingTable, rows: Tensor, position: Tensor, any_random: bool) -> SamplingBatch:
        """For logits of the ``rows`` (n,) int64 of ``table``, of which the host knows nothing but whether any has a
        temperature; where none has, the parameters are zeros that no sampler reads."""
        if not any_random:
            zeros = torch.zeros(2 * len(rows), device=rows.device)
            none, ints, longs = zeros[: len(rows)], zeros.view(torch.int32)[: len(rows)], zeros.view(torch.int64)
            return cls(none, ints, none, none, longs, position, False, False, False, False)
        columns = (table.temperature[rows], table.top_k[rows], table.top_p[rows], table.min_p[rows], table.seed[rows])
        return cls(*columns, position, any_random, any_random, any_random, any_random)


@dataclass(frozen=True, slots=True)
class SamplingTable:
    """Columns of the request table on the device, one entry a row; the last row stands for padding."""

    token_ids: Tensor  # (rows, length) int32
    num_tokens: Tensor  # (rows,) int32: also the index in the sequence of the token to sample
    temperature: Tensor  # (rows,) float32, 0 is greedy
    top_k: Tensor  # (rows,) int32, 0 is off
    top_p: Tensor  # (rows,) float32
    min_p: Tensor  # (rows,) float32
    seed: Tensor  # (rows,) int64


class Sampler(ABC):
    """Samples ``argmax(logits / temperature + Gumbel(seed, position))`` over the allowed tokens: the Gumbel-max trick.

    The noise depends on (seed, position, token) alone, so a request samples the same tokens whatever runs beside it,
    and a draft is verified by sampling at its position.

    ``sample`` is all that a sampler needs. One that can also ``sample_from_table`` is captured in CUDA graphs, so that
    a step with random requests is two replays; others run eagerly between the model and the next step.
    """

    def __init__(self, vocab_size: int, device: torch.device, options: Any = None) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self.options = options
        """An instance of the class's ``Options`` dataclass, None without one."""

    @abstractmethod
    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """``logits`` (n, vocab) float32, penalties and processors applied, may be overwritten. Returns (n,) int32."""

    def prepare_graph_sampling(self, max_rows: int) -> bool:
        """Allocate what ``sample_from_table`` needs for ``max_rows`` rows of logits and say whether the engine may call
        it. Called once.

        If it may, ``sample`` too is captured, to verify drafts: it then takes logits of any dtype and leaves them
        unchanged."""
        return False

    def sample_from_table(
        self, logits: Tensor, rows: Tensor, table: SamplingTable, tokens: Tensor, *, greedy: bool
    ) -> None:
        """Write the sampled token of each row into ``tokens`` (n,) int32 and append it to the row in ``table``.

        ``logits`` (n, vocab) in the model's dtype, not to be changed; ``rows`` (n,) int64 on the device. The padding
        row may come many times, gets no token and never grows. ``greedy``: no row has a temperature. Must be fit for
        capture in a CUDA graph: no synchronization, and the same launches whatever the parameters on the device are.
        """
        raise NotImplementedError
