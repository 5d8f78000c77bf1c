"""One attention step in static tensors, which other steps of its shape are copied into: as CUDA graphs run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quire.core.contracts.attention import AttentionBackend, AttentionBatch, GraphKey, GraphKind, LayerKV
from quire.core.testing.attention_problem import AttentionProblem, make_backend, require_device
from quire.core.testing.capture_rules import assert_can_be_captured
from quire.core.worker.cuda_graphs.capture import GraphCapturer

__all__ = ["CapturedAttention"]

_MAX_SEQ_LEN = 256
"""What the host knows of lengths: a bound."""


class CapturedAttention:
    """A backend's step of the shape of ``problems``, which have equally many tokens and requests."""

    def __init__(self, cls: type[AttentionBackend], kind: GraphKind, problems: Sequence[AttentionProblem]) -> None:
        first = problems[0]
        self._device = device = require_device(cls, first.spec)
        self._backend = make_backend(cls, first.spec, device, first.decode_query_len)
        self._q = first.q.to(device).clone()
        self._out = torch.empty(*self._q.shape[:2], first.spec.v_head_dim, dtype=first.spec.dtype, device=device)
        num_blocks = max(int(problem.block_table.max()) for problem in problems) + 1
        layout = self._backend.kv_layout()
        raw = torch.zeros(num_blocks, layout.bytes_per_block, dtype=torch.uint8, device=device)
        self._kv: LayerKV = layout.view(raw)
        self._batch: AttentionBatch = first.make_batch(device)
        width = max(problem.block_table.shape[1] for problem in problems)
        self._batch.block_table = torch.zeros(len(first.requests), width, dtype=torch.int32, device=device)
        self._batch.max_seq_len = _MAX_SEQ_LEN
        self._batch.max_query_len = first.decode_query_len if kind != "mixed" else self._batch.num_tokens
        self._key = GraphKey(kind, self._batch.num_tokens, self._batch.num_reqs)
        self._step_kv = {name: x.clone() for name, x in first.step_kv(self._backend, device).items()}
        self._copy(first)
        self._launch()  # loads kernels, which cannot happen in a capture
        self._replay: Callable[[], None] = self._launch
        if device.type == "cuda":
            self._replay = GraphCapturer().capture_graph(self._launch).graph.replay

    def solve(self, problem: AttentionProblem) -> Tensor:
        """(num_tokens, num_heads, v_head_dim) of ``problem``, on the CPU."""
        self._copy(problem)
        self._out.fill_(float("nan"))
        self._replay()
        return self._out.cpu()

    def assert_can_be_captured(self) -> None:
        """On a CPU, where nothing was; as ``capture_rules``."""
        if self._device.type == "cpu":
            assert_can_be_captured(self._launch)

    def _launch(self) -> None:
        self._backend.prepare_metadata(self._batch, self._key)
        self._backend.run(0, self._q, self._kv, self._out, **self._step_kv)

    def _copy(self, problem: AttentionProblem) -> None:
        batch = problem.make_batch(self._device)
        self._batch.query_start_loc.copy_(batch.query_start_loc)
        self._batch.seq_lens.copy_(batch.seq_lens)
        self._batch.block_table.zero_()
        self._batch.block_table[:, : batch.block_table.shape[1]] = batch.block_table
        self._q.copy_(problem.q)
        kv = problem.make_kv_cache(self._backend, self._device)
        self._kv.k[: len(kv.k)] = kv.k
        self._kv.v[: len(kv.v)] = kv.v
        for name, x in problem.step_kv(self._backend, self._device).items():
            self._step_kv[name].copy_(x)
