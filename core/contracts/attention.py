"""Attention backend: how queries meet the paged KV cache.

One instance serves one group of layers with the same KV geometry. Life: ``unsupported`` -> constructed ->
``kv_layout`` -> ``allocate_workspaces`` once -> per step ``prepare_metadata`` once, then ``run`` once a layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = [
    "AttentionBackend",
    "AttentionBatch",
    "AttentionLimits",
    "AttentionSpec",
    "GraphKey",
    "GraphKind",
    "KVLayout",
    "LayerKV",
]

GraphKind = Literal["decode", "verify", "mixed"]


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What a layer needs. Layers with equal specs form a group; a backend refuses by name what it does not know."""

    num_heads: int
    num_kv_heads: int
    qk_head_dim: int
    v_head_dim: int
    scale: float
    dtype: torch.dtype
    kv_dtype: torch.dtype
    block_size: int
    kind: Literal["full", "sliding"] = "full"
    causal: bool = True
    window: int | None = None
    """A query at position ``p`` sees keys ``p - window + 1 .. p``."""
    softcap: float | None = None
    sinks: bool = False


@dataclass(frozen=True, slots=True)
class GraphKey:
    """A captured shape: every step with this key replays the same graph."""

    kind: GraphKind
    num_tokens: int
    num_reqs: int


@dataclass(frozen=True, slots=True)
class AttentionLimits:
    """The largest step there will ever be; workspaces are sized for it."""

    max_num_reqs: int
    max_model_len: int
    device: torch.device
    max_decode_query_len: int = 1
    """The largest ``AttentionBatch.decode_query_len``."""


@dataclass(slots=True)
class LayerKV:
    """One layer's cache. Dimensions are logical; strides are the backend's layout, so write through them."""

    k: Tensor  # (num_blocks, num_kv_heads, block_size, qk_head_dim)
    v: Tensor  # (num_blocks, num_kv_heads, block_size, v_head_dim)
    k_scale: Tensor | None = None
    """One float32, device: a cache of one byte an element holds ``k / k_scale``. Given there, None elsewhere."""
    v_scale: Tensor | None = None


@dataclass(frozen=True, slots=True)
class KVLayout:
    """How one layer lies in a block of memory: K then V, each ``head`` (H, S, D) or ``slot`` (S, H, D) major."""

    spec: AttentionSpec
    order: Literal["head", "slot"] = "head"

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one layer in one block."""
        s = self.spec
        return s.block_size * s.num_kv_heads * (s.qk_head_dim + s.v_head_dim) * s.kv_dtype.itemsize

    def view(self, raw: Tensor) -> LayerKV:
        """Interpret ``raw`` uint8 (num_blocks, bytes_per_block), rows possibly strided, as a layer's K and V."""
        s = self.spec
        typed = raw.view(s.kv_dtype)  # (num_blocks, elements)
        split = s.block_size * s.num_kv_heads * s.qk_head_dim
        return LayerKV(self._part(typed[:, :split], s.qk_head_dim), self._part(typed[:, split:], s.v_head_dim))

    def _part(self, flat: Tensor, dim: int) -> Tensor:
        s = self.spec
        # A view's stride over one single block would be another than over many, and kernels are compiled for strides.
        head, slot = (s.block_size * dim, dim) if self.order == "head" else (dim, s.num_kv_heads * dim)
        return flat.as_strided((len(flat), s.num_kv_heads, s.block_size, dim), (flat.stride(0), head, slot, 1))


@dataclass(slots=True)
class AttentionBatch:
    """One step as one group sees it. Device tensors are exact; host integers are upper bounds."""

    query_start_loc: Tensor  # (num_reqs + 1,) int32, device
    seq_lens: Tensor  # (num_reqs,) int32, device: context length, the step's own tokens included
    block_table: Tensor  # (num_reqs, max_blocks) int32, device; block 0 is the padding sink
    num_reqs: int
    num_tokens: int
    """Tokens in the step, padding included."""
    max_query_len: int
    max_seq_len: int
    num_decodes: int
    """The first ``num_decodes`` requests have exactly ``decode_query_len`` query tokens each."""
    decode_query_len: int = 1
    """1, or 1 + k where k drafts of each request are verified: the last ``decode_query_len`` of its ``seq_lens``
    tokens, each seeing those before it. A captured step of these alone is of kind ``verify``."""


class AttentionBackend(ABC):
    """Reads K and V of any request through its block table and attends causally.

    Promised to a backend: ``prepare_metadata`` comes before the ``run`` calls of its step, K and V of the step's
    tokens are
    already written (unless ``writes_kv``), the ``num_decodes`` requests come first, and ``seq_lens`` counts the
    step's own tokens; its tensors stay as they are until the step's last ``run``.

    Promised by a backend: slots that belong to no token of a request, or lie before its window, may hold anything,
    NaN included, and change nothing. It never allocates in ``prepare_metadata`` or ``run`` for a captured shape,
    and reads no
    device tensor on the host unless its ``graph_support`` is empty.
    """

    graph_support: frozenset[GraphKind] = frozenset()
    """Kinds of step that may be captured in a CUDA graph. Empty: eager only."""
    writes_kv: bool = False
    """False: the fused RoPE operation writes K and V through ``kv_layout``'s strides."""

    def __init__(self, spec: AttentionSpec, device: torch.device, options: Any = None) -> None:
        self.spec = spec
        self.device = device
        self.options = options

    @classmethod
    @abstractmethod
    def unsupported(cls, spec: AttentionSpec, device: torch.device) -> list[str]:
        """Reasons why this backend cannot serve ``spec`` on ``device``; empty means it can."""

    def kv_layout(self) -> KVLayout:
        """The memory layout this backend reads fastest."""
        return KVLayout(self.spec)

    def allocate_workspaces(self, limits: AttentionLimits) -> None:
        """Allocate every workspace and compile every variant. Called once, before the first step."""

    @abstractmethod
    def prepare_metadata(self, batch: AttentionBatch, key: GraphKey | None = None) -> None:
        """Take in a step. Called once a step; with a ``key`` it writes only into prepared buffers."""

    @abstractmethod
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
        """Attend for one layer.

        ``q`` (num_tokens, num_heads, qk_head_dim) and ``out`` (num_tokens, num_heads, v_head_dim), ``out`` is written
        for every real token. ``lse_out`` (num_tokens, num_heads) float32 gets the log-sum-exp of the scaled scores.
        ``k`` and ``v`` are given only where ``writes_kv``.
        """
