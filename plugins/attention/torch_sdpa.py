"""The reference backend: PyTorch operations alone, on any device.

``prepare_metadata`` reads the step's lengths on the host, which on a GPU waits for the device: this backend is for
checking results, not for speed. Decodes of similar length are gathered and attended together, padded to the longest;
prompts are attended in chunks of queries, one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quire.sdk import AttentionBackend, AttentionBatch, AttentionSpec, GraphKey, KVLayout, LayerKV

__all__ = ["TorchSDPABackend"]

_MAX_GATHERED_ELEMENTS = 1 << 18
"""Elements of K gathered at once: a megabyte, so that a CPU attends to it before it leaves the cache."""
_QUERIES_PER_CHUNK = 256
"""Queries of a prompt attended at once: each chunk reads only the keys up to its last query."""
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class TorchSDPABackend(AttentionBackend):
    """Gathers blocks by block table, then calls scaled dot-product attention."""

    def __init__(self, spec: AttentionSpec, device: torch.device, options: object = None) -> None:
        super().__init__(spec, device, options)
        self._query_groups: list[_QueryGroup] = []
        self._gather_buffers = (torch.empty(0, device=device), torch.empty(0, device=device))

    @classmethod
    def unsupported(cls, spec: AttentionSpec, device: torch.device) -> list[str]:
        """Full and sliding causal attention, GQA and soft-caps, in any floating dtype."""
        reasons = []
        if spec.kind not in ("full", "sliding"):
            reasons.append(f"attention of kind {spec.kind!r}")
        if not spec.causal:
            reasons.append("attention that is not causal")
        if spec.sinks:
            reasons.append("attention sinks")
        if spec.kv_dtype.itemsize < 2 and spec.kv_dtype not in _FP8:
            reasons.append(f"a KV cache of {spec.kv_dtype}")
        return reasons

    def kv_layout(self) -> KVLayout:
        """Slot-major: a gathered request is a contiguous (tokens, heads, head_dim)."""
        return KVLayout(self.spec, "slot")

    def prepare_metadata(self, batch: AttentionBatch, key: GraphKey | None = None) -> None:
        """Build the gather indices and masks that every layer of the step shares."""
        starts = batch.query_start_loc[: batch.num_reqs + 1].tolist()
        seq_lens = batch.seq_lens[: batch.num_reqs].tolist()
        self._query_groups = []
        by_length = sorted(range(batch.num_decodes), key=lambda request: seq_lens[request])
        max_keys = _MAX_GATHERED_ELEMENTS // (self.spec.num_kv_heads * self.spec.qk_head_dim)
        for requests in _group_similar_lengths(by_length, seq_lens, max_keys):
            spans = [_QuerySpan(r, starts[r], batch.decode_query_len, seq_lens[r]) for r in requests]
            self._query_groups.append(self._make_query_group(batch, spans))
        for request in range(batch.num_decodes, batch.num_reqs):
            end = starts[request + 1]
            for start in range(starts[request], end, _QUERIES_PER_CHUNK):
                query_len = min(_QUERIES_PER_CHUNK, end - start)
                kv_len = seq_lens[request] - (end - start - query_len)
                self._query_groups.append(
                    self._make_query_group(batch, [_QuerySpan(request, start, query_len, kv_len)])
                )
        self._grow_gather_buffers()

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
        """Attend to one group of queries after the other."""
        k_buffer, v_buffer = self._gather_buffers
        for group in self._query_groups:
            # (spans, num_kv_heads, keys, head_dim)
            keys = _gather_kv(kv.k, kv.k_scale, group, k_buffer).to(group.mask.dtype)
            values = _gather_kv(kv.v, kv.v_scale, group, v_buffer).to(group.mask.dtype)
            # (spans, num_kv_heads, group_size * query_len, head_dim)
            queries = _pack_gqa_heads(q[group.tokens].to(group.mask.dtype), group, self.spec)
            if self.spec.softcap is None and lse_out is None:
                result = F.scaled_dot_product_attention(queries, keys, values, group.mask, scale=self.spec.scale)
            else:
                result, lse = _compute_attention(queries, keys, values, group.mask, self.spec)
                if lse_out is not None:
                    lse_out[group.tokens] = _unpack_gqa_heads(lse.unsqueeze(-1), group, self.spec).squeeze(-1)
            out[group.tokens] = _unpack_gqa_heads(result, group, self.spec).to(out.dtype)

    def _make_query_group(self, batch: AttentionBatch, spans: list[_QuerySpan]) -> _QueryGroup:
        """``spans`` have equal ``query_len``; their keys are padded to the longest."""
        block_size, window, query_len = self.spec.block_size, self.spec.window, spans[0].query_len
        # Blocks wholly before every query's window are left out.
        first_blocks = [
            0 if window is None else max(0, span.kv_len - query_len - window + 1) // block_size for span in spans
        ]
        num_blocks = max(-(-span.kv_len // block_size) - first for span, first in zip(spans, first_blocks, strict=True))
        device = batch.seq_lens.device
        requests, starts, kv_lens, first_block = torch.tensor(
            [[s.request, s.start, s.kv_len, first] for s, first in zip(spans, first_blocks, strict=True)],
            device=device,
        ).T.unsqueeze(-1)  # each (spans, 1)
        columns = (first_block + torch.arange(num_blocks, device=device)).clamp(max=batch.block_table.shape[1] - 1)
        blocks = batch.block_table[requests, columns].long()  # (spans, num_blocks)
        key_position = first_block * block_size + torch.arange(num_blocks * block_size, device=device)
        key_position = key_position.unsqueeze(1)  # (spans, 1, keys)
        query_position = (kv_lens - query_len + torch.arange(query_len, device=device)).unsqueeze(2)
        is_seen = key_position <= query_position  # (spans, query_len, keys)
        if window is not None:
            is_seen &= key_position > query_position - window
        group_size = self.spec.num_heads // self.spec.num_kv_heads
        packed = is_seen.repeat(1, group_size, 1).unsqueeze(1)  # (spans, 1, group_size * query_len, keys)
        # Keys of an FP8 cache times its scale may be more than a float16.
        dtype = torch.float32 if self.spec.kv_dtype in _FP8 else self.spec.dtype
        return _QueryGroup(
            tokens=(starts + torch.arange(query_len, device=device)).flatten(),
            blocks=blocks,
            unseen_keys=(~is_seen.any(1)).flatten().nonzero().flatten(),
            mask=torch.zeros_like(packed, dtype=dtype).masked_fill_(~packed, float("-inf")),
            num_spans=len(spans),
            query_len=query_len,
        )

    def _grow_gather_buffers(self) -> None:
        num_blocks = max((group.blocks.numel() for group in self._query_groups), default=0)
        num_slots, num_heads, dtype = num_blocks * self.spec.block_size, self.spec.num_kv_heads, self.spec.kv_dtype
        if num_slots > len(self._gather_buffers[0]):
            dtype = torch.uint8 if dtype in _FP8 else dtype  # FP8 is moved as bytes
            keys = torch.empty(num_slots, num_heads, self.spec.qk_head_dim, dtype=dtype, device=self.device)
            values = torch.empty(num_slots, num_heads, self.spec.v_head_dim, dtype=dtype, device=self.device)
            self._gather_buffers = (keys, values)


class _QuerySpan(NamedTuple):
    """Consecutive queries of one request."""

    request: int
    start: int
    """Token of the first query, in the step."""
    query_len: int
    kv_len: int
    """Context length at the last query."""


@dataclass(frozen=True, slots=True)
class _QueryGroup:
    """Spans that are attended together."""

    tokens: Tensor  # (spans * query_len,) int64, rows of q and out
    blocks: Tensor  # (spans, num_blocks) int64
    unseen_keys: Tensor  # int64 indices into (spans * keys) that no query sees: padding, or before the window
    mask: Tensor  # (spans, 1, group_size * query_len, keys), added to the scores
    num_spans: int
    query_len: int


def _group_similar_lengths(by_length: list[int], seq_lens: list[int], max_keys: int) -> list[list[int]]:
    """Cut requests, sorted by length, so that a group pads little and holds about ``max_keys`` keys."""
    groups: list[list[int]] = []
    for request in by_length:
        longest = seq_lens[request]
        if groups and longest <= seq_lens[groups[-1][0]] * 4 / 3 + 64 and (len(groups[-1]) + 1) * longest <= max_keys:
            groups[-1].append(request)
        else:
            groups.append([request])
    return groups


def _gather_kv(cache: Tensor, scale: Tensor | None, group: _QueryGroup, buffer: Tensor) -> Tensor:
    """(num_blocks, heads, block_size, dim) -> (spans, heads, keys, dim), in ``buffer`` (slots, heads, dim).

    Unseen keys are zeroed: what an unused slot holds (even NaN) must not reach the sums.
    """
    num_spans, num_blocks = group.blocks.shape
    block_size = cache.shape[2]
    flat = buffer[: num_spans * num_blocks * block_size]
    pages = flat.view(num_spans * num_blocks, block_size, *flat.shape[1:])
    torch.index_select(cache.view(buffer.dtype).transpose(1, 2), 0, group.blocks.flatten(), out=pages)
    flat.index_fill_(0, group.unseen_keys, 0)
    if cache.dtype != buffer.dtype:
        flat = flat.view(cache.dtype).float() * (1.0 if scale is None else scale)
    return flat.view(num_spans, num_blocks * block_size, *flat.shape[1:]).transpose(1, 2)


def _pack_gqa_heads(q: Tensor, group: _QueryGroup, spec: AttentionSpec) -> Tensor:
    """(spans * query_len, num_heads, dim) -> (spans, num_kv_heads, group_size * query_len, dim)."""
    by_kv_head = q.view(group.num_spans, group.query_len, spec.num_kv_heads, -1, q.shape[-1])
    return by_kv_head.permute(0, 2, 3, 1, 4).flatten(2, 3)


def _unpack_gqa_heads(x: Tensor, group: _QueryGroup, spec: AttentionSpec) -> Tensor:
    """The inverse of ``_pack_gqa_heads``."""
    by_kv_head = x.view(group.num_spans, spec.num_kv_heads, -1, group.query_len, x.shape[-1])
    return by_kv_head.permute(0, 3, 1, 2, 4).reshape(group.num_spans * group.query_len, spec.num_heads, -1)


def _compute_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp): attention written out, with soft-cap; the logarithm is natural and float32."""
    scores = (q @ k.transpose(-1, -2)).float() * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    scores = scores + mask
    lse = scores.logsumexp(-1)
    return (scores - lse.unsqueeze(-1)).exp().to(v.dtype) @ v, lse
