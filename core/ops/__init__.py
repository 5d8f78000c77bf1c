"""The operations of a forward pass, each one function, so that a fused kernel can take its place."""

from quire.core.ops.activation import silu_and_mul, silu_and_mul_quantized
from quire.core.ops.embedding import embedding
from quire.core.ops.norm import rms_norm, rms_norm_quantized
from quire.core.ops.rope import apply_rope, rope_and_cache, write_kv

__all__ = [
    "apply_rope",
    "embedding",
    "rms_norm",
    "rms_norm_quantized",
    "rope_and_cache",
    "silu_and_mul",
    "silu_and_mul_quantized",
    "write_kv",
]
