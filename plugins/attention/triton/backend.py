"""The Triton backend: one kernel for prompts, one for decoding, over any block table."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from quire.core.contracts.attention import (
    AttentionBackend,
    AttentionBatch,
    AttentionLimits,
    AttentionSpec,
    GraphKey,
    LayerKV,
)
from quire.plugins.attention.triton.decode import decode, most_splits
from quire.plugins.attention.triton.prefill import prefill

__all__ = ["TritonBackend"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class TritonBackend(AttentionBackend):
    """Paged attention in Triton. Grids depend on host bounds alone and lengths are read on the device."""

    graph_support = frozenset({"decode"})

    def __init__(self, spec: AttentionSpec, device: torch.device, options: object = None) -> None:
        super().__init__(spec, device, options)
        self._batch: AttentionBatch | None = None
        self._parts = torch.empty(0)
        self._part_lse = torch.empty(0)

    @classmethod
    def unsupported(cls, spec: AttentionSpec, device: torch.device) -> list[str]:
        """Full and sliding causal attention with GQA and soft-caps; heads of up to 256."""
        reasons = []
        interpreted = triton.knobs.runtime.interpret
        if device.type == "cpu" and not interpreted:
            reasons.append("a CPU (set TRITON_INTERPRET=1 to run kernels in the interpreter)")
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            reasons.append("a GPU older than compute capability 8.0")
        if interpreted and torch.bfloat16 in (spec.dtype, spec.kv_dtype):
            reasons.append("bfloat16 in the interpreter, which computes it wrongly")
        if spec.kind not in ("full", "sliding"):
            reasons.append(f"attention of kind {spec.kind!r}")
        if not spec.causal:
            reasons.append("attention that is not causal")
        if spec.sinks:
            reasons.append("attention sinks")
        if spec.dtype not in _DTYPES:
            reasons.append(f"queries of {spec.dtype}")
        if spec.kv_dtype != spec.dtype:
            reasons.append(f"a KV cache of {spec.kv_dtype} beside queries of {spec.dtype}")
        if max(spec.qk_head_dim, spec.v_head_dim) > 256:
            reasons.append(f"heads of {max(spec.qk_head_dim, spec.v_head_dim)} features (256 at most)")
        return reasons

    def prepare(self, limits: AttentionLimits, graph_keys: Sequence[GraphKey] = ()) -> None:
        """Allocate what parts of split requests are written to."""
        spec, splits = self.spec, most_splits(self.spec, limits.max_model_len)
        shape = (limits.max_num_reqs, spec.num_kv_heads, splits, spec.num_heads // spec.num_kv_heads)
        self._parts = torch.empty(*shape, spec.v_head_dim, dtype=torch.float32, device=self.device)
        self._part_lse = torch.empty(shape, dtype=torch.float32, device=self.device)

    def plan(self, batch: AttentionBatch, key: GraphKey | None = None) -> None:
        """Keep the step's tensors: the kernels read them as they are."""
        self._batch = batch

    def run(
        self,
        layer: int,
        q: Tensor,
        kv: LayerKV,
        out: Tensor,
        *,
        lse_out: Tensor | None = None,
        k: Tensor | None = None,
        v: Tensor | None = None,
    ) -> None:
        """One launch for the decodes (two where a request may be split), one for the others."""
        batch = self._batch
        assert batch is not None, "plan comes first"
        if batch.num_decodes:
            decode(self.spec, batch, self._parts, self._part_lse, q, kv, out, lse_out)
        if batch.num_reqs > batch.num_decodes:
            prefill(self.spec, batch, q, kv, out, lse_out)
