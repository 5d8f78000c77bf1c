"""The Triton attention backend: split-KV decode and FlashAttention prefill over any block table.

A step launches ``decode_work_list`` once, and in each layer ``decode`` for its first ``num_decodes`` requests and
``prefill`` (``hopper_prefill`` where that applies) for the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from quire.plugins.attention.triton.decode import launch_paged_decode
from quire.plugins.attention.triton.decode_work_list import DecodeWorkList
from quire.plugins.attention.triton.hopper_prefill import HopperPrefill
from quire.plugins.attention.triton.prefill import launch_prefill
from quire.sdk import (
    AttentionBackend,
    AttentionBatch,
    AttentionLimits,
    AttentionSpec,
    GraphKey,
    LayerKV,
)
from quire.sdk.ops import OLDEST_CAPABILITY, DeviceProfile

__all__ = ["TritonBackend"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class TritonBackend(AttentionBackend):
    """Paged attention in Triton. Grids depend on host bounds alone and lengths are read on the device."""

    graph_support = frozenset({"decode", "verify", "mixed"})

    @dataclass(frozen=True)
    class Options:
        """Options of the backend."""

        fixed_split_size: int = 0
        """Keys in each split of a decoding request; 0 chooses for each step. A fixed size makes a request's result the
        same bits whatever else is in the step."""

        def __post_init__(self) -> None:
            if self.fixed_split_size < 0 or self.fixed_split_size % 16:
                raise ValueError(f"fixed_split_size is a number of keys, a multiple of 16, got {self.fixed_split_size}")

    def __init__(self, spec: AttentionSpec, device: torch.device, options: Options | None = None) -> None:
        super().__init__(spec, device, options or self.Options())
        self._batch: AttentionBatch | None = None
        self._work_list: DecodeWorkList | None = None
        self._hopper_prefill = HopperPrefill.create_if_supported(spec, device)

    @classmethod
    def unsupported(cls, spec: AttentionSpec, device: torch.device) -> list[str]:
        """Full and sliding causal attention with GQA and soft-caps; heads of up to 256."""
        reasons = []
        interpreted = triton.knobs.runtime.interpret
        profile = DeviceProfile.detect(device)
        if device.type == "cpu" and not interpreted:
            reasons.append("a CPU (set TRITON_INTERPRET=1 to run kernels in the interpreter)")
        if profile.capability < OLDEST_CAPABILITY:
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
        if spec.kv_dtype == torch.float8_e4m3fn and not profile.has_fp8:
            reasons.append("a KV cache of float8_e4m3fn on a GPU older than compute capability 8.9")
        elif spec.kv_dtype != spec.dtype and spec.kv_dtype not in _FP8:
            reasons.append(f"a KV cache of {spec.kv_dtype} beside queries of {spec.dtype}")
        if spec.kv_dtype in _FP8 and (spec.qk_head_dim % 2 or spec.v_head_dim % 2):
            reasons.append("heads of an odd number of features in an FP8 KV cache")
        if max(spec.qk_head_dim, spec.v_head_dim) > 256:
            reasons.append(f"heads of {max(spec.qk_head_dim, spec.v_head_dim)} features (256 at most)")
        return reasons

    def allocate_workspaces(self, limits: AttentionLimits) -> None:
        """Allocate the work list of decodes and the partial results of split requests."""
        self._work_list = DecodeWorkList(self.spec, limits, self.options.fixed_split_size)

    def prepare_metadata(self, batch: AttentionBatch, key: GraphKey | None = None) -> None:
        """Keep the step's tensors, which the kernels read as they are, and build the work list: one launch where
        requests decode."""
        self._batch = batch
        if batch.num_decodes:
            assert self._work_list is not None, "allocate_workspaces comes first"
            self._work_list.build(batch)

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
        """One launch for the decodes, one for the others."""
        batch = self._batch
        assert batch is not None and self._work_list is not None, "prepare_metadata comes first"
        if batch.num_decodes:
            launch_paged_decode(self.spec, batch, self._work_list, q, kv, out, lse_out)
        if batch.num_reqs > batch.num_decodes:
            if self._hopper_prefill is None:
                launch_prefill(self.spec, batch, q, kv, out, lse_out)
            else:
                self._hopper_prefill.launch(batch, q, kv, out, lse_out)
