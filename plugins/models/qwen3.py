"""Qwen3, dense (Yang et al., 2025, arXiv:2505.09388): each head's queries and keys are normed before rotation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.plugins.models.llama import LlamaForCausalLM, get_head_dim
from quire.plugins.models.qwen2 import get_layer_window
from quire.sdk.layers import AttentionShape

__all__ = ["Qwen3ForCausalLM"]


class Qwen3ForCausalLM(LlamaForCausalLM):
    """Llama's frame with Qwen2's windows and query and key norms."""

    @classmethod
    def example_config(cls) -> Mapping[str, Any]:
        """Llama's, with a window in the second layer."""
        return {
            **super().example_config(),
            "model_type": "qwen3",
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 1,
        }

    def attention_shape(self, config: Any, layer: int) -> AttentionShape:
        """With ``attention_bias`` every projection has one."""
        return AttentionShape(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=get_head_dim(config),
            qkv_bias=config.attention_bias,
            o_bias=config.attention_bias,
            sliding_window=get_layer_window(config, layer),
            qk_norm_eps=config.rms_norm_eps,
        )

    def mlp_bias(self, config: Any) -> bool:
        """None."""
        return False
