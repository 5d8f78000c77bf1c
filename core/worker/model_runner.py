"""Runs a step: applies the differences, builds inputs, runs the model, draws tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.core.contracts.attention import AttentionBackend
from quire.core.contracts.model import ForwardContext, Model
from quire.core.messages import SchedulerOutput
from quire.core.sample.logprobs import gather_logprobs
from quire.core.worker.cuda_graphs.capture import GraphCapturer
from quire.core.worker.cuda_graphs.decode import DecodeGraphs
from quire.core.worker.cuda_graphs.prefill import PrefillGraphs
from quire.core.worker.draft_runner import DraftRunner
from quire.core.worker.input_builder import LogitsIndices, StepInputs, build_inputs
from quire.core.worker.kv_cache import KVCache
from quire.core.worker.readback import Readback, StepTimer
from quire.core.worker.request_table import RequestTable
from quire.core.worker.sampling import SampledTokens, SamplingRunner

__all__ = ["ModelRunner"]

_PROMPT_LOGPROB_ROWS = 1024


class ModelRunner:
    """One rank's model and its state. Steps run in the order they come; nothing here waits for the device."""

    def __init__(
        self,
        model: Model,
        backends: Sequence[AttentionBackend],
        kv_cache: KVCache,
        table: RequestTable,
        sampling_runner: SamplingRunner,
        block_size: int,
        vocab_size: int,
        max_draft_tokens: int = 0,
    ) -> None:
        self.model = model
        self.backends = list(backends)
        self.kv_cache = kv_cache
        self.table = table
        self.sampling_runner = sampling_runner
        self.block_size = block_size
        rows = table.num_rows
        self.draft_runner: DraftRunner | None = None
        self.max_draft_tokens = max_draft_tokens
        self._vocab_size = vocab_size
        self._prompt_len = np.zeros(rows, dtype=np.int64)
        self._prompt_logprobs = np.full(rows, -1, dtype=np.int32)
        self.decode_graphs: DecodeGraphs | None = None
        self.prefill_graphs: PrefillGraphs | None = None

    @property
    def bytes_per_block(self) -> int:
        """Of every layer, a proposer's included."""
        return self.kv_cache.bytes_per_block + (
            0 if self.draft_runner is None else self.draft_runner.kv_cache.bytes_per_block
        )

    def allocate_kv_cache(self, num_blocks: int) -> None:
        """Make the KV cache."""
        self.kv_cache.allocate(num_blocks)
        if self.draft_runner is not None:
            self.draft_runner.kv_cache.allocate(num_blocks)

    def parameters(self) -> Iterator[Tensor]:
        """Every weight, a proposer's included."""
        yield from self.model.parameters()
        if self.draft_runner is not None:
            yield from self.draft_runner.proposer.parameters()

    @torch.inference_mode()
    def warm_up_graphs(self, max_tokens: int) -> None:
        """Launch what captured steps launch, with nothing at stake: decodes, and where backends allow it steps with up
        to ``max_tokens`` tokens of prompts."""
        self.decode_graphs = DecodeGraphs(
            self.model,
            self.backends,
            self.kv_cache,
            self.table,
            self.block_size,
            self.sampling_runner.device_sampler,
            self.max_draft_tokens,
            self.sampling_runner.draft_verifier,
            self.draft_runner.launch_draft_prefill
            if self.draft_runner is not None and self.draft_runner.proposer.observes_every_step
            else None,
        )
        self.decode_graphs.warm_up()
        if self.draft_runner is not None:
            self.draft_runner.warm_up()
        if all("mixed" in backend.graph_support for backend in self.backends):
            self.prefill_graphs = PrefillGraphs(self.model, self.backends, self.kv_cache, self.table, max_tokens)
            self.prefill_graphs.warm_up()

    @torch.inference_mode()
    def capture_graphs(self, launch_first: bool = False) -> None:
        """Record the steps that ``warm_up_graphs`` prepared; ``launch_first``: launch every one before."""
        recorder = GraphCapturer()
        if self.prefill_graphs is not None:
            self.prefill_graphs.capture_graphs(recorder, launch_first)
        if self.decode_graphs is not None:
            self.decode_graphs.capture_graphs(recorder)
        if self.draft_runner is not None:
            self.draft_runner.capture_graphs(recorder)

    @torch.inference_mode()
    def execute_step(self, step: SchedulerOutput) -> Readback:
        """Launch a step. The tokens are on their way to the host when this returns."""
        clock = StepTimer(self.table.device)
        self._update_states(step)
        if self.decode_graphs is not None and self.decode_graphs.can_run_step(step):
            return self._execute_decode_graphs(step, self.decode_graphs, clock)
        lines = LogitsIndices.from_step(step)
        inputs = build_inputs(step, lines, self.table, self.block_size)
        mixed = (
            self.prefill_graphs
            if self.prefill_graphs is not None and self.prefill_graphs.can_run_step(inputs)
            else None
        )
        hidden = self._run_model(inputs) if mixed is None else mixed.run_model(inputs)
        prompt = self._gather_prompt_logprobs(step, hidden)
        sampled: SampledTokens | None = None
        if len(lines.request_indices):
            logits = self.model.compute_logits(hidden[inputs.logits_indices])
            sampled = self.sampling_runner.sample_tokens(logits, step, inputs, lines)
        if self.draft_runner is not None:
            self._run_draft_runner(self.draft_runner, step, inputs, sampled)
        return Readback(step, sampled, prompt, clock)

    def _run_draft_runner(
        self, drafting: DraftRunner, step: SchedulerOutput, inputs: StepInputs | None, sampled: SampledTokens | None
    ) -> None:
        drafting.process_target_step(step, inputs)
        if sampled is None:
            return
        if step.num_tokens_to_propose:
            sampled.ran_draft_backfill = drafting.propose_drafts(
                step, greedy=self.sampling_runner.all_greedy(step.rows[step.sampling_mask])
            )
        sampled.quarantined += drafting.take_quarantined()

    def _update_states(self, step: SchedulerOutput) -> None:
        for row in step.freed_rows:
            self.sampling_runner.remove_row(row)
        self.table.add_requests(step.new_requests)
        for request in step.new_requests:
            row = request.row
            self._prompt_len[row] = request.prompt_len
            wanted = request.params.prompt_logprobs
            self._prompt_logprobs[row] = -1 if wanted is None else wanted
            self.sampling_runner.add_row(request)
        if step.block_diffs:
            self.table.update_block_tables(step.block_diffs)
        if step.block_copies:
            self.kv_cache.copy_blocks(step.block_copies)
            if self.draft_runner is not None:
                self.draft_runner.copy_blocks(step.block_copies)
        self.table.place_host_drafts(step.host_drafts, self._vocab_size)

    def _execute_decode_graphs(self, step: SchedulerOutput, graphs: DecodeGraphs, clock: StepTimer) -> Readback:
        graphs.run_model(step)
        variant = self.sampling_runner.graph_variant(step.rows)
        if variant is not None:
            sampled = SampledTokens(graphs.sample_tokens(step, variant))
        else:
            lines = LogitsIndices.from_step(step)
            inputs, logits = graphs.gather_logits(step, lines)
            sampled = self.sampling_runner.sample_tokens(logits, step, inputs, lines)
        if self.draft_runner is not None:
            graphs.run_draft_prefill(step)
            self._run_draft_runner(self.draft_runner, step, None, sampled)
        return Readback(step, sampled, {}, clock)

    def _run_model(self, inputs: StepInputs) -> Tensor:
        for backend, batch in zip(self.backends, inputs.batches, strict=True):
            backend.prepare_metadata(batch)
        context = ForwardContext(self.backends, inputs.slot_mapping, self.kv_cache.layers, self.kv_cache.group_of)
        return self.model(inputs.input_ids, inputs.positions, context)

    def _gather_prompt_logprobs(
        self, step: SchedulerOutput, hidden: Tensor
    ) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        """Log-probabilities of the prompt tokens that this step's chunks predict, by index into the step."""
        asked = np.flatnonzero(self._prompt_logprobs[step.rows] >= 0)
        if not len(asked):
            return {}
        starts: NDArray[np.int64] = np.concatenate(([0], np.cumsum(step.num_scheduled_tokens)))
        found = {}
        for i in asked:
            row = step.rows[i]
            first = step.max_seq_lens[i] - step.num_scheduled_tokens[i]
            count = int(min(step.num_scheduled_tokens[i], self._prompt_len[row] - 1 - first))
            if count <= 0:
                continue
            target = self.table.token_ids[row, first + 1 : first + 1 + count]
            states = hidden[starts[i] : starts[i] + count]
            k = int(self._prompt_logprobs[row])
            parts = [
                gather_logprobs(self.model.compute_logits(some), chosen, k)
                for some, chosen in zip(
                    states.split(_PROMPT_LOGPROB_ROWS), target.split(_PROMPT_LOGPROB_ROWS), strict=True
                )
            ]
            found[int(i)] = tuple(torch.cat(column) for column in zip(*parts, strict=True))
        return found  # type: ignore[return-value]
