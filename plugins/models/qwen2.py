"""Qwen2 and Qwen2.5, dense (Yang et al., 2024, arXiv:2407.10671): Llama with biases on queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.plugins.models.llama import LlamaForCausalLM, get_head_dim
from quire.sdk.layers import AttentionShape

__all__ = ["Qwen2ForCausalLM", "get_layer_window"]


class Qwen2ForCausalLM(LlamaForCausalLM):
    """Layers that ``layer_types`` calls ``sliding_attention`` see ``sliding_window`` tokens."""

    @classmethod
    def example_config(cls) -> Mapping[str, Any]:
        """Llama's, with a window in the second layer."""
        return {
            **super().example_config(),
            "model_type": "qwen2",
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 1,
        }

    def attention_shape(self, config: Any, layer: int) -> AttentionShape:
        """Biased projections in, none out."""
        return AttentionShape(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=get_head_dim(config),
            qkv_bias=True,
            sliding_window=get_layer_window(config, layer),
        )

    def mlp_bias(self, config: Any) -> bool:
        """None."""
        return False


def get_layer_window(config: Any, layer: int) -> int | None:
    """The window of ``layer``: transformers writes ``layer_types`` from ``use_sliding_window`` where it is absent."""
    return config.sliding_window if config.layer_types[layer] == "sliding_attention" else None
