"""Steps that hold prompt tokens as CUDA graphs: the model alone, over inputs laid out with padding.

Launching a step from Python takes 12 ms for 30 layers, 25 to 45 on a slow host, whatever its size; in 20 ms an H200
computes some 14 TFLOP. Steps that compute less than that are replayed, and somewhat larger ones where little of them
would be padding. Their inputs are built like any step's and then laid into buffers that stay: the decodes, padded to
one of a few counts, then the tokens of prompts, padded likewise. Padding belongs to the padding block; whatever it
computes is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quire.core.contracts.attention import AttentionBackend, AttentionBatch, GraphKey
from quire.core.contracts.model import ForwardContext, Model
from quire.core.worker.cuda_graphs.capture import GraphCapturer
from quire.core.worker.input_builder import StepInputs
from quire.core.worker.kv_cache import KVCache
from quire.core.worker.request_table import RequestTable

__all__ = ["PrefillGraphs"]

_EAGER_ABOVE_FLOP = 1.6e13
"""Operations above which a step may be launched sooner than computed, and padding costs."""
_NEVER_CAPTURE_ABOVE_FLOP = 2.5e13
"""And above which every host launches sooner."""
_PROMPT_TOKENS = (64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096)
_DECODES = (0, 32)
"""And as many as there may be requests."""
_LARGE_PROMPT_TOKENS = range(128, 2049, 128)
_LARGE_DECODES = (0, 16, 48, 96)
"""Of steps that compute more than ``_EAGER_ABOVE_FLOP``; beside more decodes they are launched. cuBLAS takes
11 % longer for 1,056 lines than for 1,024, for 1,040 4 %, for 1,072 9 %."""
_MAX_PADDING = 17 / 16
"""Lines of such a step, padding included, for each that is real: at most."""
_MAX_PROMPTS = 16


@dataclass(slots=True)
class _PrefillShape:
    """So many decodes and tokens of prompts: views of the buffers, and the graph once it is captured."""

    num_decodes: int
    num_prompt_tokens: int
    input_ids: Tensor  # (decodes + tokens,)
    positions: Tensor
    slot_mapping: list[Tensor]  # by group
    batches: list[AttentionBatch]  # by group: decodes + _MAX_PROMPTS requests
    graph: torch.cuda.CUDAGraph | None = None


class PrefillGraphs:
    """``run_model`` is the model's forward pass, for steps that ``can_run_step``. Without ``capture_graphs`` it runs
    the padded step as it is, which is slower and the same."""

    def __init__(
        self, model: Model, backends: list[AttentionBackend], kv_cache: KVCache, table: RequestTable, max_tokens: int
    ) -> None:
        self._model = model
        self._backends = backends
        self._kv_cache = kv_cache
        device, rows = table.device, table.num_rows
        size = 2 * sum(p.numel() for p in model.parameters())
        self._eager_above_tokens = int(_EAGER_ABOVE_FLOP / size)
        tokens = [count for count in _PROMPT_TOKENS if count <= min(max_tokens, self._eager_above_tokens)]
        large = [
            t
            for t in _LARGE_PROMPT_TOKENS
            if self._eager_above_tokens < t <= min(max_tokens, _NEVER_CAPTURE_ABOVE_FLOP / size)
        ]
        counts = [(d, t) for t in tokens for d in (*_DECODES, rows) if d <= rows]
        counts += [(min(d, rows), t) for t in large for d in _LARGE_DECODES]
        self._warm_up_tokens = {*tokens[:1], *tokens[-1:], *large[-1:]}
        lines, requests = rows + max(self._warm_up_tokens, default=0), rows + _MAX_PROMPTS
        self._input_ids = torch.zeros(lines, dtype=torch.int32, device=device)
        self._positions = torch.zeros(lines, dtype=torch.int64, device=device)
        self._slot_mapping = [torch.zeros(lines, dtype=torch.int64, device=device) for _ in backends]
        self._seq_lens = torch.zeros(requests, dtype=torch.int32, device=device)
        self._query_start_loc = torch.zeros(requests + 1, dtype=torch.int32, device=device)
        self._block_tables = [blocks.new_zeros(requests, blocks.shape[1]) for blocks in table.block_tables]
        self._arange = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._hidden: Tensor | None = None  # (lines, hidden): what graphs write
        self._shapes = [self._make_shape(d, t, table.max_model_len) for d, t in dict.fromkeys(counts)]

    def can_run_step(self, inputs: StepInputs) -> bool:
        """Whether ``run_model`` can serve the step, and should."""
        batch = inputs.batches[0]
        shape = self._find_shape(batch) if 0 < batch.num_reqs - batch.num_decodes <= _MAX_PROMPTS else None
        return shape is not None and (
            shape.num_prompt_tokens <= self._eager_above_tokens
            or len(shape.positions) <= _MAX_PADDING * batch.num_tokens
        )

    def run_model(self, inputs: StepInputs) -> Tensor:
        """Hidden states (num_tokens, hidden), valid until the next call."""
        batch = inputs.batches[0]
        decodes, tokens = batch.num_decodes, batch.num_tokens - batch.num_decodes
        shape = self._find_shape(batch)
        assert shape is not None, "can_run_step comes first"
        self._copy_inputs(inputs, shape)
        if shape.graph is None:
            hidden = self._launch_model(shape)
        else:
            shape.graph.replay()
            assert self._hidden is not None
            hidden = self._hidden
        if self._model.aux_hidden_states is not None:
            self._model.aux_hidden_states.move_tokens(decodes, shape.num_decodes, tokens)
        prompts = hidden[shape.num_decodes : shape.num_decodes + tokens]
        return prompts if decodes == 0 else torch.cat((hidden[:decodes], prompts))

    def warm_up(self) -> None:
        """Launch what the shapes launch, once and with nothing at stake: the smallest and largest of each kind, since
        kernels are chosen by the number of lines where there are few of them."""
        for shape in self._shapes:
            if shape.num_prompt_tokens in self._warm_up_tokens:
                self._launch_model(shape)

    def capture_graphs(self, recorder: GraphCapturer, launch_first: bool = False) -> None:
        """Record every shape, the largest first so that the others fit into its memory. ``launch_first``, for kernels
        that tune themselves or make something when they are first launched."""
        for shape in sorted(self._shapes, key=lambda s: -len(s.positions)):
            if self._hidden is None or launch_first:
                hidden = self._launch_model(shape)
                if self._hidden is None:
                    self._hidden = torch.empty_like(hidden)
            shape.graph, _ = recorder.capture_graph(partial(self._launch_into_hidden, shape))

    def _launch_into_hidden(self, shape: _PrefillShape) -> None:
        assert self._hidden is not None
        self._hidden[: len(shape.positions)].copy_(self._launch_model(shape))

    def _launch_model(self, shape: _PrefillShape) -> Tensor:
        key = GraphKey("mixed", len(shape.positions), shape.num_decodes + _MAX_PROMPTS)
        for backend, batch in zip(self._backends, shape.batches, strict=True):
            backend.prepare_metadata(batch, key)
        context = ForwardContext(self._backends, shape.slot_mapping, self._kv_cache.layers, self._kv_cache.group_of)
        return self._model(shape.input_ids, shape.positions, context)

    def _find_shape(self, batch: AttentionBatch) -> _PrefillShape | None:
        """The smallest shape with room for the step."""
        decodes, tokens = batch.num_decodes, batch.num_tokens - batch.num_decodes
        return next((s for s in self._shapes if s.num_prompt_tokens >= tokens and s.num_decodes >= decodes), None)

    def _copy_inputs(self, inputs: StepInputs, shape: _PrefillShape) -> None:
        batch = inputs.batches[0]
        now, later = batch.num_decodes, shape.num_decodes
        ahead = later - now
        _copy_padded(shape.input_ids, inputs.input_ids, now, later, 0)
        _copy_padded(shape.positions, inputs.positions, now, later, 0)
        for slots, built in zip(shape.slot_mapping, inputs.slot_mapping, strict=True):
            _copy_padded(slots, built, now, later, 0)
        start, seq_lens = shape.batches[0].query_start_loc, shape.batches[0].seq_lens
        _copy_padded(seq_lens, inputs.seq_lens, now, later, 1)
        start[: later + 1] = self._arange[: later + 1]
        ends = inputs.query_start_loc[now + 1 :]
        start[later + 1 : later + 1 + len(ends)] = ends + ahead
        start[later + 1 + len(ends) :] = batch.num_tokens + ahead
        for blocks, own in zip((b.block_table for b in shape.batches), inputs.batches, strict=True):
            table = own.block_table
            blocks[:now, : table.shape[1]] = table[:now]
            blocks[now:later, :1] = 0
            blocks[later : later + len(ends), : table.shape[1]] = table[now:]

    def _make_shape(self, decodes: int, tokens: int, max_model_len: int) -> _PrefillShape:
        lines, requests = decodes + tokens, decodes + _MAX_PROMPTS
        return _PrefillShape(
            num_decodes=decodes,
            num_prompt_tokens=tokens,
            input_ids=self._input_ids[:lines],
            positions=self._positions[:lines],
            slot_mapping=[slots[:lines] for slots in self._slot_mapping],
            batches=[
                AttentionBatch(
                    query_start_loc=self._query_start_loc[: requests + 1],
                    seq_lens=self._seq_lens[:requests],
                    block_table=blocks[:requests],
                    num_reqs=requests,
                    num_tokens=lines,
                    max_query_len=tokens,
                    max_seq_len=max_model_len,
                    num_decodes=decodes,
                )
                for blocks in self._block_tables
            ],
        )


def _copy_padded(out: Tensor, built: Tensor, now: int, later: int, padding: int) -> None:
    """``built``'s first ``now`` values, padding up to ``later``, its other values, and zeros."""
    rest = len(built) - now
    out[:now] = built[:now]
    out[now:later] = padding
    out[later : later + rest] = built[now:]
    out[later + rest :] = 0
