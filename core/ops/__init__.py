"""The operations of a forward pass, each one function, so that a fused kernel can take its place."""

from quire.core.ops.activation import gated_activation, silu_and_mul
from quire.core.ops.embedding import embedding
from quire.core.ops.norm import rms_norm
from quire.core.ops.rope import apply_rope, rope_and_cache, write_kv

__all__ = ["apply_rope", "embedding", "gated_activation", "rms_norm", "rope_and_cache", "silu_and_mul", "write_kv"]
