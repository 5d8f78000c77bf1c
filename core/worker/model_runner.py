"""Runs a step: applies the differences, builds inputs, runs the model, samples tokens, drafts the next ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quire.core.contracts.attention import AttentionBackend
from quire.core.contracts.model import ForwardContext, Model
from quire.core.messages import SchedulerOutput, TokenMasks
from quire.core.sample.logprobs import LogprobsTensors
from quire.core.worker.adapter_runner import AdapterRunner
from quire.core.worker.cuda_graphs.capture import GraphCapturer
from quire.core.worker.cuda_graphs.decode import DecodeGraphs
from quire.core.worker.cuda_graphs.prefill import PrefillGraphs
from quire.core.worker.draft_runner import DraftRunner
from quire.core.worker.input_builder import LogitsIndices, StepInputs, build_inputs
from quire.core.worker.kv_cache import KVCache
from quire.core.worker.pipeline import PipelineRunner
from quire.core.worker.prompt_logprobs import PromptLogprobs
from quire.core.worker.readback import Readback, StepTimer
from quire.core.worker.request_table import RequestTable
from quire.core.worker.sampling import SampledTokens, SamplingRunner

__all__ = ["ModelRunner"]


class ModelRunner:
    """One rank's model and its state. Steps run in the order they come, on one stream.

    Nothing here waits for the device: what a step needs of the step before (its tokens, how many drafts were accepted)
    is read on the device. So the host launches a step while the device still runs the one before.
    """

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
        self.max_draft_tokens = max_draft_tokens
        self.draft_runner: DraftRunner | None = None
        """Where a proposer drafts on the device."""
        self.adapters: AdapterRunner | None = None
        """Where requests may have adapters."""
        self.pipeline: PipelineRunner | None = None
        """Where the layers are divided between stages, of which this rank has one."""
        self.decode_graphs: DecodeGraphs | None = None
        self.prefill_graphs: PrefillGraphs | None = None
        self._vocab_size = vocab_size
        # One rank's part of the vocabulary, where the sampler takes that.
        is_local = sampling_runner.vocab_sampler is not None
        self._compute_logits = model.compute_local_logits if is_local else model.compute_logits
        self._prompt_logprobs = PromptLogprobs(table.num_rows)
        self._launched: _LaunchedStep | None = None

    @property
    def bytes_per_block(self) -> int:
        """Of every layer, a proposer's included: they live under the same block ids."""
        draft_bytes = 0 if self.draft_runner is None else self.draft_runner.kv_cache.bytes_per_block
        return self.kv_cache.bytes_per_block + draft_bytes

    def allocate_kv_cache(self, num_blocks: int) -> None:
        """Allocate the KV cache, a proposer's included, in place of the one before."""
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
        """Allocate the buffers of CUDA graphs and launch, for padding requests, what will be captured: decodes, and
        where backends allow it steps with up to ``max_tokens`` tokens of prompts."""
        draft_runner = self.draft_runner
        observes_every_step = draft_runner is not None and draft_runner.proposer.observes_every_step
        self.decode_graphs = DecodeGraphs(
            self.model,
            self.backends,
            self.kv_cache,
            self.table,
            self.block_size,
            self.sampling_runner.device_sampler,
            self.max_draft_tokens,
            self.sampling_runner.draft_verifier,
            draft_runner.launch_draft_prefill if draft_runner is not None and observes_every_step else None,
            self.sampling_runner.token_masks,
            self.sampling_runner.vocab_sampler,
            self.adapters,
            self.pipeline,
        )
        self.decode_graphs.warm_up()
        self.warm_up_drafts()
        if all("mixed" in backend.graph_support for backend in self.backends):
            self.prefill_graphs = PrefillGraphs(
                self.model,
                self.backends,
                self.kv_cache,
                self.table,
                max_tokens,
                adapters=self.adapters,
                pipeline=self.pipeline,
            )
            self.prefill_graphs.warm_up()

    @torch.inference_mode()
    def warm_up_drafts(self) -> None:
        """Launch what a device proposer launches for its first draft token, for padding requests."""
        if self.draft_runner is not None:
            self.draft_runner.warm_up()

    @torch.inference_mode()
    def launch_longest_drafts(self) -> None:
        """``DraftRunner.launch_longest_drafts``, if a device proposer drafts."""
        if self.draft_runner is not None:
            self.draft_runner.launch_longest_drafts()

    @torch.inference_mode()
    def capture_graphs(self, launch_first: bool = False) -> None:
        """Capture the graphs that ``warm_up_graphs`` prepared; ``launch_first``: launch each shape before."""
        capturer = GraphCapturer()
        if self.prefill_graphs is not None:  # these need the most memory, which the others then use again
            self.prefill_graphs.capture_graphs(capturer, launch_first)
        if self.decode_graphs is not None:
            self.decode_graphs.capture_graphs(capturer)
        if self.draft_runner is not None:
            self.draft_runner.capture_graphs(capturer)

    def execute_step(self, step: SchedulerOutput, masks: TokenMasks | None = None) -> Readback:
        """Launch a step. Its tokens are on their way to the host when this returns."""
        self.execute_model(step)
        return self.sample_tokens(masks)

    @torch.inference_mode()
    def execute_model(self, step: SchedulerOutput) -> None:
        """Launch a step up to its logits; ``sample_tokens`` comes next."""
        timer = StepTimer(self.table.device)
        if self.pipeline is not None:
            self.pipeline.begin_step(step)
        self._update_states(step)
        if self.adapters is not None:
            self.adapters.begin_step(step)
        self._launched = launched = _LaunchedStep(step, timer)
        if self.decode_graphs is not None and self.decode_graphs.can_run_step(step):
            self.decode_graphs.run_model(step)
            launched.graphs = self.decode_graphs
            return
        launched.indices = indices = LogitsIndices.from_step(step)
        launched.inputs = inputs = build_inputs(step, indices, self.table, self.block_size)
        hidden = self._run_model(inputs)
        if not self._samples:
            return
        launched.prompt_logprobs = self._prompt_logprobs.gather_prompt_logprobs(
            step, hidden, self.model, self.table.token_ids
        )
        if len(indices.request_indices):
            launched.logits = self._compute_logits(hidden[inputs.logits_indices])  # (num_logits_rows, vocab)

    @property
    def launched_step(self) -> SchedulerOutput:
        """The step that ``execute_model`` began."""
        assert self._launched is not None, "execute_model comes first"
        return self._launched.step

    @torch.inference_mode()
    def sample_tokens(self, masks: TokenMasks | None = None) -> Readback:
        """Launch the rest of the step: its tokens are on their way to the host when this returns. A stage that is not
        the last has none."""
        assert self._launched is not None, "execute_model comes first"
        launched, self._launched = self._launched, None
        if launched.graphs is not None and self._samples:
            readback = self._sample_with_graphs(launched, launched.graphs, masks)
        else:
            readback = self._sample_eager(launched, masks)
        if self.pipeline is not None:
            self.pipeline.return_tokens()
        return readback

    def _sample_eager(self, launched: _LaunchedStep, masks: TokenMasks | None) -> Readback:
        step = launched.step
        sampled: SampledTokens | None = None
        if launched.logits is not None and launched.inputs is not None and launched.indices is not None:
            sampled = self.sampling_runner.sample_tokens(
                launched.logits, step, launched.inputs, launched.indices, masks
            )
        if self.draft_runner is not None:
            self._run_draft_runner(self.draft_runner, step, launched.inputs, sampled)
        return Readback(step, sampled, launched.prompt_logprobs, launched.timer)

    def _sample_with_graphs(self, launched: _LaunchedStep, graphs: DecodeGraphs, masks: TokenMasks | None) -> Readback:
        step = launched.step
        variant = self.sampling_runner.graph_variant(step.rows, masked=masks is not None)
        if variant is not None:
            sampled = SampledTokens(graphs.sample_tokens(step, variant, masks))
        else:  # penalties, logits processors or log-probabilities: the model is replayed, sampling is launched
            indices = LogitsIndices.from_step(step)
            captured = graphs.gather_logits(step, indices)
            sampled = self.sampling_runner.sample_tokens(captured.logits, step, captured.inputs, indices, masks)
        if self.draft_runner is not None:
            graphs.run_draft_prefill(step)
            self._run_draft_runner(self.draft_runner, step, None, sampled)
        return Readback(step, sampled, {}, launched.timer)

    def _run_draft_runner(
        self,
        draft_runner: DraftRunner,
        step: SchedulerOutput,
        inputs: StepInputs | None,
        sampled: SampledTokens | None,
    ) -> None:
        # After sampling: a proposer reads the sampled tokens from the table.
        draft_runner.process_target_step(step, inputs)
        if sampled is None:
            return
        if step.num_tokens_to_propose:
            sampled.ran_draft_backfill = draft_runner.propose_drafts(
                step, greedy=self.sampling_runner.all_greedy(step.rows[step.sampling_mask])
            )
            if step.return_drafts:
                sampled.draft_token_ids = self.table.gather_drafts(
                    step.rows[step.sampling_mask], step.num_tokens_to_propose
                )
        sampled.quarantined += draft_runner.take_quarantined()

    def _update_states(self, step: SchedulerOutput) -> None:
        """Apply the differences to the step before, in the order that ``SchedulerOutput`` promises: a freed row may be
        a new request's, and a copied block may be in its block table."""
        for row in step.freed_rows:
            self.sampling_runner.remove_row(row)
        self.table.add_requests(step.new_requests)
        for request in step.new_requests:
            self._prompt_logprobs.add_request(request)
            self.sampling_runner.add_row(request)
        if step.block_diffs:
            self.table.update_block_tables(step.block_diffs)
        if step.block_copies:
            self.kv_cache.copy_blocks(step.block_copies)
            if self.draft_runner is not None:
                self.draft_runner.copy_blocks(step.block_copies)
        self.table.place_host_drafts(step.host_drafts, self._vocab_size)

    @property
    def _samples(self) -> bool:
        """Whether this rank computes logits, and tokens from them."""
        return self.pipeline is None or self.pipeline.stage.is_last

    def _run_model(self, inputs: StepInputs) -> Tensor:
        """Hidden states (num_tokens, hidden), which go to the next stage."""
        received = None if self.pipeline is None else self.pipeline.receive_hidden_states()
        if self.prefill_graphs is not None and self.prefill_graphs.can_run_step(inputs):
            hidden = self.prefill_graphs.run_model(inputs, received)
        else:
            hidden = self._launch_model(inputs, received)
        if self.pipeline is not None:
            self.pipeline.send_hidden_states(hidden)
        return hidden

    def _launch_model(self, inputs: StepInputs, received: Tensor | None) -> Tensor:
        """Launch the model kernel by kernel: hidden states (num_tokens, hidden)."""
        for backend, batch in zip(self.backends, inputs.batches, strict=True):
            backend.prepare_metadata(batch)
        if self.adapters is not None:
            self.adapters.prepare_step()
        context = ForwardContext(self.backends, inputs.slot_mapping, self.kv_cache.layers, self.kv_cache.group_of)
        context.hidden_states = received
        hidden: Tensor = self.model(inputs.input_ids, inputs.positions, context)
        return hidden


@dataclass(slots=True)
class _LaunchedStep:
    """A step between its model and its sampling."""

    step: SchedulerOutput
    timer: StepTimer
    graphs: DecodeGraphs | None = None
    """Where graphs ran the model, they hold its inputs and logits; else the fields below do."""
    indices: LogitsIndices | None = None
    inputs: StepInputs | None = None
    logits: Tensor | None = None  # (num_logits_rows, vocab); None: no request of the step samples
    prompt_logprobs: dict[int, LogprobsTensors] = field(default_factory=dict)
