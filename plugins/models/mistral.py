"""Mistral (Jiang et al., 2023, arXiv:2310.06825): Llama with a sliding window and no biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.plugins.models.llama import LlamaForCausalLM, get_head_dim
from quire.sdk.layers import AttentionShape

__all__ = ["MistralForCausalLM"]


class MistralForCausalLM(LlamaForCausalLM):
    """Every layer sees ``sliding_window`` tokens, or all where it is null."""

    @classmethod
    def example_config(cls) -> Mapping[str, Any]:
        """Llama's, with a window of eleven tokens."""
        return {**super().example_config(), "model_type": "mistral", "sliding_window": 11}

    def attention_shape(self, config: Any, layer: int) -> AttentionShape:
        """The same in every layer."""
        return AttentionShape(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=get_head_dim(config),
            sliding_window=config.sliding_window,
        )

    def mlp_bias(self, config: Any) -> bool:
        """None."""
        return False
