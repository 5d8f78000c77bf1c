"""The reference backend: PyTorch operations alone, on any device.

``plan`` reads the step's lengths on the host, which on a GPU waits for the device: it is for checking, not for speed.
Requests that decode are gathered into one padded attention; the others are attended one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quire.sdk import AttentionBackend, AttentionBatch, AttentionSpec, GraphKey, KVLayout, LayerKV

__all__ = ["TorchSDPABackend"]

_PIECE_ELEMENTS = 1 << 18
"""Elements of K gathered at once: a megabyte, so that a CPU attends to it before it leaves the cache."""

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)

_PIECE_QUERIES = 256
"""Queries of a prompt attended at once: each piece sees only the keys up to its last query."""


class TorchSDPABackend(AttentionBackend):
    """Gathers pages by block table, then scaled dot-product attention."""

    def __init__(self, spec: AttentionSpec, device: torch.device, options: object = None) -> None:
        super().__init__(spec, device, options)
        self._pieces: list[_Piece] = []
        self._buffers = (torch.empty(0, device=device), torch.empty(0, device=device))

    @classmethod
    def unsupported(cls, spec: AttentionSpec, device: torch.device) -> list[str]:
        """It knows full and sliding causal attention, GQA and soft-caps, in any floating dtype."""
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
        """Slots outermost: a gathered request is a contiguous (tokens, heads, dim)."""
        return KVLayout(self.spec, "slot")

    def prepare_metadata(self, batch: AttentionBatch, key: GraphKey | None = None) -> None:
        """Make the gather indices and masks that every layer of the step shares."""
        starts = batch.query_start_loc[: batch.num_reqs + 1].tolist()
        lengths = batch.seq_lens[: batch.num_reqs].tolist()
        self._pieces = []
        decodes = sorted(range(batch.num_decodes), key=lambda i: lengths[i])
        most_keys = _PIECE_ELEMENTS // (self.spec.num_kv_heads * self.spec.qk_head_dim)
        for some in _alike(decodes, lengths, most_keys):
            self._pieces.append(
                self._piece(batch, [_Span(r, starts[r], batch.decode_query_len, lengths[r]) for r in some])
            )
        for request in range(batch.num_decodes, batch.num_reqs):
            end = starts[request + 1]
            for start in range(starts[request], end, _PIECE_QUERIES):
                queries = min(_PIECE_QUERIES, end - start)
                length = lengths[request] - (end - start - queries)
                self._pieces.append(self._piece(batch, [_Span(request, start, queries, length)]))
        slots = max((piece.blocks.numel() for piece in self._pieces), default=0) * self.spec.block_size
        if slots > len(self._buffers[0]):
            heads, dtype = self.spec.num_kv_heads, self.spec.kv_dtype
            dtype = torch.uint8 if dtype in _FP8 else dtype  # FP8 is moved as bytes
            keys = torch.empty(slots, heads, self.spec.qk_head_dim, dtype=dtype, device=self.device)
            values = torch.empty(slots, heads, self.spec.v_head_dim, dtype=dtype, device=self.device)
            self._buffers = (keys, values)

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
        """Attend piece by piece."""
        for piece in self._pieces:
            # (requests, num_kv_heads, keys, dim)
            keys = _gather(kv.k, kv.k_scale, piece, self._buffers[0]).to(piece.mask.dtype)
            values = _gather(kv.v, kv.v_scale, piece, self._buffers[1]).to(piece.mask.dtype)
            # (requests, num_kv_heads, group * queries, dim)
            grouped = _group(q[piece.tokens].to(piece.mask.dtype), piece, self.spec)
            if self.spec.softcap is None and lse_out is None:
                attended = F.scaled_dot_product_attention(grouped, keys, values, piece.mask, scale=self.spec.scale)
            else:
                attended, lse = _attend(grouped, keys, values, piece.mask, self.spec)
                if lse_out is not None:
                    lse_out[piece.tokens] = _ungroup(lse.unsqueeze(-1), piece, self.spec).squeeze(-1)
            out[piece.tokens] = _ungroup(attended, piece, self.spec).to(out.dtype)

    def _piece(self, batch: AttentionBatch, spans: list[_Span]) -> _Piece:
        """``spans`` have equally many queries each; their keys are padded to the longest."""
        size, window, queries = self.spec.block_size, self.spec.window, spans[0].queries
        # Blocks wholly before every query's window are left out.
        begins = [0 if window is None else max(0, s.length - queries - window + 1) // size for s in spans]
        width = max(-(-s.length // size) - begin for s, begin in zip(spans, begins, strict=True))
        device = batch.seq_lens.device
        rows, starts, lengths, begin_blocks = torch.tensor(
            [[s.request, s.start, s.length, begin] for s, begin in zip(spans, begins, strict=True)], device=device
        ).T.unsqueeze(-1)  # each (spans, 1)
        columns = (begin_blocks + torch.arange(width, device=device)).clamp(max=batch.block_table.shape[1] - 1)
        blocks = batch.block_table[rows, columns].long()  # (spans, width)
        position = (begin_blocks * size + torch.arange(width * size, device=device)).unsqueeze(1)  # (spans, 1, keys)
        query = (lengths - queries + torch.arange(queries, device=device)).unsqueeze(2)  # (spans, queries, 1)
        mask = position <= query
        if window is not None:
            mask &= position > query - window
        live = mask.any(1)  # (spans, keys): some query sees it
        group = self.spec.num_heads // self.spec.num_kv_heads
        heads_mask = mask.repeat(1, group, 1).unsqueeze(1)  # (requests, 1, group * queries, keys)
        # Keys of an FP8 cache times its scale may be more than a float16.
        dtype = torch.float32 if self.spec.kv_dtype in _FP8 else self.spec.dtype
        return _Piece(
            tokens=(starts + torch.arange(queries, device=device)).flatten(),
            blocks=blocks,
            dead=(~live).flatten().nonzero().flatten(),
            mask=torch.zeros_like(heads_mask, dtype=dtype).masked_fill_(~heads_mask, float("-inf")),
            shape=(len(spans), queries),
        )


class _Span(NamedTuple):
    """Consecutive queries of one request."""

    request: int
    start: int
    """Token of the first query, in the step."""
    queries: int
    length: int
    """Context length at the last query."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Spans attended together."""

    tokens: Tensor  # (spans * queries,) int64, rows of q and out
    blocks: Tensor  # (spans, width) int64
    dead: Tensor  # int64 indices into (spans * keys) that no query sees: padding, or before the window
    mask: Tensor  # (spans, 1, group * queries, keys), added to the scores
    shape: tuple[int, int]
    """(spans, queries)."""


