"""Sampling on the worker: from a step's logits to tokens, log-probabilities and accepted drafts.

The order is: log-probabilities of the raw logits, penalties, logits processors, masks of grammars, temperature, min-p,
top-k, top-p. A step takes the cheapest of three ways, by what its requests want:

1. a captured graph (``graph_variant``): nothing but masks changes the logits, and no log-probabilities are wanted;
2. ``Sampler.sample_from_table``, which reads the parameters from the request table and appends the tokens itself;
3. a float32 copy of the logits, penalties, processors, masks, and ``Sampler.sample``.

Where ranks share the vocabulary, logits are this rank's part of them. A ``VocabParallelSampler`` samples from those in
place of 2, and in graphs, where it can; the others gather whole logits first.

Nothing here waits for the device. Whether a step needs a feature is answered on the host, from what requests asked for
when they entered; tokens go to the request table on the device, where the next step finds them, and to the host later
(``readback.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.core.contracts.logits_processor import LogitsBatch, LogitsProcessor
from quire.core.contracts.sampler import Sampler, SamplingBatch
from quire.core.messages import NewRequest, SchedulerOutput, TokenMasks
from quire.core.ops.pinned import copy_to_device
from quire.core.plugin.quarantine import Quarantine, class_path
from quire.core.sample.checked_sampler import check_sampled_tokens
from quire.core.sample.inputs import PenaltyColumns
from quire.core.sample.penalties import apply_penalties
from quire.core.sample.row_faults import MASKED, NO_LOGITS
from quire.core.sample.verify import DraftVerifier, verify_drafts
from quire.core.sample.vocab_parallel import MAX_TOP_K, VocabParallelSampler
from quire.core.stats import QuarantinedPlugin
from quire.core.worker.input_builder import LogitsIndices, StepInputs
from quire.core.worker.logits_processors import LogitsProcessors
from quire.core.worker.request_table import RequestTable
from quire.core.worker.sampled_logprobs import RequestedLogprobs, SampledLogprobs
from quire.core.worker.token_mask_buffer import TokenMaskBuffer

__all__ = ["SampledTokens", "SamplingRunner", "SamplingVariant"]

SamplingVariant: TypeAlias = Literal["greedy", "random", "local_random", "local_filters"]
"""A captured sampling graph. Those that are ``local`` sample from one rank's part of the vocabulary, for rows without
filters and for rows with those of which the ranks can find the threshold; ``greedy`` does so too where it is shared."""


@dataclass(slots=True)
class SampledTokens:
    """What a step sampled; tensors on the device."""

    token_ids: Tensor
    """(num_sampling_reqs,) int32, or (num_sampling_reqs, 2 + max_len) as ``verify_drafts`` returns them. A negative
    one is a fault (``row_faults``)."""
    logprobs: SampledLogprobs | None = None
    quarantined: list[QuarantinedPlugin] = field(default_factory=list)
    """Samplers, logits processors and proposers that were quarantined since the last step."""
    draft_token_ids: Tensor | None = None  # (num_sampling_reqs, k) int32: drafts for the next step, -1 behind the last
    ran_draft_backfill: bool = False
    """Behind the sampling the proposer read tokens that it had passed over before."""


class SamplingRunner:
    """Samples a step's tokens. Keeps what each request wants on the host, by row, so that a step pays for no more."""

    def __init__(
        self,
        sampler: Sampler,
        processors: Sequence[tuple[str, LogitsProcessor]],
        table: RequestTable,
        max_logits_rows: int = 0,
        draft_verifier: DraftVerifier = verify_drafts,
        token_masks: TokenMaskBuffer | None = None,
        vocab_sampler: VocabParallelSampler | None = None,
    ) -> None:
        self.table = table
        self.token_masks = token_masks
        self.vocab_sampler = vocab_sampler
        """Where ranks share the vocabulary and the sampler's rule is known: logits are then this rank's part."""
        self.draft_verifier = draft_verifier
        self._sampler = sampler
        self._max_logits_rows = max_logits_rows or table.num_rows
        self.device_sampler = sampler if sampler.prepare_graph_sampling(self._max_logits_rows) else None
        """The sampler, where it can sample from the table by itself."""
        self._stale_graph_variants: set[str] = set()  # captured with a sampler that was replaced since
        self._quarantine: Quarantine | None = None  # of a sampler that another one can replace
        self._processors = LogitsProcessors(processors, self._note_quarantine)
        # Host copies of what the table has on the device: reading that would wait for the step in flight.
        num_rows = table.num_rows
        self._is_random = np.zeros(num_rows, dtype=bool)
        self._has_top_k = np.zeros(num_rows, dtype=bool)
        self._has_top_p = np.zeros(num_rows, dtype=bool)
        self._has_min_p = np.zeros(num_rows, dtype=bool)
        self._needs_whole_logits = np.zeros(num_rows, dtype=bool)  # by its filters, where ranks share the vocabulary
        self._has_penalties = np.zeros(num_rows, dtype=bool)
        self._logprobs = RequestedLogprobs(num_rows)
        self._penalty_columns = PenaltyColumns(
            table.token_ids,
            table.prompt_len,
            table.repetition_penalty,
            table.frequency_penalty,
            table.presence_penalty,
        )
        self._quarantined: list[QuarantinedPlugin] = []  # since the last step

    def guard_sampler(self, name: str, fallback: Sampler) -> None:
        """From now on a sampler that raises, or returns no tokens, is quarantined, and ``fallback`` takes over in the
        same step. Until this is called, what the sampler raises is raised."""
        self._quarantine = Quarantine(
            "sampler",
            name,
            partial(self._replace_sampler, fallback),
            replacement=class_path(fallback),
            not_faults=(torch.OutOfMemoryError,),  # the step is tried again in smaller ones
        )

    def add_row(self, request: NewRequest) -> None:
        """A request enters its row."""
        params, row = request.params, request.row
        # Filters never forbid the best token, so a greedy request needs none of them.
        self._is_random[row] = not params.greedy
        self._has_top_k[row] = params.top_k > 0 and not params.greedy
        self._has_top_p[row] = params.top_p < 1 and not params.greedy
        self._has_min_p[row] = params.min_p > 0 and not params.greedy
        without_bound = params.top_k > MAX_TOP_K or (params.top_p < 1 and params.top_k <= 0)
        self._needs_whole_logits[row] = without_bound and not params.greedy
        neutral = (1.0, 0.0, 0.0)
        penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        self._has_penalties[row] = penalties != neutral
        self._logprobs.set_row(row, params)
        self._processors.add_row(request)

    def remove_row(self, row: int) -> None:
        """The row's request left."""
        self._processors.remove_row(row)

    def graph_variant(self, rows: NDArray[np.int32], masked: bool = False) -> SamplingVariant | None:
        """The captured sampling graph that serves these rows; None where they want more than one can do."""
        if self._logprobs.is_any_requested(rows) or not self._leaves_logits_unchanged(rows):
            return None
        variant: SamplingVariant = "random" if self._is_random[rows].any() else "greedy"
        is_local = self.vocab_sampler is not None and not masked and not self._needs_whole_logits[rows].any()
        if is_local and variant == "random":
            filters = self._has_top_k[rows].any() or self._has_min_p[rows].any()
            return "local_filters" if filters else "local_random"
        if variant in self._stale_graph_variants or (variant == "random" and self.device_sampler is None):
            return None
        return variant

    def all_greedy(self, rows: NDArray[np.int32]) -> bool:
        """Whether none of these rows has a temperature."""
        return not self._is_random[rows].any()

    def sample_tokens(
        self,
        logits: Tensor,
        step: SchedulerOutput,
        inputs: StepInputs,
        logits_indices: LogitsIndices,
        masks: TokenMasks | None = None,
    ) -> SampledTokens:
        """Sample from ``logits`` (num_logits_rows, vocab) in the model's dtype, which are not changed; with a
        ``vocab_sampler`` from this rank's part of them.

        The tokens, of drafts those accepted, are appended to the request table. Verification (``max_len`` above 1)
        samples a token for each draft, and appends what it accepts itself.
        """
        host_rows, spans, table = step.rows[logits_indices.request_indices], inputs.draft_spans, self.table
        token_masks = None
        if masks is not None and self.token_masks is not None:
            token_masks = self.token_masks
            token_masks.upload_eager(masks, logits_indices, step.sampling_mask.nonzero()[0])
        from_table = (
            self.device_sampler is not None
            and spans.max_len == 1
            and token_masks is None
            and self._leaves_logits_unchanged(host_rows)
        )
        tokens: Tensor | None = None
        if self.vocab_sampler is not None:
            if self._can_sample_local(host_rows, token_masks):
                batch = self._make_sampling_batch(inputs.logits_table_rows, inputs.logits_positions, host_rows)
                tokens, from_table = self.vocab_sampler.sample(logits, batch), False
            else:
                logits = self.vocab_sampler.vocab.gather_logits(logits)
        if tokens is None and from_table and self.device_sampler is not None:
            tokens = self._sample_from_table(self.device_sampler, logits, inputs, self.all_greedy(host_rows))
            from_table = tokens is not None  # else the sampler has failed
        if tokens is None:
            tokens = self._sample_float32(logits, inputs, host_rows, logits_indices.max_sample_positions, token_masks)
        sampled = SampledTokens(tokens, quarantined=self._quarantined)
        self._quarantined = []
        sampled.logprobs = self._logprobs.gather(logits, tokens, host_rows, logits_indices)
        if spans.max_len > 1:
            sampled.token_ids = self.draft_verifier(
                tokens, spans, table.sampling, table.num_computed_tokens, table.num_drafts
            )
        elif not from_table:
            table.append_tokens(spans.rows, tokens)
        return sampled

    def _sample_from_table(self, sampler: Sampler, logits: Tensor, inputs: StepInputs, greedy: bool) -> Tensor | None:
        """By ``Sampler.sample_from_table``; None, and the table is as before, if the sampler fails and is replaced."""
        rows, table = inputs.logits_table_rows, self.table
        # The logits stay in bf16: kernels convert what they load, and a float32 copy of a row is never written.
        # Zeros, not empty: a warm-up compiles launches without making them, and what follows indexes with these.
        tokens = torch.zeros(len(logits), dtype=torch.int32, device=logits.device)
        launch = partial(sampler.sample_from_table, logits, rows, table.sampling, tokens, greedy=greedy)
        if (quarantine := self._quarantine) is None:
            launch()
            return tokens
        quarantine.call(launch)
        if quarantine.is_active:
            return tokens
        # It may have appended tokens to some rows already. A token's position is the number of tokens before it.
        table.num_tokens[rows] = inputs.logits_positions.to(table.num_tokens.dtype)
        return None

    def _can_sample_local(self, rows: NDArray[np.int32], token_masks: TokenMaskBuffer | None) -> bool:
        """Whether this rank's logits are enough: nothing changes them, filters have bounds, and no request wants to see
        probabilities."""
        if token_masks is not None or self._needs_whole_logits[rows].any() or self._logprobs.is_any_requested(rows):
            return False
        return self._leaves_logits_unchanged(rows)

    def _leaves_logits_unchanged(self, rows: NDArray[np.int32]) -> bool:
        """Whether no penalty and no processor works on these rows."""
        return not (self._has_penalties[rows].any() or self._processors.works_on_any(rows))

    def _sample_float32(
        self,
        raw_logits: Tensor,
        inputs: StepInputs,
        host_rows: NDArray[np.int32],
        max_positions: NDArray[np.int64],
        token_masks: TokenMaskBuffer | None,
    ) -> Tensor:
        """By ``Sampler.sample``, after penalties and processors. ``max_positions`` bound ``logits_positions``."""
        rows, positions = inputs.logits_table_rows, inputs.logits_positions
        # A copy also where the model computes in float32: penalties and processors change it in place, while the raw
        # logits are wanted for log-probabilities, and may belong to a graph.
        logits = raw_logits.to(torch.float32, copy=True)
        self._apply_penalties(logits, rows, positions, host_rows, int(max_positions.max()))
        faults = self._processors.apply(
            logits,
            lambda rows: LogitsBatch(rows, max_positions.tolist(), self.table.token_ids, positions),
            host_rows,
        )
        if token_masks is not None:
            token_masks.apply(logits)
        batch = self._make_sampling_batch(rows, positions, host_rows)
        if self._quarantine is None:
            tokens: Tensor | None = self._sampler.sample(logits, batch)
        else:
            tokens = self._quarantine.call(_sample_checked, self._sampler, logits, batch)
        if tokens is not None:
            # Where processors left a row valid, a mask has made it invalid.
            if faults is None:
                return tokens
            return torch.where((tokens == NO_LOGITS) | (faults != MASKED), faults, tokens)
        # It is replaced now, and may have overwritten the logits.
        return self._sample_float32(raw_logits, inputs, host_rows, max_positions, token_masks)

    def _apply_penalties(
        self, logits: Tensor, rows: Tensor, positions: Tensor, host_rows: NDArray[np.int32], max_num_tokens: int
    ) -> None:
        penalized = np.flatnonzero(self._has_penalties[host_rows])
        if not len(penalized):
            return
        logits_rows = copy_to_device(penalized, torch.int64, logits.device)
        # A token's position is also the number of tokens before it.
        apply_penalties(logits, logits_rows, rows, positions, max_num_tokens, self._penalty_columns)

    def _make_sampling_batch(self, rows: Tensor, positions: Tensor, host_rows: NDArray[np.int32]) -> SamplingBatch:
        table = self.table
        return SamplingBatch(
            temperature=table.temperature[rows],
            top_k=table.top_k[rows],
            top_p=table.top_p[rows],
            min_p=table.min_p[rows],
            seed=table.seed[rows],
            position=positions.long(),
            any_random=bool(self._is_random[host_rows].any()),
            any_top_k=bool(self._has_top_k[host_rows].any()),
            any_top_p=bool(self._has_top_p[host_rows].any()),
            any_min_p=bool(self._has_min_p[host_rows].any()),
        )

    def _replace_sampler(self, fallback: Sampler, plugin: QuarantinedPlugin) -> None:
        # Where the sampler was captured it was in both graphs, else in none: then greedy ones take the argmax.
        self._stale_graph_variants = {"random"} if self.device_sampler is None else {"greedy", "random"}
        if self.device_sampler is not None:
            self.device_sampler = fallback if fallback.prepare_graph_sampling(self._max_logits_rows) else None
        self._sampler, self._quarantine = fallback, None
        self._quarantined.append(plugin)

    def _note_quarantine(self, plugin: QuarantinedPlugin) -> None:
        self._quarantined.append(plugin)


def _sample_checked(sampler: Sampler, logits: Tensor, batch: SamplingBatch) -> Tensor:
    return check_sampled_tokens(sampler.sample(logits, batch), len(logits))
