"""Decode steps as CUDA graphs: inputs, model and logits in one, sampling in another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.core.contracts.attention import AttentionBackend, AttentionBatch, GraphKey
from quire.core.contracts.model import ForwardContext, Model
from quire.core.contracts.sampler import Sampler
from quire.core.messages import SchedulerOutput
from quire.core.sample.verify import Spans
from quire.core.worker.input_builder import StepInputs
from quire.core.worker.memory import KVCache
from quire.core.worker.pinned import upload
from quire.core.worker.recorder import Recorder
from quire.core.worker.request_table import RequestTable

__all__ = ["DecodeGraphs", "graph_sizes"]


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Padded batch sizes: fine steps where launches dominate, steps of 8 and 16 above."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, max_num_seqs + 1, 32)]
    return sorted({size for size in sizes if size < max_num_seqs} | {max_num_seqs})


@dataclass(slots=True)
class _Captured:
    inputs: StepInputs
    logits: Tensor  # (size, vocab)
    model: torch.cuda.CUDAGraph
    draws: dict[str, torch.cuda.CUDAGraph]  # by variant


class DecodeGraphs:
    """Every step in which each request has one token runs as a replay of the smallest captured size that holds it.

    Padding requests point at the table's last row, which owns the padding block alone. There are two variants of
    sampling, both writing the same tokens: ``greedy``, and ``random`` for any mix of greedy and random requests, where
    a ``sampler`` is given that draws from the table by itself.
    """

    def __init__(
        self,
        model: Model,
        backends: list[AttentionBackend],
        kv: KVCache,
        table: RequestTable,
        block_size: int,
        sampler: Sampler | None = None,
    ) -> None:
        self._model = model
        self._backends = backends
        self._kv = kv
        self._table = table
        self._block_size = block_size
        self._sampler = sampler
        self._variants = ["greedy"] if sampler is None else ["greedy", "random"]
        self._sizes = graph_sizes(table.num_rows)
        most = self._sizes[-1]
        device = table.device
        self._rows = torch.full((most,), table.padding_row, dtype=torch.int64, device=device)
        self._tokens = torch.zeros(most, dtype=torch.int32, device=device)
        self._index = torch.arange(most, device=device)
        self._none = torch.zeros(most, dtype=torch.int64, device=device)
        self._start = torch.arange(most + 1, dtype=torch.int32, device=device)
        self._input_ids = torch.zeros(most, dtype=torch.int32, device=device)
        self._positions = torch.zeros(most, dtype=torch.int64, device=device)
        self._seq_lens = torch.zeros(most, dtype=torch.int32, device=device)
        self._slots = [torch.zeros(most, dtype=torch.int64, device=device) for _ in backends]
        self._blocks = [torch.zeros_like(blocks[:most]) for blocks in table.block_tables]
        self._captured: dict[int, _Captured] = {}
        self._last: NDArray[np.int32] | None = None

    def covers(self, step: SchedulerOutput) -> bool:
        """Whether ``run`` can serve the step."""
        return step.num_decodes == len(step.rows) and bool(self._captured) and bool(step.samples.all())

    def rehearse(self) -> None:
        """Launch what every size launches, once and with nothing at stake."""
        for size in self._sizes:
            inputs = self._static_inputs(size)
            logits = self._forward(inputs)
            for variant in self._variants:
                self._draw(variant, inputs, logits)

    def capture(self, recorder: Recorder) -> None:
        """Record every size, the largest first so that the others fit into its memory."""
        for size in reversed(self._sizes):
            inputs = self._static_inputs(size)
            logits = self._forward(inputs)  # compiles and warms up
            for variant in self._variants:
                self._draw(variant, inputs, logits)
            torch.cuda.synchronize()
            model, logits = recorder.record(partial(self._forward, inputs))
            draws = {v: recorder.record(partial(self._draw, v, inputs, logits))[0] for v in self._variants}
            self._captured[size] = _Captured(inputs, logits, model, draws)

    def forward(self, step: SchedulerOutput) -> tuple[StepInputs, Tensor]:
        """Run the model for a step: its inputs, of the padded size, and the logits of its requests alone."""
        count = len(step.rows)
        size = next(s for s in self._sizes if s >= count)
        if self._last is None or not np.array_equal(self._last, step.rows):
            padded = np.full(size, self._table.padding_row, dtype=np.int64)
            padded[:count] = step.rows
            self._rows[:size] = upload(padded, torch.int64, self._rows.device)
            self._last = step.rows.copy()
        captured = self._captured[size]
        captured.model.replay()
        return self._of(captured.inputs, count), captured.logits[:count]

    def draw(self, step: SchedulerOutput, variant: Literal["greedy", "random"]) -> Tensor:
        """Draw the token of every request and feed it back; (num_reqs,) int32, valid until the next step."""
        size = next(s for s in self._sizes if s >= len(step.rows))
        self._captured[size].draws[variant].replay()
        return self._tokens[: len(step.rows)]

    def _static_inputs(self, size: int) -> StepInputs:
        batches = [
            AttentionBatch(
                query_start_loc=self._start[: size + 1],
                seq_lens=self._seq_lens[:size],
                block_table=blocks[:size],
                num_reqs=size,
                num_tokens=size,
                max_query_len=1,
                max_seq_len=self._table.max_model_len,
                num_decodes=size,
            )
            for blocks in self._blocks
        ]
        return StepInputs(
            rows=self._rows[:size],
            input_ids=self._input_ids[:size],
            positions=self._positions[:size],
            seq_lens=self._seq_lens[:size],
            query_start_loc=self._start[: size + 1],
            slot_mapping=[slots[:size] for slots in self._slots],
            batches=batches,
            line_rows=self._rows[:size],
            line_lens=self._seq_lens[:size],
            logits_index=self._index[:size],
            spans=Spans(self._rows[:size], self._index[:size], self._none[:size], 1),
        )

    def _of(self, inputs: StepInputs, count: int) -> StepInputs:
        """Without the padding."""
        spans = Spans(inputs.rows[:count], self._index[:count], self._none[:count], 1)
        return replace(inputs, line_rows=inputs.rows[:count], line_lens=inputs.seq_lens[:count], spans=spans)

    def _forward(self, inputs: StepInputs) -> Tensor:
        from quire.core.ops.kernels.decode_inputs import decode_inputs

        table, last = self._table, len(inputs.batches) - 1
        for group, batch in enumerate(inputs.batches):
            decode_inputs(
                inputs.rows,
                table.token_ids,
                table.num_computed,
                table.block_tables[group],
                inputs.input_ids,
                inputs.positions,
                inputs.seq_lens,
                inputs.slot_mapping[group],
                batch.block_table,
                self._block_size,
                advance=group == last,
            )
            key = GraphKey("decode", batch.num_tokens, batch.num_reqs, 1)
            self._backends[group].plan(batch, key)
        context = ForwardContext(self._backends, inputs.slot_mapping, self._kv.layers, self._kv.group_of)
        return self._model.compute_logits(self._model(inputs.input_ids, inputs.positions, context))

    def _draw(self, variant: str, inputs: StepInputs, logits: Tensor) -> None:
        tokens = self._tokens[: len(logits)]
        if self._sampler is not None:
            self._sampler.draw(logits, inputs.rows, self._table.sampling, tokens, greedy=variant == "greedy")
            return
        tokens.copy_(logits.argmax(-1))
        self._table.append(inputs.rows, tokens)
        self._table.num_tokens[self._table.padding_row :].zero_()
