"""From logits to tokens: log-probabilities, penalties, logits processors, sampler."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.core.contracts.logits_processor import LogitsBatch, LogitsProcessor
from quire.core.contracts.sampler import Sampler, SamplingBatch
from quire.core.messages import NewRequest, SchedulerOutput
from quire.core.ops.pinned import copy_to_device
from quire.core.sample.logprobs import gather_logprobs
from quire.core.sample.penalties import apply_penalties
from quire.core.sample.verify import DraftVerifier, verify_drafts
from quire.core.worker.input_builder import LogitsIndices, StepInputs
from quire.core.worker.request_table import RequestTable

__all__ = ["SampledLogprobs", "SampledTokens", "SamplingRunner"]

_log = logging.getLogger("quire.worker")


@dataclass(slots=True)
class SampledLogprobs:
    """Log-probabilities of those tokens of a step for which somebody asked."""

    request_indices: NDArray[np.int64]
    """Into the step; as often as the request has lines."""
    num_columns: NDArray[np.int32]
    """Columns that each asked for: 1 + k."""
    tensors: tuple[Tensor, Tensor, Tensor]
    """As ``gather_logprobs`` gives them, for the largest k."""


@dataclass(slots=True)
class SampledTokens:
    """Device tensors of a step's draw."""

    token_ids: Tensor  # (num_drawing,) int32, or (num_drawing, 2 + width) as ``verify`` returns them
    logprobs: SampledLogprobs | None = None
    quarantined: list[str] = field(default_factory=list)
    ran_draft_backfill: bool = False
    """Behind the draw a proposer made up for what it had passed over."""


@dataclass(slots=True)
class _ActiveProcessor:
    name: str
    processor: LogitsProcessor
    rows: set[int] = field(default_factory=set)


