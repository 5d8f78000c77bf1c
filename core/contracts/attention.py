"""Attention backend: computes attention of a step's queries over the paged KV cache.

One instance serves one group: the layers whose ``AttentionSpec`` is equal. Its life: ``unsupported`` -> constructed ->
``kv_layout`` -> ``allocate_workspaces`` once -> in each step ``prepare_metadata`` once, then ``run`` once per layer.
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
"""Steps that a CUDA graph is captured for: one query per request, several queries per request (verification of drafts),
or decodes with chunks of prompts beside them."""


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What a layer needs of its backend. ``unsupported`` refuses, by name, what the backend does not know."""

    num_heads: int
    """Query heads on this rank."""
    num_kv_heads: int
    """KV heads on this rank; divides ``num_heads`` (grouped-query attention)."""
    qk_head_dim: int
    v_head_dim: int
    scale: float
    """Softmax scale: scores are ``scale * (q . k)``."""
    dtype: torch.dtype
    """Of queries and outputs."""
    kv_dtype: torch.dtype
    """Of the KV cache."""
    block_size: int
    """Tokens in a block of the KV cache."""
    kind: Literal["full", "sliding"] = "full"
    causal: bool = True
    window: int | None = None
    """Of kind ``sliding``: a query at position ``p`` sees keys ``p - window + 1 .. p``."""
    softcap: float | None = None
    """Scores become ``softcap * tanh(score / softcap)``."""
    sinks: bool = False
    """Attention sinks: a learnt logit per head that takes part in the softmax and has no value."""


@dataclass(frozen=True, slots=True)
class GraphKey:
    """A captured shape: every step with this key replays the same CUDA graph."""

    kind: GraphKind
    num_tokens: int
    """Padding included."""
    num_reqs: int
    """Padding included."""


@dataclass(frozen=True, slots=True)
class AttentionLimits:
    """Upper bounds of every step of an engine's life, for the size of workspaces."""

    max_num_reqs: int
    max_model_len: int
    """The longest ``seq_lens``, drafts included."""
    device: torch.device
    max_decode_query_len: int = 1
    """The largest ``AttentionBatch.decode_query_len``."""


@dataclass(slots=True)
class LayerKV:
    """One layer's KV cache. Dimensions are logical; strides are those of the backend's ``KVLayout``, so kernels that
    write keys and values go by the strides."""

    k: Tensor  # (num_blocks, num_kv_heads, block_size, qk_head_dim)
    v: Tensor  # (num_blocks, num_kv_heads, block_size, v_head_dim)
    k_scale: Tensor | None = None
    """One float32, on the device: a cache of one byte per element holds ``k / k_scale``. None for other caches."""
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
        elements = raw.view(s.kv_dtype)  # (num_blocks, elements per block)
        k_size = s.block_size * s.num_kv_heads * s.qk_head_dim
        return LayerKV(
            self._view_heads(elements[:, :k_size], s.qk_head_dim), self._view_heads(elements[:, k_size:], s.v_head_dim)
        )

    def _view_heads(self, flat: Tensor, head_dim: int) -> Tensor:
        s = self.spec
        # as_strided, not view: of a single block, view would choose another stride over blocks than of many, and
        # kernels are compiled for strides.
        head_stride, slot_stride = s.block_size * head_dim, head_dim
        if self.order == "slot":
            head_stride, slot_stride = head_dim, s.num_kv_heads * head_dim
        shape = (len(flat), s.num_kv_heads, s.block_size, head_dim)
        return flat.as_strided(shape, (flat.stride(0), head_stride, slot_stride, 1))


@dataclass(slots=True)
class AttentionBatch:
    """One step as one group sees it. Device tensors are exact; host integers are upper bounds, but for
    ``num_decodes`` and ``decode_query_len``, which are exact."""

    query_start_loc: Tensor  # (num_reqs + 1,) int32, device: where each request's tokens begin in the step
    seq_lens: Tensor  # (num_reqs,) int32, device: context length, the step's own tokens included
    block_table: Tensor  # (num_reqs, max_blocks) int32, device; block 0 is the null block, where padding is written
    num_reqs: int
    num_tokens: int
    """Tokens in the step, padding included."""
    max_query_len: int
    max_seq_len: int
    num_decodes: int
    """The first ``num_decodes`` requests have exactly ``decode_query_len`` query tokens each."""
    decode_query_len: int = 1
    """1, or 1 + k where k drafts of each request are verified: its queries are the last ``decode_query_len`` of its
    ``seq_lens`` tokens, under the causal mask. A captured step of these alone is of kind ``verify``."""


class AttentionBackend(ABC):
    """Reads K and V of every request through its block table and computes causal attention.

    What a backend may rely on: ``prepare_metadata`` is called before the ``run`` calls of its step; K and V of the
    step's tokens are written before ``run`` (unless ``writes_kv``); the ``num_decodes`` requests come first;
    ``seq_lens`` counts the step's own tokens; the tensors of a batch stay as they are until the step's last ``run``;
    all calls come from one thread.

    What a backend must keep: slots that belong to no token of a request, or lie before its window, may hold anything,
    NaN included, and change no result. ``prepare_metadata`` and ``run`` allocate nothing for a captured shape, and read
    no device tensor on the host unless ``graph_support`` is empty.
    """

    graph_support: frozenset[GraphKind] = frozenset()
    """Kinds of step that may be captured in a CUDA graph. Empty: every step runs eagerly."""
    batch_invariant: bool = False
    """Whether a query's result has the same bits whatever requests are beside its own, and however a prompt is cut."""
    writes_kv: bool = False
    """True: ``run`` writes K and V of the step's tokens itself. False: the fused RoPE operation has written them,
    through the strides of ``kv_layout``."""

    def __init__(self, spec: AttentionSpec, device: torch.device, options: Any = None) -> None:
        self.spec = spec
        self.device = device
        self.options = options
        """An instance of the class's ``Options`` dataclass, None without one."""

    @classmethod
    @abstractmethod
    def unsupported(cls, spec: AttentionSpec, device: torch.device) -> list[str]:
        """Reasons why this backend cannot serve ``spec`` on ``device``, each a noun phrase ("attention sinks"); an
        empty list means that it can. Called before anything is constructed; never raises for an unknown spec."""

    def kv_layout(self) -> KVLayout:
        """The memory layout that this backend reads fastest."""
        return KVLayout(self.spec)

    def allocate_workspaces(self, limits: AttentionLimits) -> None:
        """Allocate every workspace, for the largest step within ``limits``. Called once, before the first step and
        before the KV cache is sized: what is allocated here counts as used memory."""

    @abstractmethod
    def prepare_metadata(self, batch: AttentionBatch, key: GraphKey | None = None) -> None:
        """Prepare what every layer of the step shares. Called once per step.

        With a ``key`` the step is captured or replayed as a CUDA graph: only launches, into workspaces that stay.
        """

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
        """Compute attention for one layer of the step that was prepared last.

        ``q`` (num_tokens, num_heads, qk_head_dim) has dense heads; its tokens may be strided. ``out`` (num_tokens,
        num_heads, v_head_dim) is written for every token of a request; what it holds for padding is not read.
        ``lse_out`` (num_tokens, num_heads) float32 gets the log-sum-exp (natural logarithm) of each query's scores.
        ``k`` and ``v`` (num_tokens, num_kv_heads, head_dim) are given where ``writes_kv``, and only there.
        """
