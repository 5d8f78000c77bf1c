"""Decode steps as CUDA graphs: inputs, model and logits in one, sampling and verification in another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.core.contracts.attention import AttentionBackend, AttentionBatch, GraphKey
from quire.core.contracts.model import ForwardContext, Model
from quire.core.contracts.sampler import Sampler, SamplingBatch
from quire.core.messages import SchedulerOutput
from quire.core.ops.pinned import copy_to_device
from quire.core.sample.inputs import DraftSpans
from quire.core.sample.verify import DraftVerifier, verify_drafts
from quire.core.worker.cuda_graphs.capture import GraphCapturer
from quire.core.worker.input_builder import LogitsIndices, StepInputs
from quire.core.worker.kv_cache import KVCache
from quire.core.worker.request_table import RequestTable

__all__ = ["DecodeGraphs", "choose_verify_capture_sizes", "choose_verify_query_lens", "compute_max_captured_tokens"]

_MAX_VERIFY_REQS = 256
"""Most requests of a captured step that verifies drafts."""


def choose_capture_sizes(max_num_seqs: int) -> list[int]:
    """Padded batch sizes: fine steps where launches dominate, steps of 8 and 16 above."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, max_num_seqs + 1, 32)]
    return sorted({size for size in sizes if size < max_num_seqs} | {max_num_seqs})


def choose_verify_capture_sizes(max_num_seqs: int) -> list[int]:
    """Those of steps that verify drafts: fewer above 64 requests."""
    sizes = [size for size in choose_capture_sizes(max_num_seqs) if size <= 64 or not size % 64 or size == max_num_seqs]
    return [size for size in sizes if size <= _MAX_VERIFY_REQS]


def compute_max_captured_tokens(max_num_seqs: int, num_draft_tokens: int) -> int:
    """Tokens of the largest captured step."""
    return max(max_num_seqs, choose_verify_capture_sizes(max_num_seqs)[-1] * (1 + num_draft_tokens))


def choose_verify_query_lens(num_draft_tokens: int) -> list[int]:
    """Queries of a request in steps that verify up to ``num_draft_tokens`` drafts: one more than 1, 2 and all."""
    return sorted({1 + count for count in (1, 2, num_draft_tokens) if 0 < count <= num_draft_tokens})


@dataclass(slots=True)
class _CapturedStep:
    inputs: StepInputs
    logits: Tensor  # (size * queries, vocab)
    model_graph: torch.cuda.CUDAGraph
    sampling: dict[str, tuple[torch.cuda.CUDAGraph, Tensor]]  # by variant: the graph, and what it writes
    draft_prefill_graph: torch.cuda.CUDAGraph | None


