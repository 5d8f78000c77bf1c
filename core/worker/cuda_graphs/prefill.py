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
from quire.core.worker.cuda_graphs.capture import Recorder
from quire.core.worker.input_builder import StepInputs
from quire.core.worker.kv_cache import KVCache
from quire.core.worker.request_table import RequestTable

__all__ = ["MixedGraphs"]

_WORTH = 1.6e13
"""Operations above which a step may be launched sooner than computed, and padding costs."""
_MOST = 2.5e13
"""And above which every host launches sooner."""
_TOKENS = (64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096)
_DECODES = (0, 32)
"""And as many as there may be requests."""
_LARGE_TOKENS = range(128, 2049, 128)
_LARGE_DECODES = (0, 16, 48, 96)
"""Of steps that compute more than ``_WORTH``; beside more decodes they are launched. cuBLAS takes 11 % longer for 1,056
lines than for 1,024, for 1,040 4 %, for 1,072 9 %."""
_PADDED = 17 / 16
"""Lines of such a step, padding included, for each that is real: at most."""
_PROMPTS = 16


@dataclass(slots=True)
class _Shape:
    """So many decodes and tokens of prompts: views of the buffers, and the graph once it is captured."""

    decodes: int
    tokens: int
    input_ids: Tensor  # (decodes + tokens,)
    positions: Tensor
    slots: list[Tensor]  # by group
    batches: list[AttentionBatch]  # by group: decodes + _PROMPTS requests
    graph: torch.cuda.CUDAGraph | None = None