class SamplingRunner:
    """Knows, on the host and by row, what each request wants, so that a step pays only for what somebody asked."""

    def __init__(
        self,
        sampler: Sampler,
        processors: Sequence[tuple[str, LogitsProcessor]],
        table: RequestTable,
        max_logits_rows: int = 0,
        draft_verifier: DraftVerifier = verify_drafts,
    ) -> None:
        self.table = table
        self.draft_verifier = draft_verifier
        self._sampler = sampler
        self.device_sampler = sampler if sampler.prepare_graph_sampling(max_logits_rows or table.num_rows) else None
        """The sampler, where it can draw from the table by itself."""
        self._processors = [_ActiveProcessor(name, processor) for name, processor in processors]
        num_rows = table.num_rows
        self._is_random = np.zeros(num_rows, dtype=bool)
        self._has_top_k = np.zeros(num_rows, dtype=bool)
        self._has_top_p = np.zeros(num_rows, dtype=bool)
        self._has_min_p = np.zeros(num_rows, dtype=bool)
        self._has_penalties = np.zeros(num_rows, dtype=bool)
        self._num_logprobs = np.full(num_rows, -1, dtype=np.int32)
        self._quarantined: list[str] = []

    def add_row(self, request: NewRequest) -> None:
        """A request enters its row."""
        params, row = request.params, request.row
        self._is_random[row] = not params.greedy
        self._has_top_k[row] = params.top_k > 0 and not params.greedy
        self._has_top_p[row] = params.top_p < 1 and not params.greedy
        self._has_min_p[row] = params.min_p > 0 and not params.greedy
        neutral = (1.0, 0.0, 0.0)
        penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        self._has_penalties[row] = penalties != neutral
        self._num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        for active in list(self._processors):
            active.rows.discard(row)
            if active.processor.argmax_invariant and params.greedy:
                continue
            try:
                if active.processor.add_row(request):
                    active.rows.add(row)
            except Exception as error:
                self._quarantine(active, error)

    def remove_row(self, row: int) -> None:
        """The row's request left."""
        for active in list(self._processors):
            if row in active.rows:
                active.rows.discard(row)
                try:
                    active.processor.remove_row(row)
                except Exception as error:
                    self._quarantine(active, error)

    def graph_variant(self, rows: NDArray[np.int32]) -> Literal["greedy", "random"] | None:
        """What these rows want of a captured sampler; None where they want more than one can do."""
        if (self._num_logprobs[rows] >= 0).any() or not self._leaves_logits_unchanged(rows):
            return None
        if not self._is_random[rows].any():
            return "greedy"
        return None if self.device_sampler is None else "random"

    def all_greedy(self, rows: NDArray[np.int32]) -> bool:
        """Whether none of these rows has a temperature."""
        return not self._is_random[rows].any()

    def _leaves_logits_unchanged(self, rows: NDArray[np.int32]) -> bool:
        """Whether nothing changes the logits of these rows."""
        if self._has_penalties[rows].any():
            return False
        return all(active.rows.isdisjoint(rows.tolist()) for active in self._processors if active.rows)

    def sample_tokens(
        self, logits: Tensor, step: SchedulerOutput, inputs: StepInputs, lines: LogitsIndices
    ) -> SampledTokens:
        """``logits`` (num_lines, vocab) in the model's dtype. Feeds the tokens, of drafts those accepted, back into the
        table."""
        host_rows, spans, table = step.rows[lines.request_indices], inputs.draft_spans, self.table
        from_table = self.device_sampler is not None and spans.max_len == 1 and self._leaves_logits_unchanged(host_rows)
        if from_table and self.device_sampler is not None:
            tokens = torch.zeros(len(logits), dtype=torch.int32, device=logits.device)  # what the warm-up samples
            self.device_sampler.sample_from_table(
                logits, inputs.logits_table_rows, table.sampling, tokens, greedy=self.all_greedy(host_rows)
            )
        else:
            tokens = self._sample_changed_logits(logits, inputs, host_rows, lines.max_sample_positions)
        sampled = SampledTokens(tokens, quarantined=self._quarantined)
        self._quarantined = []
        sampled.logprobs = self._gather_logprobs(logits, tokens, host_rows, lines)
        if spans.max_len > 1:
            sampled.token_ids = self.draft_verifier(
                tokens, spans, table.sampling, table.num_computed_tokens, table.num_drafts
            )
        elif not from_table:
            table.append_tokens(spans.rows, tokens)
        return sampled

    def _gather_logprobs(
        self, logits: Tensor, tokens: Tensor, host_rows: NDArray[np.int32], lines: LogitsIndices
    ) -> SampledLogprobs | None:
        num_logprobs = self._num_logprobs[host_rows]
        requested = np.flatnonzero(num_logprobs >= 0)
        if not len(requested):
            return None
        if len(requested) < len(num_logprobs):
            logits_rows = copy_to_device(requested, torch.int64, logits.device)
            logits, tokens = logits[logits_rows], tokens[logits_rows]
        tensors = gather_logprobs(logits, tokens, int(num_logprobs.max()))
        return SampledLogprobs(lines.request_indices[requested], num_logprobs[requested] + 1, tensors)

    def _sample_changed_logits(
        self, raw: Tensor, inputs: StepInputs, host_rows: NDArray[np.int32], positions: NDArray[np.int64]
    ) -> Tensor:
        """By ``Sampler.sample``, after penalties and processors."""
        rows, lens = inputs.logits_table_rows, inputs.logits_positions
        logits = raw.to(torch.float32, copy=True)
        self._apply_penalties(logits, rows, lens, host_rows, int(positions.max()))
        self._apply_processors(logits, lens, host_rows, positions)
        return self._sampler.sample(logits, self._make_sampling_batch(rows, lens, host_rows))

    def _make_sampling_batch(self, rows: Tensor, lens: Tensor, host_rows: NDArray[np.int32]) -> SamplingBatch:
        table = self.table
        return SamplingBatch(
            temperature=table.temperature[rows],
            top_k=table.top_k[rows],
            top_p=table.top_p[rows],
            min_p=table.min_p[rows],
            seed=table.seed[rows],
            position=lens.long(),
            any_random=bool(self._is_random[host_rows].any()),
            any_top_k=bool(self._has_top_k[host_rows].any()),
            any_top_p=bool(self._has_top_p[host_rows].any()),
            any_min_p=bool(self._has_min_p[host_rows].any()),
        )

    def _apply_penalties(
        self, logits: Tensor, rows: Tensor, lens: Tensor, host_rows: NDArray[np.int32], max_num_tokens: int
    ) -> None:
        logits_rows = np.flatnonzero(self._has_penalties[host_rows])
        if not len(logits_rows):
            return
        t = self.table
        columns = (t.token_ids, t.prompt_len, t.repetition_penalty, t.frequency_penalty, t.presence_penalty)
        apply_penalties(
            logits, copy_to_device(logits_rows, torch.int64, logits.device), rows, lens, max_num_tokens, *columns
        )

    def _apply_processors(
        self, logits: Tensor, lens: Tensor, host_rows: NDArray[np.int32], positions: NDArray[np.int64]
    ) -> None:
        if not any(active.rows for active in self._processors):
            return
        rows = host_rows.tolist()
        batch = LogitsBatch(rows, positions.tolist(), self.table.token_ids, lens)
        for active in list(self._processors):
            if active.rows.isdisjoint(rows):
                continue
            before = logits.clone()
            try:
                active.processor.apply(logits, batch)
            except Exception as error:
                logits.copy_(before)
                self._quarantine(active, error)

    def _quarantine(self, active: _ActiveProcessor, error: Exception) -> None:
        reason = f"logits_processor/{active.name}: {type(error).__name__}: {error}"
        _log.error("switched off %s", reason, exc_info=error)
        self._processors.remove(active)
        self._quarantined.append(reason)
