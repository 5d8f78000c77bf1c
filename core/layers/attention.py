"""The attention layer: norm, project, rotate, cache, attend, project, add. The norm and the rotation may be absent."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from quire.core import ops
from quire.core.contracts.attention import AttentionSpec, LayerKV
from quire.core.contracts.model import ForwardContext
from quire.core.contracts.quant import AppendedTerm
from quire.core.layers.builder import LayerBuilder
from quire.core.layers.kv_scales import KVScales
from quire.core.layers.norm import RMSNorm
from quire.core.layers.parallel import PartialSum

__all__ = ["Attention", "AttentionShape"]


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One attention layer as its family describes it. Counts are of the whole model, not of a rank."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    o_bias: bool = False
    sliding_window: int | None = None
    """Tokens that a query sees, its own included; None: all before it."""
    logits_softcap: float | None = None
    """Scores become ``softcap * tanh(score / softcap)``; None: they do not."""
    scale: float | None = None
    """None: ``head_dim ** -0.5``."""
    qk_norm_eps: float | None = None
    """Norm each head's queries and keys before rotating, with this epsilon; None: do not."""


class Attention(nn.Module):
    """Grouped-query attention over the paged KV cache, with rotary positions or none; heads are divided between the
    ranks."""

    def __init__(
        self,
        builder: LayerBuilder,
        name: str,
        layer: int,
        shape: AttentionShape,
        cos_sin: Tensor | None = None,
        *,
        out_name: str = "o_proj",
    ) -> None:
        """``name`` is the module's in the checkpoint, with ``q_proj``, ``k_proj``, ``v_proj`` and ``out_name`` in it;
        ``layer`` its number in the model;
        ``cos_sin`` a table of ``LayerBuilder.make_rope_table``, None where the model has positions of another kind."""
        super().__init__()
        self.layer = layer - builder.first_layer  # in this stage
        self.operations = builder.operations
        self.cos_sin = cos_sin  # (max_positions, rotary_dim) float32, shared by the layers
        self.head_dim = shape.head_dim
        self.num_heads, self.num_kv_heads = builder.count_local_heads(shape.num_heads, shape.num_kv_heads)
        self.qkv_proj = builder.make_qkv_parallel_linear(
            name, shape.hidden_size, shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.qkv_bias
        )
        self.o_proj = builder.make_row_parallel_linear(
            f"{name}.{out_name}", shape.num_heads * shape.head_dim, shape.hidden_size, shape.o_bias
        )
        eps = shape.qk_norm_eps
        self.q_norm = None if eps is None else builder.make_rms_norm(f"{name}.q_norm", shape.head_dim, eps)
        self.k_norm = None if eps is None else builder.make_rms_norm(f"{name}.k_norm", shape.head_dim, eps)
        self.kv_scales = KVScales(name, builder.device, builder.kv_dtype)
        self.spec = AttentionSpec(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            qk_head_dim=shape.head_dim,
            v_head_dim=shape.head_dim,
            scale=shape.scale if shape.scale is not None else shape.head_dim**-0.5,
            dtype=builder.dtype,
            kv_dtype=builder.kv_dtype,
            block_size=builder.block_size,
            kind="full" if shape.sliding_window is None else "sliding",
            window=shape.sliding_window,
            softcap=shape.logits_softcap,
        )

    def forward(
        self, norm: RMSNorm, x: Tensor | PartialSum, residual: Tensor | None, positions: Tensor, context: ForwardContext
    ) -> tuple[Tensor | PartialSum, Tensor | None]:
        """Norm the stream ``x + residual`` (num_tokens, hidden) and add the result to it, as in
        ``Linear.forward_add_residual``."""
        adapters = None
        if self._can_add_adapters(context):
            qkv, stream, adapters = self.qkv_proj.forward_after_norm_unadded(norm, x, residual)
        else:
            qkv, stream = self.qkv_proj.forward_after_norm(norm, x, residual)  # type: ignore[assignment]
        assert isinstance(qkv, Tensor), "only an activation is emitted quantized"
        return self.o_proj.forward_add_residual(self._attend(qkv, positions, context, adapters), stream)

    def forward_plain(self, x: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """Attention alone, of what the model has normed itself: ``x`` (num_tokens, hidden) -> (num_tokens, hidden)."""
        out: Tensor = self.o_proj(self._attend(self.qkv_proj(x), positions, context))
        return out

    def _can_add_adapters(self, context: ForwardContext) -> bool:
        """Whether the kernel of the rotary embedding may add what adapters make of queries, keys and values."""
        is_own = self.cos_sin is not None and "rope_and_cache" not in self.operations.replaced
        return is_own and not context.backends[context.group_of[self.layer]].writes_kv

    def _attend(
        self, qkv: Tensor, positions: Tensor, context: ForwardContext, adapters: AppendedTerm | None = None
    ) -> Tensor:
        """(num_tokens, sizes of q, k and v) -> (num_tokens, num_heads * head_dim)."""
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        q, k, v = qkv.split([q_size, kv_size, kv_size], dim=-1)
        q = q.unflatten(1, (self.num_heads, self.head_dim))  # (num_tokens, num_heads, head_dim)
        k = k.unflatten(1, (self.num_kv_heads, self.head_dim))  # (num_tokens, num_kv_heads, head_dim)
        v = v.unflatten(1, (self.num_kv_heads, self.head_dim))
        group = context.group_of[self.layer]
        backend, kv = context.backends[group], context.kv[self.layer]
        if self.spec.kv_dtype.itemsize == 1:
            kv = LayerKV(kv.k, kv.v, self.kv_scales.k_scale, self.kv_scales.v_scale)
        q, k = self._rotate_and_cache(
            q, k, v, positions, None if backend.writes_kv else kv, context.slot_mapping[group], adapters
        )
        out = q.new_empty(q.shape)
        if backend.writes_kv:
            backend.run(self.layer, q, kv, out, k=k, v=v)
        else:
            backend.run(self.layer, q, kv, out)
        return out.flatten(1)

    def _rotate_and_cache(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        kv: LayerKV | None,
        slots: Tensor,
        adapters: AppendedTerm | None,
    ) -> tuple[Tensor, Tensor]:
        """Add what adapters still have to, norm and rotate queries and keys, where the layer does, and write keys and
        values, unless ``kv`` is None: the backend will."""
        if self.cos_sin is None:
            if self.q_norm is not None and self.k_norm is not None:
                q, k = self.q_norm(q), self.k_norm(k)
            if kv is not None:
                ops.write_kv(k, v, kv, slots)
            return q, k
        return self.operations.rope_and_cache(
            q,
            k,
            v,
            positions,
            self.cos_sin,
            kv,
            slots,
            q_norm=None if self.q_norm is None else self.q_norm.weight,
            k_norm=None if self.k_norm is None else self.k_norm.weight,
            eps=0.0 if self.q_norm is None else self.q_norm.eps,
            **({} if adapters is None else {"adapters": adapters}),
        )