class MixedGraphs:
    """``forward`` is the model's, for the steps that it ``covers``. Without ``capture`` it runs the padded step as it
    is, which is slower and the same."""

    def __init__(
        self, model: Model, backends: list[AttentionBackend], kv: KVCache, table: RequestTable, max_tokens: int
    ) -> None:
        self._model = model
        self._backends = backends
        self._kv = kv
        device, rows = table.device, table.num_rows
        size = 2 * sum(p.numel() for p in model.parameters())
        self._worth = int(_WORTH / size)
        tokens = [count for count in _TOKENS if count <= min(max_tokens, self._worth)]
        large = [t for t in _LARGE_TOKENS if self._worth < t <= min(max_tokens, _MOST / size)]
        counts = [(d, t) for t in tokens for d in (*_DECODES, rows) if d <= rows]
        counts += [(min(d, rows), t) for t in large for d in _LARGE_DECODES]
        self._ends = {*tokens[:1], *tokens[-1:], *large[-1:]}
        lines, requests = rows + max(self._ends, default=0), rows + _PROMPTS
        self._input_ids = torch.zeros(lines, dtype=torch.int32, device=device)
        self._positions = torch.zeros(lines, dtype=torch.int64, device=device)
        self._slots = [torch.zeros(lines, dtype=torch.int64, device=device) for _ in backends]
        self._seq_lens = torch.zeros(requests, dtype=torch.int32, device=device)
        self._start = torch.zeros(requests + 1, dtype=torch.int32, device=device)
        self._blocks = [blocks.new_zeros(requests, blocks.shape[1]) for blocks in table.block_tables]
        self._count = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._hidden: Tensor | None = None  # (lines, hidden): what graphs write
        self._shapes = [self._shape(d, t, table.max_model_len) for d, t in dict.fromkeys(counts)]

    def covers(self, inputs: StepInputs) -> bool:
        """Whether ``forward`` can serve the step, and should."""
        batch = inputs.batches[0]
        shape = self._holder(batch) if 0 < batch.num_reqs - batch.num_decodes <= _PROMPTS else None
        return shape is not None and (shape.tokens <= self._worth or len(shape.positions) <= _PADDED * batch.num_tokens)

    def forward(self, inputs: StepInputs) -> Tensor:
        """Hidden states (num_tokens, hidden), valid until the next call."""
        batch = inputs.batches[0]
        decodes, tokens = batch.num_decodes, batch.num_tokens - batch.num_decodes
        shape = self._holder(batch)
        assert shape is not None, "covers comes first"
        self._lay(inputs, shape)
        if shape.graph is None:
            hidden = self._forward(shape)
        else:
            shape.graph.replay()
            assert self._hidden is not None
            hidden = self._hidden
        if self._model.aux_hidden_states is not None:
            self._model.aux_hidden_states.move_tokens(decodes, shape.decodes, tokens)
        prompts = hidden[shape.decodes : shape.decodes + tokens]
        return prompts if decodes == 0 else torch.cat((hidden[:decodes], prompts))

    def rehearse(self) -> None:
        """Launch what the shapes launch, once and with nothing at stake: the smallest and largest of each kind, since
        kernels are chosen by the number of lines where there are few of them."""
        for shape in self._shapes:
            if shape.tokens in self._ends:
                self._forward(shape)

    def capture(self, recorder: Recorder, launch_first: bool = False) -> None:
        """Record every shape, the largest first so that the others fit into its memory. ``launch_first``, for kernels
        that tune themselves or make something when they are first launched."""
        for shape in sorted(self._shapes, key=lambda s: -len(s.positions)):
            if self._hidden is None or launch_first:
                hidden = self._forward(shape)
                if self._hidden is None:
                    self._hidden = torch.empty_like(hidden)
            shape.graph, _ = recorder.record(partial(self._write, shape))

    def _write(self, shape: _Shape) -> None:
        assert self._hidden is not None
        self._hidden[: len(shape.positions)].copy_(self._forward(shape))

    def _forward(self, shape: _Shape) -> Tensor:
        key = GraphKey("mixed", len(shape.positions), shape.decodes + _PROMPTS)
        for backend, batch in zip(self._backends, shape.batches, strict=True):
            backend.prepare_metadata(batch, key)
        context = ForwardContext(self._backends, shape.slots, self._kv.layers, self._kv.group_of)
        return self._model(shape.input_ids, shape.positions, context)

    def _holder(self, batch: AttentionBatch) -> _Shape | None:
        """The smallest shape with room for the step."""
        decodes, tokens = batch.num_decodes, batch.num_tokens - batch.num_decodes
        return next((s for s in self._shapes if s.tokens >= tokens and s.decodes >= decodes), None)

    def _lay(self, inputs: StepInputs, shape: _Shape) -> None:
        batch = inputs.batches[0]
        now, later = batch.num_decodes, shape.decodes
        ahead = later - now
        _place(shape.input_ids, inputs.input_ids, now, later, 0)
        _place(shape.positions, inputs.positions, now, later, 0)
        for slots, built in zip(shape.slots, inputs.slot_mapping, strict=True):
            _place(slots, built, now, later, 0)
        start, seq_lens = shape.batches[0].query_start_loc, shape.batches[0].seq_lens
        _place(seq_lens, inputs.seq_lens, now, later, 1)
        start[: later + 1] = self._count[: later + 1]
        ends = inputs.query_start_loc[now + 1 :]
        start[later + 1 : later + 1 + len(ends)] = ends + ahead
        start[later + 1 + len(ends) :] = batch.num_tokens + ahead
        for blocks, own in zip((b.block_table for b in shape.batches), inputs.batches, strict=True):
            table = own.block_table
            blocks[:now, : table.shape[1]] = table[:now]
            blocks[now:later, :1] = 0
            blocks[later : later + len(ends), : table.shape[1]] = table[now:]

    def _shape(self, decodes: int, tokens: int, max_model_len: int) -> _Shape:
        lines, requests = decodes + tokens, decodes + _PROMPTS
        return _Shape(
            decodes=decodes,
            tokens=tokens,
            input_ids=self._input_ids[:lines],
            positions=self._positions[:lines],
            slots=[slots[:lines] for slots in self._slots],
            batches=[
                AttentionBatch(
                    query_start_loc=self._start[: requests + 1],
                    seq_lens=self._seq_lens[:requests],
                    block_table=blocks[:requests],
                    num_reqs=requests,
                    num_tokens=lines,
                    max_query_len=tokens,
                    max_seq_len=max_model_len,
                    num_decodes=decodes,
                )
                for blocks in self._blocks
            ],
        )


def _place(out: Tensor, built: Tensor, now: int, later: int, padding: int) -> None:
    """``built``'s first ``now`` values, padding up to ``later``, its other values, and zeros."""
    rest = len(built) - now
    out[:now] = built[:now]
    out[now:later] = padding
    out[later : later + rest] = built[now:]
    out[later + rest :] = 0