def _alike(order: list[int], lengths: list[int], most: int) -> list[list[int]]:
    """Cut requests, sorted by length, so that a piece pads little and holds about ``most`` keys."""
    pieces: list[list[int]] = []
    for request in order:
        longest = lengths[request]
        if pieces and longest <= lengths[pieces[-1][0]] * 4 / 3 + 64 and (len(pieces[-1]) + 1) * longest <= most:
            pieces[-1].append(request)
        else:
            pieces.append([request])
    return pieces


def _gather(cache: Tensor, scale: Tensor | None, piece: _Piece, buffer: Tensor) -> Tensor:
    """(num_blocks, heads, block_size, dim) -> (requests, heads, keys, dim), in ``buffer`` (slots, heads, dim).

    Unseen slots are zeroed, for whatever an unused slot holds (even NaN) must not reach the sums.
    """
    requests, width = piece.blocks.shape
    size = cache.shape[2]
    flat = buffer[: requests * width * size]
    pages = flat.view(requests * width, size, *flat.shape[1:])
    torch.index_select(cache.view(buffer.dtype).transpose(1, 2), 0, piece.blocks.flatten(), out=pages)
    flat.index_fill_(0, piece.dead, 0)
    if cache.dtype != buffer.dtype:
        flat = flat.view(cache.dtype).float() * (1.0 if scale is None else scale)
    return flat.view(requests, width * size, *flat.shape[1:]).transpose(1, 2)


def _group(q: Tensor, piece: _Piece, spec: AttentionSpec) -> Tensor:
    """(requests * queries, num_heads, dim) -> (requests, num_kv_heads, group * queries, dim)."""
    requests, queries = piece.shape
    split = q.view(requests, queries, spec.num_kv_heads, -1, q.shape[-1])
    return split.permute(0, 2, 3, 1, 4).flatten(2, 3)


def _ungroup(x: Tensor, piece: _Piece, spec: AttentionSpec) -> Tensor:
    """The inverse of ``_group``."""
    requests, queries = piece.shape
    split = x.view(requests, spec.num_kv_heads, -1, queries, x.shape[-1])
    return split.permute(0, 3, 1, 2, 4).reshape(requests * queries, spec.num_heads, -1)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Attention written out, with soft-cap and log-sum-exp (natural logarithm, float32)."""
    scores = (q @ k.transpose(-1, -2)).float() * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    scores = scores + mask
    lse = scores.logsumexp(-1)
    return (scores - lse.unsqueeze(-1)).exp().to(v.dtype) @ v, lse
