"""Decode steps as CUDA graphs: inputs, model and logits in one, sampling and verification of drafts in another.

A step of decodes alone launches the same kernels whatever its requests are, if its batch is padded to one of a few
sizes. A graph of them replays in microseconds, where launching them from Python takes milliseconds. Graphs read and
write buffers of fixed address: the request table, and the inputs that are allocated here once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.core.contracts.attention import AttentionBackend, AttentionBatch, GraphKey
from quire.core.contracts.model import ForwardContext, Model
from quire.core.contracts.sampler import Sampler, SamplingBatch
from quire.core.messages import SchedulerOutput, TokenMasks
from quire.core.ops.pinned import copy_to_device
from quire.core.sample.inputs import DraftSpans
from quire.core.sample.row_faults import mark_invalid_rows
from quire.core.sample.verify import DraftVerifier, verify_drafts
from quire.core.sample.vocab_parallel import VocabParallelSampler
from quire.core.worker.adapter_runner import AdapterRunner
from quire.core.worker.cuda_graphs.capture import GraphCapturer
from quire.core.worker.cuda_graphs.capture_sizes import (
    choose_capture_sizes,
    choose_verify_capture_sizes,
    choose_verify_query_lens,
)
from quire.core.worker.cuda_graphs.captured_step import CapturedStep, DecodeShape, StepLogits
from quire.core.worker.input_builder import LogitsIndices, StepInputs
from quire.core.worker.kv_cache import KVCache
from quire.core.worker.pipeline import PipelineRunner
from quire.core.worker.request_table import RequestTable
from quire.core.worker.token_mask_buffer import TokenMaskBuffer

__all__ = ["DecodeGraphs"]


class DecodeGraphs:
    """Every step in which each request has one token, and up to ``num_draft_tokens`` to verify, runs as a replay of the
    smallest captured size that holds it.

    Padding requests point at the table's last row, which owns the padding block alone; padding tokens of a request that
    has fewer drafts than others write there too. There are two variants of sampling, both writing the same tokens:
    ``greedy``, and ``random`` for any mix of greedy and random requests, where a ``sampler`` is given that samples from
    the table by itself. With ``token_masks`` each has a second form, ``masked_...``, which applies them before; steps
    without a grammar replay the first. With a ``vocab_sampler`` logits are one rank's part: ``greedy`` and two more
    variants, ``local_...``, sample from those, the others gather whole ones. With ``adapters`` the model of every
    shape is captured twice, with and without them, and both write the same logits. ``launch_draft_prefill`` shows a
    step's inputs to a proposer that observes every step. On a stage of a ``pipeline`` that is not the first the model
    goes on from a buffer, and one that is not the last samples nothing: both exchange their hidden states around the
    replay.
    """

    def __init__(
        self,
        model: Model,
        backends: list[AttentionBackend],
        kv_cache: KVCache,
        table: RequestTable,
        block_size: int,
        sampler: Sampler | None = None,
        num_draft_tokens: int = 0,
        draft_verifier: DraftVerifier = verify_drafts,
        launch_draft_prefill: Callable[[StepInputs], None] | None = None,
        token_masks: TokenMaskBuffer | None = None,
        vocab_sampler: VocabParallelSampler | None = None,
        adapters: AdapterRunner | None = None,
        pipeline: PipelineRunner | None = None,
    ) -> None:
        self._launch_draft_prefill = launch_draft_prefill
        self._model = model
        self._backends = backends
        self._kv_cache = kv_cache
        self._table = table
        self._block_size = block_size
        self._sampler = sampler
        self._draft_verifier = draft_verifier
        self._token_masks = token_masks
        self._vocab_sampler = vocab_sampler
        self._adapters = adapters
        self._variants = ["greedy"] if sampler is None else ["greedy", "random"]
        if token_masks is not None:
            self._variants += [f"masked_{variant}" for variant in self._variants]
        if vocab_sampler is not None:
            self._variants += ["local_random", "local_filters"]
        self._pipeline = pipeline
        self._computes_logits = pipeline is None or pipeline.stage.is_last
        if not self._computes_logits:
            self._variants = []
        capture_sizes = choose_capture_sizes(table.num_rows)
        can_verify = all("verify" in backend.graph_support for backend in backends)
        # Batch sizes by query length, both ascending: ``_find_captured`` takes the first that is large enough.
        self._capture_sizes = {1: capture_sizes} | {
            query_len: choose_verify_capture_sizes(table.num_rows)
            for query_len in (choose_verify_query_lens(num_draft_tokens) if can_verify else ())
        }
        max_reqs = capture_sizes[-1]
        max_tokens = max(sizes[-1] * query_len for query_len, sizes in self._capture_sizes.items())
        device = table.device
        # One set of buffers serves every shape, each of which takes the front of them: no two graphs run at once.
        # Row 0 holds each request's table row, row 1 its number of drafts, so that one upload brings both.
        self._rows_and_drafts = torch.full((2, max_reqs), table.padding_row, dtype=torch.int64, device=device)
        self._rows_and_drafts[1] = 0
        self._sampled_token_ids = torch.zeros(max_reqs, dtype=torch.int32, device=device)
        self._arange = torch.arange(max_tokens + 1, device=device)
        self._input_ids = torch.zeros(max_tokens, dtype=torch.int32, device=device)
        self._positions = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        self._hidden_states = None if pipeline is None else pipeline.make_input_buffer(max_tokens)
        self._logits_table_rows = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        self._logits_positions = torch.zeros(max_tokens, dtype=torch.int32, device=device)
        self._seq_lens = torch.zeros(max_reqs, dtype=torch.int32, device=device)
        self._slot_mapping = [torch.zeros(max_tokens, dtype=torch.int64, device=device) for _ in backends]
        self._block_tables = [torch.zeros_like(blocks[:max_reqs]) for blocks in table.block_tables]
        self._captured: dict[DecodeShape, CapturedStep] = {}
        self._uploaded: NDArray[np.int64] | None = None  # what the front of ``_rows_and_drafts`` holds

    @property
    def shapes(self) -> list[DecodeShape]:
        """Every shape that is captured, the largest first."""
        shapes = [DecodeShape(query_len, size) for query_len, sizes in self._capture_sizes.items() for size in sizes]
        return sorted(shapes, key=lambda shape: -shape.query_len * shape.num_reqs)

    def can_run_step(self, step: SchedulerOutput) -> bool:
        """Whether ``run_model`` can serve the step."""
        if not self._captured or not step.sampling_mask.all():
            return False
        if step.num_draft_tokens is None:
            return step.num_decodes == len(step.rows)
        # Each request has one token beside its drafts: else some compute prompts.
        max_query_len = max(self._capture_sizes)
        decodes_only = step.total_num_scheduled_tokens == len(step.rows) + int(step.num_draft_tokens.sum())
        return (
            decodes_only
            and step.num_draft_tokens.max() < max_query_len
            and len(step.rows) <= self._capture_sizes[max_query_len][-1]
        )

    def warm_up(self) -> None:
        """Launch what every shape launches, once, with padding requests alone."""
        for shape in self.shapes:
            self._launch_step(shape)

    def capture_graphs(self, capturer: GraphCapturer) -> None:
        """Capture every shape, the largest first so that the others fit into its memory."""
        for shape in self.shapes:
            # Launch it first: a kernel that is loaded, or a library handle made, in a capture would break it.
            inputs = self._launch_step(shape).inputs
            model = capturer.capture_graph(partial(self._launch_model, inputs))
            sampling_graphs = {
                variant: capturer.capture_graph(partial(self._launch_sampling, variant, inputs, model.output))
                for variant in self._variants
            }
            draft_prefill_graph = None
            if self._launch_draft_prefill is not None:
                draft_prefill_graph = capturer.capture_graph(partial(self._launch_draft_prefill, inputs)).graph
            adapter_graphs = {}
            for num_slots in self._prepare_adapters(shape):
                launch = partial(self._launch_model_into, model.output, inputs)
                adapter_graphs[num_slots] = capturer.capture_graph(launch).graph
            self._captured[shape] = CapturedStep(
                shape, inputs, model.output, model.graph, adapter_graphs, sampling_graphs, draft_prefill_graph
            )

    def run_model(self, step: SchedulerOutput) -> None:
        """Run the model for a step that ``can_run_step``, up to its logits or what the next stage goes on from."""
        captured = self._find_captured(step)
        count, size = len(step.rows), captured.shape.num_reqs
        rows_and_drafts = np.zeros((2, size), dtype=np.int64)
        rows_and_drafts[0, count:] = self._table.padding_row
        rows_and_drafts[0, :count] = step.rows
        if step.num_draft_tokens is not None:
            rows_and_drafts[1, :count] = step.num_draft_tokens
        # Most steps have the requests of the step before: then nothing is copied to the device at all.
        if self._uploaded is None or not np.array_equal(self._uploaded, rows_and_drafts):
            self._rows_and_drafts[:, :size] = copy_to_device(rows_and_drafts, torch.int64, self._rows_and_drafts.device)
            self._uploaded = rows_and_drafts
        graph = captured.model_graph
        if self._adapters is not None:
            self._adapters.prepare_decodes(size, captured.shape.query_len)
            if num_slots := self._adapters.num_named_slots:
                graph = captured.adapter_graphs[num_slots]
        if self._pipeline is None:
            graph.replay()
            return
        indices = captured.shape.find_token_indices(step)
        token_indices = None if indices is None else copy_to_device(indices, torch.int64, self._table.device)
        self._pipeline.receive_hidden_states(self._hidden_states, token_indices)
        graph.replay()
        self._pipeline.send_hidden_states(captured.output, token_indices)

    def sample_tokens(self, step: SchedulerOutput, variant: str, masks: TokenMasks | None = None) -> Tensor:
        """Sample for every request and append to its row: the token of each (num_reqs,) int32, or what the verifier
        returns where drafts are verified. The tensor is overwritten by the next step. With ``masks`` the captured
        logits are overwritten too."""
        captured = self._find_captured(step)
        sampling = captured.sampling_graphs[variant]
        if masks is not None and self._token_masks is not None:
            self._token_masks.upload_captured(masks, captured.shape.query_len, len(captured.output))
            sampling = captured.sampling_graphs[f"masked_{variant}"]
        sampling.graph.replay()
        return sampling.output[: len(step.rows)]

    def run_draft_prefill(self, step: SchedulerOutput) -> None:
        """Show the step, now that its tokens are sampled, to a proposer that observes every one."""
        if (graph := self._find_captured(step).draft_prefill_graph) is not None:
            graph.replay()

    def gather_logits(self, step: SchedulerOutput, indices: LogitsIndices) -> StepLogits:
        """The step's inputs and logits without padding, to sample by other means than a graph."""
        captured = self._find_captured(step)
        inputs, count, query_len = captured.inputs, len(step.rows), captured.shape.query_len
        # Captured logits have ``query_len`` rows for every request; those behind its drafts are left out.
        offset = np.arange(len(indices.request_indices)) - np.repeat(indices.starts, indices.num_drafts + 1)
        packed = np.concatenate((indices.request_indices * query_len + offset, indices.starts, indices.num_drafts))
        logits_rows, starts, num_drafts = copy_to_device(packed, torch.int64, self._rows_and_drafts.device).split(
            [len(offset), count, count]
        )
        spans = DraftSpans(inputs.rows[:count], starts, num_drafts, 1 + int(indices.num_drafts.max(initial=0)))
        unpadded = replace(
            inputs,
            logits_table_rows=inputs.logits_table_rows[logits_rows],
            logits_positions=inputs.logits_positions[logits_rows],
            draft_spans=spans,
        )
        return StepLogits(unpadded, captured.output[logits_rows])

    def _find_captured(self, step: SchedulerOutput) -> CapturedStep:
        """The smallest shape that holds the step. Query lengths and sizes are few: a search costs no microsecond."""
        max_drafts = 0 if step.num_draft_tokens is None else int(step.num_draft_tokens.max())
        query_len = next(query_len for query_len in sorted(self._capture_sizes) if query_len > max_drafts)
        size = next(size for size in self._capture_sizes[query_len] if size >= len(step.rows))
        return self._captured[query_len, size]  # type: ignore[index]  # equal to the named tuple, and sooner made

    def _launch_step(self, shape: DecodeShape) -> StepLogits:
        """All that a step of this shape launches."""
        inputs = self._make_static_inputs(shape)
        for _ in self._prepare_adapters(shape):
            self._launch_model(inputs)
        logits = self._launch_model(inputs)
        for variant in self._variants:
            self._launch_sampling(variant, inputs, logits)
        if self._launch_draft_prefill is not None:
            self._launch_draft_prefill(inputs)
        return StepLogits(inputs, logits)

    def _prepare_adapters(self, shape: DecodeShape) -> Iterator[int]:
        """Each of the numbers of slots that the shape is captured for: what is launched next is of a step with adapters
        in those, until the next."""
        if self._adapters is not None:
            num_tokens = shape.num_reqs * shape.query_len
            for num_slots in self._adapters.list_slot_counts(num_tokens):
                self._adapters.prepare_padding(num_tokens, num_slots)
                yield num_slots
            self._adapters.prepare_padding(num_tokens, 0)

    def _make_static_inputs(self, shape: DecodeShape) -> StepInputs:
        """Views of the buffers that a graph of this shape reads and writes."""
        query_len, size = shape.query_len, shape.num_reqs
        num_tokens = size * query_len
        query_start_loc = (self._arange[: size + 1] * query_len).int()
        batches = [
            AttentionBatch(
                query_start_loc=query_start_loc,
                seq_lens=self._seq_lens[:size],
                block_table=blocks[:size],
                num_reqs=size,
                num_tokens=num_tokens,
                max_query_len=query_len,
                max_seq_len=self._table.max_model_len,  # the graph serves any length, so the bound is the longest
                num_decodes=size,
                decode_query_len=query_len,
            )
            for blocks in self._block_tables
        ]
        rows, num_drafts = self._rows_and_drafts[:, :size]
        return StepInputs(
            rows=rows,
            input_ids=self._input_ids[:num_tokens],
            positions=self._positions[:num_tokens],
            seq_lens=self._seq_lens[:size],
            query_start_loc=query_start_loc,
            slot_mapping=[slots[:num_tokens] for slots in self._slot_mapping],
            batches=batches,
            # With one token a request, its logits row is its row of the batch, and its length the position to sample.
            logits_table_rows=rows if query_len == 1 else self._logits_table_rows[:num_tokens],
            logits_positions=self._seq_lens[:size] if query_len == 1 else self._logits_positions[:num_tokens],
            logits_indices=self._arange[:num_tokens],
            draft_spans=DraftSpans(rows, self._arange[:size] * query_len, num_drafts, query_len),
        )

    def _launch_model(self, inputs: StepInputs) -> Tensor:
        """Inputs from the table, the model, and its logits (num_tokens, vocab), on the last stage: one graph."""
        from quire.core.ops.kernels.decode_inputs_kernel import launch_decode_inputs

        table, last_group, query_len = self._table, len(inputs.batches) - 1, inputs.draft_spans.max_len
        for group, batch in enumerate(inputs.batches):
            launch_decode_inputs(
                inputs.rows,
                inputs.draft_spans.num_drafts,
                table.token_ids,
                table.num_computed_tokens,
                table.block_tables[group],
                inputs.input_ids,
                inputs.positions,
                inputs.seq_lens,
                inputs.slot_mapping[group],
                batch.block_table,
                self._block_size,
                table.max_model_len,
                # Every group reads ``num_computed_tokens``, so the last one alone moves it on. Where drafts are
                # verified the verifier does, since it alone knows how many tokens stay.
                advance=group == last_group and query_len == 1,
            )
            key = GraphKey("decode" if query_len == 1 else "verify", batch.num_tokens, batch.num_reqs)
            self._backends[group].prepare_metadata(batch, key)
        if query_len > 1:
            inputs.logits_table_rows.view(-1, query_len).copy_(inputs.rows[:, None])
            torch.add(inputs.positions, 1, out=inputs.logits_positions)
        context = ForwardContext(self._backends, inputs.slot_mapping, self._kv_cache.layers, self._kv_cache.group_of)
        if self._hidden_states is not None:
            context.hidden_states = self._hidden_states[: len(inputs.input_ids)]
        hidden: Tensor = self._model(inputs.input_ids, inputs.positions, context)
        if not self._computes_logits:
            return hidden
        if self._vocab_sampler is not None:
            return self._model.compute_local_logits(hidden)
        return self._model.compute_logits(hidden)

    def _launch_model_into(self, output: Tensor, inputs: StepInputs) -> None:
        output.copy_(self._launch_model(inputs))

    def _launch_sampling(self, variant: str, inputs: StepInputs, logits: Tensor) -> Tensor:
        """Sampling, verification of drafts and the feedback into the table: the second graph."""
        table, greedy, spans = self._table, variant.endswith("greedy"), inputs.draft_spans
        if self._vocab_sampler is not None:
            if variant == "greedy" or variant.startswith("local_"):
                return self._launch_local_sampling(self._vocab_sampler, variant, inputs, logits)
            logits = self._vocab_sampler.vocab.gather_logits(logits)
        if self._token_masks is not None and variant.startswith("masked_"):
            self._token_masks.apply(logits)
        if spans.max_len > 1:
            if self._sampler is None:
                tokens = mark_invalid_rows(logits, logits.argmax(-1).int())
            else:
                batch = SamplingBatch.from_table(
                    table.sampling, inputs.logits_table_rows, inputs.logits_positions.long(), not greedy
                )
                tokens = self._sampler.sample(logits, batch)
            return self._draft_verifier(tokens, spans, table.sampling, table.num_computed_tokens, table.num_drafts)
        tokens = self._sampled_token_ids[: len(logits)]
        if self._sampler is not None:
            self._sampler.sample_from_table(logits, inputs.rows, table.sampling, tokens, greedy=greedy)
            return tokens
        tokens.copy_(mark_invalid_rows(logits, logits.argmax(-1).int()))
        table.append_tokens(inputs.rows, tokens)
        table.num_tokens[table.padding_row :].zero_()  # what padding requests appended, or their row would run over
        return tokens

    def _launch_local_sampling(
        self, sampler: VocabParallelSampler, variant: str, inputs: StepInputs, local_logits: Tensor
    ) -> Tensor:
        """``_launch_sampling`` from this rank's part of the vocabulary."""
        table, spans, filters = self._table, inputs.draft_spans, variant == "local_filters"
        if spans.max_len > 1:
            positions = inputs.logits_positions.long()
            batch = SamplingBatch.from_table(table.sampling, inputs.logits_table_rows, positions, variant != "greedy")
            batch.any_top_k = batch.any_top_p = batch.any_min_p = filters
            tokens = sampler.sample(local_logits, batch)
            return self._draft_verifier(tokens, spans, table.sampling, table.num_computed_tokens, table.num_drafts)
        tokens = self._sampled_token_ids[: len(local_logits)]
        sampler.sample_from_table(
            local_logits, inputs.rows, table.sampling, tokens, random=variant != "greedy", filters=filters
        )
        return tokens
