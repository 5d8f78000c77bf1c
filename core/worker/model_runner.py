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
from quire.core.worker.cuda_graphs.capture import Recorder
from quire.core.worker.cuda_graphs.decode import DecodeGraphs
from quire.core.worker.cuda_graphs.prefill import MixedGraphs
from quire.core.worker.draft_runner import Drafting
from quire.core.worker.input_builder import Lines, StepInputs, build_inputs
from quire.core.worker.kv_cache import KVCache
from quire.core.worker.readback import Readback, StepClock
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
        kv: KVCache,
        table: RequestTable,
        sampling_runner: SamplingRunner,
        block_size: int,
        vocab_size: int,
        most_drafts: int = 0,
    ) -> None:
        self.model = model
        self.backends = list(backends)
        self.kv = kv
        self.table = table
        self.sampling_runner = sampling_runner
        self.block_size = block_size
        rows = table.num_rows
        self.drafting: Drafting | None = None
        self.most_drafts = most_drafts
        self._vocab_size = vocab_size
        self._prompt_len = np.zeros(rows, dtype=np.int64)
        self._prompt_logprobs = np.full(rows, -1, dtype=np.int32)
        self.graphs: DecodeGraphs | None = None
        self.mixed: MixedGraphs | None = None

    @property
    def bytes_per_block(self) -> int:
        """Of every layer, a proposer's included."""
        return self.kv.bytes_per_block + (0 if self.drafting is None else self.drafting.kv.bytes_per_block)

    def allocate(self, num_blocks: int) -> None:
        """Make the KV cache."""
        self.kv.allocate(num_blocks)
        if self.drafting is not None:
            self.drafting.kv.allocate(num_blocks)

    def parameters(self) -> Iterator[Tensor]:
        """Every weight, a proposer's included."""
        yield from self.model.parameters()
        if self.drafting is not None:
            yield from self.drafting.proposer.parameters()

    @torch.inference_mode()
    def prepare_graphs(self, max_tokens: int) -> None:
        """Launch what captured steps launch, with nothing at stake: decodes, and where backends allow it steps with up
        to ``max_tokens`` tokens of prompts."""
        self.graphs = DecodeGraphs(
            self.model, self.backends, self.kv, self.table, self.block_size, self.sampling_runner.device_sampler,
            self.most_drafts, self.sampling_runner.draft_verifier,
            self.drafting.read if self.drafting is not None and self.drafting.proposer.observes_every_step else None,
        )  # fmt: skip
        self.graphs.rehearse()
        if self.drafting is not None:
            self.drafting.rehearse()
        if all("mixed" in backend.graph_support for backend in self.backends):
            self.mixed = MixedGraphs(self.model, self.backends, self.kv, self.table, max_tokens)
            self.mixed.rehearse()

    @torch.inference_mode()
    def capture(self, launch_first: bool = False) -> None:
        """Record the steps that ``prepare_graphs`` prepared; ``launch_first``: launch every one before."""
        recorder = Recorder()
        if self.mixed is not None:
            self.mixed.capture(recorder, launch_first)
        if self.graphs is not None:
            self.graphs.capture(recorder)
        if self.drafting is not None:
            self.drafting.capture(recorder)

    @torch.inference_mode()
    def execute(self, step: SchedulerOutput) -> Readback:
        """Launch a step. The tokens are on their way to the host when this returns."""
        clock = StepClock(self.table.device)
        self._apply(step)
        if self.graphs is not None and self.graphs.covers(step):
            return self._replay(step, self.graphs, clock)
        lines = Lines.of(step)
        inputs = build_inputs(step, lines, self.table, self.block_size)
        mixed = self.mixed if self.mixed is not None and self.mixed.covers(inputs) else None
        hidden = self._forward(inputs) if mixed is None else mixed.forward(inputs)
        prompt = self._prompt_lines(step, hidden)
        sampled: SampledTokens | None = None
        if len(lines.owner):
            logits = self.model.compute_logits(hidden[inputs.logits_index])
            sampled = self.sampling_runner.sample_tokens(logits, step, inputs, lines)
        if self.drafting is not None:
            self._draft(self.drafting, step, inputs, sampled)
        return Readback(step, sampled, prompt, clock)

    def _draft(
        self, drafting: Drafting, step: SchedulerOutput, inputs: StepInputs | None, sampled: SampledTokens | None
    ) -> None:
        drafting.follow(step, inputs)
        if sampled is None:
            return
        if step.num_tokens_to_propose:
            sampled.ran_draft_backfill = drafting.propose(
                step, greedy=self.sampling_runner.all_greedy(step.rows[step.sampling_mask])
            )
        sampled.quarantined += drafting.take_faults()

    def _apply(self, step: SchedulerOutput) -> None:
        for row in step.freed_rows:
            self.sampling_runner.remove_row(row)
        self.table.add(step.new_requests)
        for request in step.new_requests:
            row = request.row
            self._prompt_len[row] = request.prompt_len
            wanted = request.params.prompt_logprobs
            self._prompt_logprobs[row] = -1 if wanted is None else wanted
            self.sampling_runner.add_row(request)
        if step.block_diffs:
            self.table.set_blocks(step.block_diffs)
        if step.block_copies:
            self.kv.copy_blocks(step.block_copies)
            if self.drafting is not None:
                self.drafting.copy_blocks(step.block_copies)
        self.table.set_continuations(step.host_drafts, self._vocab_size)

    def _replay(self, step: SchedulerOutput, graphs: DecodeGraphs, clock: StepClock) -> Readback:
        graphs.forward(step)
        variant = self.sampling_runner.graph_variant(step.rows)
        if variant is not None:
            sampled = SampledTokens(graphs.sample_tokens(step, variant))
        else:
            lines = Lines.of(step)
            inputs, logits = graphs.unpadded_logits(step, lines)
            sampled = self.sampling_runner.sample_tokens(logits, step, inputs, lines)
        if self.drafting is not None:
            graphs.observe(step)
            self._draft(self.drafting, step, None, sampled)
        return Readback(step, sampled, {}, clock)

    def _forward(self, inputs: StepInputs) -> Tensor:
        for backend, batch in zip(self.backends, inputs.batches, strict=True):
            backend.prepare_metadata(batch)
        context = ForwardContext(self.backends, inputs.slot_mapping, self.kv.layers, self.kv.group_of)
        return self.model(inputs.input_ids, inputs.positions, context)

    def _prompt_lines(self, step: SchedulerOutput, hidden: Tensor) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
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