class DecodeGraphs:
    """Every step in which each request has one token, and up to ``num_draft_tokens`` to verify, runs as a replay of the
    smallest captured size that holds it.

    Padding requests point at the table's last row, which owns the padding block alone; padding tokens of a request that
    has fewer drafts than others write there too. There are two variants of sampling, both writing the same tokens:
    ``greedy``, and ``random`` for any mix of greedy and random requests, where a ``sampler`` is given that draws from
    the table by itself.
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
    ) -> None:
        self._launch_draft_prefill = launch_draft_prefill  # a proposer that observes every step
        self._model = model
        self._backends = backends
        self._kv_cache = kv_cache
        self._table = table
        self._block_size = block_size
        self._sampler = sampler
        self._draft_verifier = draft_verifier
        self._variants = ["greedy"] if sampler is None else ["greedy", "random"]
        sizes = choose_capture_sizes(table.num_rows)
        verify = all("verify" in backend.graph_support for backend in backends)
        self._capture_sizes = {1: sizes} | {
            queries: choose_verify_capture_sizes(table.num_rows)
            for queries in (choose_verify_query_lens(num_draft_tokens) if verify else ())
        }
        most, lines = sizes[-1], max(sizes[-1] * queries for queries, sizes in self._capture_sizes.items())
        device = table.device
        self._rows_and_drafts = torch.full((2, most), table.padding_row, dtype=torch.int64, device=device)
        self._rows_and_drafts[1] = 0  # drafts
        self._sampled_token_ids = torch.zeros(most, dtype=torch.int32, device=device)
        self._arange = torch.arange(lines + 1, device=device)
        self._input_ids = torch.zeros(lines, dtype=torch.int32, device=device)
        self._positions = torch.zeros(lines, dtype=torch.int64, device=device)
        self._logits_table_rows = torch.zeros(lines, dtype=torch.int64, device=device)
        self._logits_positions = torch.zeros(lines, dtype=torch.int32, device=device)
        self._seq_lens = torch.zeros(most, dtype=torch.int32, device=device)
        self._slot_mapping = [torch.zeros(lines, dtype=torch.int64, device=device) for _ in backends]
        self._block_tables = [torch.zeros_like(blocks[:most]) for blocks in table.block_tables]
        self._captured: dict[tuple[int, int], _CapturedStep] = {}
        self._uploaded_rows: NDArray[np.int64] | None = None

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(queries, size) of every graph, the largest first."""
        pairs = [(queries, size) for queries, sizes in self._capture_sizes.items() for size in sizes]
        return sorted(pairs, key=lambda shape: -shape[0] * shape[1])

    def can_run_step(self, step: SchedulerOutput) -> bool:
        """Whether ``run_model`` can serve the step."""
        if not self._captured or not step.sampling_mask.all():
            return False
        if step.num_draft_tokens is None:
            return step.num_decodes == len(step.rows)
        queries = max(self._capture_sizes)
        alone = step.total_num_scheduled_tokens == len(step.rows) + int(step.num_draft_tokens.sum())
        return alone and step.num_draft_tokens.max() < queries and len(step.rows) <= self._capture_sizes[queries][-1]

    def warm_up(self) -> None:
        """Launch what every size launches, once and with nothing at stake."""
        for shape in self.shapes:
            self._launch_step(shape)

    def capture_graphs(self, recorder: GraphCapturer) -> None:
        """Record every size, the largest first so that the others fit into its memory."""
        for shape in self.shapes:
            inputs, logits = self._launch_step(shape)  # loads what it launches
            model, logits = recorder.capture_graph(partial(self._launch_model, inputs))
            sampling = {
                v: recorder.capture_graph(partial(self._launch_sampling, v, inputs, logits)) for v in self._variants
            }
            read = (
                None
                if self._launch_draft_prefill is None
                else recorder.capture_graph(partial(self._launch_draft_prefill, inputs))[0]
            )
            self._captured[shape] = _CapturedStep(inputs, logits, model, sampling, read)

    def run_model(self, step: SchedulerOutput) -> None:
        """Run the model for a step."""
        queries, size = self._find_shape(step)
        count = len(step.rows)
        padded = np.zeros((2, size), dtype=np.int64)
        padded[0, count:] = self._table.padding_row
        padded[0, :count] = step.rows
        if step.num_draft_tokens is not None:
            padded[1, :count] = step.num_draft_tokens
        if self._uploaded_rows is None or not np.array_equal(self._uploaded_rows, padded):
            self._rows_and_drafts[:, :size] = copy_to_device(padded, torch.int64, self._rows_and_drafts.device)
            self._uploaded_rows = padded
        self._captured[queries, size].model_graph.replay()

    def sample_tokens(self, step: SchedulerOutput, variant: Literal["greedy", "random"]) -> Tensor:
        """Draw for every request and feed it back, until the next step: its token (num_reqs,) int32, or what ``verify``
        returns where drafts are verified."""
        graph, tokens = self._captured[self._find_shape(step)].sampling[variant]
        graph.replay()
        return tokens[: len(step.rows)]

    def run_draft_prefill(self, step: SchedulerOutput) -> None:
        """Show the step, now that its tokens are drawn, to a proposer that observes every one."""
        if (graph := self._captured[self._find_shape(step)].draft_prefill_graph) is not None:
            graph.replay()

    def gather_logits(self, step: SchedulerOutput, lines: LogitsIndices) -> tuple[StepInputs, Tensor]:
        """The step's inputs and logits without padding, for who draws by other means."""
        queries, size = self._find_shape(step)
        captured = self._captured[queries, size]
        inputs, count = captured.inputs, len(step.rows)
        place = np.arange(len(lines.request_indices)) - np.repeat(lines.starts, lines.num_drafts + 1)
        packed = np.concatenate((lines.request_indices * queries + place, lines.starts, lines.num_drafts))
        index, first, drafts = copy_to_device(packed, torch.int64, self._rows_and_drafts.device).split(
            [len(place), count, count]
        )
        spans = DraftSpans(inputs.rows[:count], first, drafts, 1 + int(lines.num_drafts.max(initial=0)))
        inputs = replace(
            inputs,
            logits_table_rows=inputs.logits_table_rows[index],
            logits_positions=inputs.logits_positions[index],
            draft_spans=spans,
        )
        return inputs, captured.logits[index]

    def _launch_step(self, shape: tuple[int, int]) -> tuple[StepInputs, Tensor]:
        """All that a step of this shape launches."""
        inputs = self._make_static_inputs(*shape)
        logits = self._launch_model(inputs)
        for variant in self._variants:
            self._launch_sampling(variant, inputs, logits)
        if self._launch_draft_prefill is not None:
            self._launch_draft_prefill(inputs)
        return inputs, logits

    def _find_shape(self, step: SchedulerOutput) -> tuple[int, int]:
        drafts = 0 if step.num_draft_tokens is None else int(step.num_draft_tokens.max())
        queries = next(queries for queries in sorted(self._capture_sizes) if queries > drafts)
        return queries, next(size for size in self._capture_sizes[queries] if size >= len(step.rows))

    def _make_static_inputs(self, queries: int, size: int) -> StepInputs:
        lines = size * queries
        start = (self._arange[: size + 1] * queries).int()
        batches = [
            AttentionBatch(
                query_start_loc=start,
                seq_lens=self._seq_lens[:size],
                block_table=blocks[:size],
                num_reqs=size,
                num_tokens=lines,
                max_query_len=queries,
                max_seq_len=self._table.max_model_len,
                num_decodes=size,
                decode_query_len=queries,
            )
            for blocks in self._block_tables
        ]
        rows, drafts = self._rows_and_drafts[:, :size]
        return StepInputs(
            rows=rows,
            input_ids=self._input_ids[:lines],
            positions=self._positions[:lines],
            seq_lens=self._seq_lens[:size],
            query_start_loc=start,
            slot_mapping=[slots[:lines] for slots in self._slot_mapping],
            batches=batches,
            logits_table_rows=rows if queries == 1 else self._logits_table_rows[:lines],
            logits_positions=self._seq_lens[:size] if queries == 1 else self._logits_positions[:lines],
            logits_indices=self._arange[:lines],
            draft_spans=DraftSpans(rows, self._arange[:size] * queries, drafts, queries),
        )

    def _launch_model(self, inputs: StepInputs) -> Tensor:
        from quire.core.ops.kernels.decode_inputs_kernel import launch_decode_inputs

        table, last, queries = self._table, len(inputs.batches) - 1, inputs.draft_spans.max_len
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
                advance=group == last and queries == 1,
            )
            key = GraphKey("decode" if queries == 1 else "verify", batch.num_tokens, batch.num_reqs)
            self._backends[group].prepare_metadata(batch, key)
        if queries > 1:
            inputs.logits_table_rows.view(-1, queries).copy_(inputs.rows[:, None])
            torch.add(inputs.positions, 1, out=inputs.logits_positions)
        context = ForwardContext(self._backends, inputs.slot_mapping, self._kv_cache.layers, self._kv_cache.group_of)
        return self._model.compute_logits(self._model(inputs.input_ids, inputs.positions, context))

    def _launch_sampling(self, variant: str, inputs: StepInputs, logits: Tensor) -> Tensor:
        table, greedy, spans = self._table, variant == "greedy", inputs.draft_spans
        if spans.max_len > 1:
            if self._sampler is None:
                tokens = logits.argmax(-1).int()
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
        tokens.copy_(logits.argmax(-1))
        table.append_tokens(inputs.rows, tokens)
        table.num_tokens[table.padding_row :].zero_()
        return tokens
