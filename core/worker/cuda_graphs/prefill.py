"""Steps that hold prompt tokens as CUDA graphs: the model alone, over inputs copied into padded buffers.

Launching a step from Python takes 12 ms for 30 layers, 25 to 45 on a slow host, whatever its size; in 20 ms an H200
computes some 14 TFLOP. Steps that compute less than that are replayed, and somewhat larger ones where little of them
would be padding. Their inputs are built like any step's and then copied into static buffers: the decodes, padded to
one of a few counts, then the tokens of prompts, padded likewise. Padding belongs to the padding block; whatever it
computes is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from quire.core.contracts.attention import AttentionBackend, AttentionBatch, GraphKey
from quire.core.contracts.model import ForwardContext, Model
from quire.core.worker.adapter_runner import AdapterRunner
from quire.core.worker.cuda_graphs.capture import GraphCapturer
from quire.core.worker.input_builder import StepInputs
from quire.core.worker.kv_cache import KVCache
from quire.core.worker.pipeline import PipelineRunner
from quire.core.worker.request_table import RequestTable

__all__ = ["PrefillGraphs", "PrefillShapes"]


@dataclass(frozen=True, slots=True)
class PrefillShapes:
    """Which shapes are captured, and when padding to one is worth it. Measured on an H200 with a model of 30 layers."""

    eager_above_flop: float = 1.6e13
    """Floating-point operations of a step above which launching it may take less time than computing it, so that
    padding costs time."""
    never_capture_above_flop: float = 2.5e13
    """Operations above which every host launches a step sooner than the device computes it."""
    max_padding: float = 17 / 16
    """Of a step above ``eager_above_flop``: the most tokens, padding included, for each that is real."""
    max_prompts: int = 16
    """The most requests of a captured step that are not decodes."""
    num_prompt_tokens: Sequence[int] = (64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096)
    num_decodes: Sequence[int] = (0, 32)
    """Beside ``num_prompt_tokens``; and as many as there may be requests."""
    large_num_prompt_tokens: Sequence[int] = range(128, 2049, 128)
    """Of steps above ``eager_above_flop``."""
    large_num_decodes: Sequence[int] = (0, 16, 48, 96)
    """Beside ``large_num_prompt_tokens``; with more decodes the step is launched. cuBLAS takes 11 % longer for 1,056
    tokens than for 1,024, for 1,040 4 %, for 1,072 9 %."""


@dataclass(slots=True)
class _PrefillShape:
    """Views of the static buffers for so many decodes and prompt tokens, and the graphs once they are captured."""

    num_decodes: int
    num_prompt_tokens: int
    num_tokens: int  # of both
    input_ids: Tensor  # (num_tokens,)
    positions: Tensor  # (num_tokens,)
    slot_mapping: list[Tensor]  # by group: (num_tokens,)
    batches: list[AttentionBatch]  # by group: num_decodes + max_prompts requests
    graphs: dict[int, torch.cuda.CUDAGraph] = field(default_factory=dict)  # by slots of adapters; 0 without any


class PrefillGraphs:
    """Runs the model for the steps that ``can_run_step``. Without ``capture_graphs`` it runs the padded step as it is,
    which is slower and computes the same."""

    def __init__(
        self,
        model: Model,
        backends: list[AttentionBackend],
        kv_cache: KVCache,
        table: RequestTable,
        max_tokens: int,
        shapes: PrefillShapes = PrefillShapes(),
        adapters: AdapterRunner | None = None,
        pipeline: PipelineRunner | None = None,
    ) -> None:
        self._model = model
        self._adapters = adapters
        self._backends = backends
        self._kv_cache = kv_cache
        self._max_padding = shapes.max_padding
        self._max_prompts = shapes.max_prompts
        device, num_rows = table.device, table.num_rows
        flop_per_token = 2 * sum(p.numel() for p in model.parameters())  # a multiplication and an addition a weight
        # A stage is launched in a share of the time, and computes as much less: the limits are those of the whole.
        flop_per_token *= 1 if pipeline is None else pipeline.stage.size
        self._eager_above_tokens = int(shapes.eager_above_flop / flop_per_token)
        token_limit: float = min(max_tokens, self._eager_above_tokens)
        small = [tokens for tokens in shapes.num_prompt_tokens if tokens <= token_limit]
        token_limit = min(max_tokens, shapes.never_capture_above_flop / flop_per_token)
        large = [t for t in shapes.large_num_prompt_tokens if self._eager_above_tokens < t <= token_limit]
        counts = [(d, t) for t in small for d in (*shapes.num_decodes, num_rows) if d <= num_rows]
        counts += [(min(d, num_rows), t) for t in large for d in shapes.large_num_decodes]
        self._warm_up_tokens = {*small[:1], *small[-1:], *large[-1:]}
        max_padded_tokens = num_rows + max(self._warm_up_tokens, default=0)
        max_reqs = num_rows + self._max_prompts
        # One set of buffers serves every shape, each of which takes the front of them: no two graphs run at once.
        self._input_ids = torch.zeros(max_padded_tokens, dtype=torch.int32, device=device)
        self._positions = torch.zeros(max_padded_tokens, dtype=torch.int64, device=device)
        self._slot_mapping = [torch.zeros(max_padded_tokens, dtype=torch.int64, device=device) for _ in backends]
        self._seq_lens = torch.zeros(max_reqs, dtype=torch.int32, device=device)
        self._query_start_loc = torch.zeros(max_reqs + 1, dtype=torch.int32, device=device)
        self._block_tables = [blocks.new_zeros(max_reqs, blocks.shape[1]) for blocks in table.block_tables]
        self._arange = torch.arange(num_rows + 1, dtype=torch.int32, device=device)
        self._received = None if pipeline is None else pipeline.make_input_buffer(max_padded_tokens)
        self._hidden: Tensor | None = None  # (max_padded_tokens, hidden): what every graph writes
        # In ascending order of prompt tokens, then of decodes: ``_find_shape`` takes the first that is large enough.
        self._shapes = [self._make_shape(d, t, table.max_model_len) for d, t in dict.fromkeys(counts)]

    def can_run_step(self, inputs: StepInputs) -> bool:
        """Whether ``run_model`` can serve the step, and is worth its padding."""
        batch = inputs.batches[0]
        num_prompts = batch.num_reqs - batch.num_decodes
        shape = self._find_shape(batch) if 0 < num_prompts <= self._max_prompts else None
        return shape is not None and (
            shape.num_prompt_tokens <= self._eager_above_tokens
            or len(shape.positions) <= self._max_padding * batch.num_tokens
        )

    def run_model(self, inputs: StepInputs, received: Tensor | None = None) -> Tensor:
        """Hidden states (num_tokens, hidden), valid until the next call. ``received`` (num_tokens, hidden): what the
        stage before made of the tokens, if there is one."""
        batch = inputs.batches[0]
        num_decodes, num_prompt_tokens = batch.num_decodes, batch.num_tokens - batch.num_decodes
        shape = self._find_shape(batch)
        assert shape is not None, "can_run_step comes first"
        self._copy_inputs(inputs, shape)
        if received is not None and self._received is not None:
            _copy_padded(self._received[: shape.num_tokens], received, num_decodes, shape.num_decodes, 0)
        if self._adapters is not None:
            self._adapters.prepare_prefill(num_decodes, shape.num_decodes, shape.num_tokens)
        graph = shape.graphs.get(0 if self._adapters is None else self._adapters.num_named_slots)
        if graph is None:
            hidden = self._launch_model(shape)
        else:
            graph.replay()
            assert self._hidden is not None
            hidden = self._hidden
        # The padding between decodes and prompts goes, so that rows are the step's tokens again.
        if self._model.aux_hidden_states is not None:
            self._model.aux_hidden_states.move_tokens(num_decodes, shape.num_decodes, num_prompt_tokens)
        of_prompts = hidden[shape.num_decodes : shape.num_decodes + num_prompt_tokens]
        return of_prompts if num_decodes == 0 else torch.cat((hidden[:num_decodes], of_prompts))

    def warm_up(self) -> None:
        """Launch what the shapes launch, once, with padding alone: the smallest and largest of each kind, since
        kernels are chosen by the number of tokens where there are few of them."""
        for shape in self._shapes:
            if shape.num_prompt_tokens in self._warm_up_tokens:
                for _ in self._prepare_adapters(shape):
                    self._launch_model(shape)

    def capture_graphs(self, capturer: GraphCapturer, launch_first: bool = False) -> None:
        """Capture every shape, the largest first so that the others fit into its memory. ``launch_first``, for kernels
        that tune themselves or allocate something when they are first launched: launch each shape before."""
        for shape in sorted(self._shapes, key=lambda shape: -shape.num_tokens):
            for num_slots in self._prepare_adapters(shape):
                if self._hidden is None or launch_first:
                    hidden = self._launch_model(shape)
                    if self._hidden is None:
                        self._hidden = torch.empty_like(hidden)
                captured = capturer.capture_graph(partial(self._launch_into_hidden, shape))
                shape.graphs[num_slots] = captured.graph

    def _prepare_adapters(self, shape: _PrefillShape) -> Iterator[int]:
        """For how many slots of adapters the shape is captured: what is launched next is of a step with adapters in
        those, or at last, 0, of one without."""
        if self._adapters is not None:
            for num_slots in self._adapters.list_slot_counts(shape.num_tokens):
                self._adapters.prepare_padding(shape.num_tokens, num_slots)
                yield num_slots
            self._adapters.prepare_padding(shape.num_tokens, 0)
        yield 0

    def _launch_into_hidden(self, shape: _PrefillShape) -> None:
        # Graphs share their memory: a result that each kept for itself would be as much again for every shape.
        assert self._hidden is not None
        self._hidden[: shape.num_tokens].copy_(self._launch_model(shape))

    def _launch_model(self, shape: _PrefillShape) -> Tensor:
        key = GraphKey("mixed", shape.num_tokens, shape.num_decodes + self._max_prompts)
        for backend, batch in zip(self._backends, shape.batches, strict=True):
            backend.prepare_metadata(batch, key)
        context = ForwardContext(self._backends, shape.slot_mapping, self._kv_cache.layers, self._kv_cache.group_of)
        if self._received is not None:
            context.hidden_states = self._received[: shape.num_tokens]
        return self._model(shape.input_ids, shape.positions, context)

    def _find_shape(self, batch: AttentionBatch) -> _PrefillShape | None:
        """The smallest shape that holds the step."""
        num_decodes, num_prompt_tokens = batch.num_decodes, batch.num_tokens - batch.num_decodes
        for shape in self._shapes:
            if shape.num_prompt_tokens >= num_prompt_tokens and shape.num_decodes >= num_decodes:
                return shape
        return None

    def _copy_inputs(self, inputs: StepInputs, shape: _PrefillShape) -> None:
        """Copy a step's inputs into the buffers: decodes, padding decodes, prompts, padding tokens.

        A padding decode has one token, at position 0 in the padding block. Padding tokens behind the prompts belong to
        no request, and their slots are in the padding block; requests behind the prompts have no tokens.
        """
        batch = inputs.batches[0]
        num_decodes, padded_decodes = batch.num_decodes, shape.num_decodes
        num_padding = padded_decodes - num_decodes
        _copy_padded(shape.input_ids, inputs.input_ids, num_decodes, padded_decodes, 0)
        _copy_padded(shape.positions, inputs.positions, num_decodes, padded_decodes, 0)
        for static_slots, slots in zip(shape.slot_mapping, inputs.slot_mapping, strict=True):
            _copy_padded(static_slots, slots, num_decodes, padded_decodes, 0)
        query_start_loc, seq_lens = shape.batches[0].query_start_loc, shape.batches[0].seq_lens
        _copy_padded(seq_lens, inputs.seq_lens, num_decodes, padded_decodes, 1)
        # Decodes start one token apart; prompts are moved back by the padding; requests behind them are empty.
        query_start_loc[: padded_decodes + 1] = self._arange[: padded_decodes + 1]
        prompt_ends = inputs.query_start_loc[num_decodes + 1 :]
        end = padded_decodes + len(prompt_ends)
        query_start_loc[padded_decodes + 1 : end + 1] = prompt_ends + num_padding
        query_start_loc[end + 1 :] = batch.num_tokens + num_padding
        # Block tables of a step are as wide as its longest request: what is beyond that is never read.
        for static_batch, step_batch in zip(shape.batches, inputs.batches, strict=True):
            static_blocks, blocks = static_batch.block_table, step_batch.block_table
            width = blocks.shape[1]
            static_blocks[:num_decodes, :width] = blocks[:num_decodes]
            static_blocks[num_decodes:padded_decodes, :1] = 0
            static_blocks[padded_decodes:end, :width] = blocks[num_decodes:]

    def _make_shape(self, num_decodes: int, num_prompt_tokens: int, max_model_len: int) -> _PrefillShape:
        num_tokens, num_reqs = num_decodes + num_prompt_tokens, num_decodes + self._max_prompts
        return _PrefillShape(
            num_decodes=num_decodes,
            num_prompt_tokens=num_prompt_tokens,
            num_tokens=num_tokens,
            input_ids=self._input_ids[:num_tokens],
            positions=self._positions[:num_tokens],
            slot_mapping=[slots[:num_tokens] for slots in self._slot_mapping],
            batches=[
                AttentionBatch(
                    query_start_loc=self._query_start_loc[: num_reqs + 1],
                    seq_lens=self._seq_lens[:num_reqs],
                    block_table=blocks[:num_reqs],
                    num_reqs=num_reqs,
                    num_tokens=num_tokens,
                    max_query_len=num_prompt_tokens,
                    max_seq_len=max_model_len,
                    num_decodes=num_decodes,
                )
                for blocks in self._block_tables
            ],
        )


def _copy_padded(static: Tensor, values: Tensor, num_decodes: int, padded_decodes: int, padding: int) -> None:
    """Into ``static``: the first ``num_decodes`` of ``values``, ``padding`` up to ``padded_decodes``, the other values,
    and zeros."""
    num_others = len(values) - num_decodes
    static[:num_decodes] = values[:num_decodes]
    static[num_decodes:padded_decodes] = padding
    static[padded_decodes : padded_decodes + num_others] = values[num_decodes:]
    static[padded_decodes + num_others :] = 0
