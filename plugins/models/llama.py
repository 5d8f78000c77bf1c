"""Llama 2 and 3, and every model of that shape (Touvron et al., 2023, arXiv:2307.09288)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from quire.sdk import AttentionSpec, ForwardContext, Model
from quire.sdk.layers import (
    Attention,
    AttentionShape,
    GatedMLP,
    LayerBuilder,
    LMHead,
    PartialSum,
    RMSNorm,
    VocabEmbedding,
    collect_weight_loaders,
    process_weights_after_loading,
)

__all__ = ["DecoderLayer", "LlamaForCausalLM"]


class LlamaForCausalLM(Model):
    """Embed, a stack of pre-norm layers, norm, head. Families of this shape change ``attention_shape`` alone."""

    supports_pipeline_parallel = supports_aux_hidden_states = True

    def __init__(self, config: Any, builder: LayerBuilder) -> None:
        super().__init__()
        self.config = config
        self.stage = stage = builder.stage
        self.embed_tokens: VocabEmbedding | None = None
        is_tied_here = stage.is_last and config.tie_word_embeddings
        if builder.is_on_stage("model.embed_tokens", stage.is_first or stage.needs_embedding or is_tied_here):
            self.embed_tokens = builder.make_embedding("model.embed_tokens", config.vocab_size, config.hidden_size)
        self.layers = builder.make_layers(
            "model.layers",
            config.num_hidden_layers,
            lambda layer: DecoderLayer(
                config, builder, layer, self.attention_shape(config, layer), self.mlp_bias(config)
            ),
        )
        self.first_layer = builder.first_layer
        self.norm: RMSNorm | None = None
        self.lm_head: LMHead | None = None
        if builder.is_on_stage("model.norm", stage.is_last):
            self.norm = builder.make_rms_norm("model.norm", config.hidden_size, config.rms_norm_eps)
        if builder.is_on_stage("lm_head", stage.is_last):
            tied = self.embed_tokens if config.tie_word_embeddings else None
            self.lm_head = builder.make_lm_head("lm_head", config.vocab_size, config.hidden_size, tied)
            if builder.parallel.size > 1:
                self.vocab_shard = self.lm_head.vocab_shard

    @classmethod
    def example_config(cls) -> Mapping[str, Any]:
        """Two layers of four heads, which share two of keys and values."""
        return {
            "model_type": "llama",
            "vocab_size": 160,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 128,
        }

    def attention_shape(self, config: Any, layer: int) -> AttentionShape:
        """The attention of ``layer``: what relatives of Llama override."""
        return AttentionShape(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=get_head_dim(config),
            qkv_bias=config.attention_bias,
            o_bias=config.attention_bias,
        )

    def mlp_bias(self, config: Any) -> bool:
        """Whether the MLP's projections have biases."""
        return bool(config.mlp_bias)

    def attention_specs(self) -> list[AttentionSpec]:
        """One per layer of this stage."""
        return [layer.self_attn.spec for layer in self.layers]  # type: ignore[union-attr, misc]

    def forward(self, input_ids: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """(num_tokens,) -> (num_tokens, hidden): after the final norm, or the residual stream for the next stage."""
        x: Tensor | PartialSum | None = context.hidden_states
        if self.stage.is_first and self.embed_tokens is not None:
            x = self.embed_tokens(input_ids)
        assert x is not None, "a stage that is not the first goes on from context.hidden_states"
        residual: Tensor | None = None
        for index, layer in enumerate(self.layers, self.first_layer):
            if self.aux_hidden_states is not None and index in self.aux_hidden_states.layers:
                x = x.reduce() if isinstance(x, PartialSum) else x
                self.aux_hidden_states.capture_layer(index, x, residual)
            x, residual = layer(x, residual, positions, context)
        if self.norm is None:
            x = x.reduce() if isinstance(x, PartialSum) else x
            return x if residual is None else x + residual
        return self.norm(x) if residual is None else self.norm(x, residual)[0]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """(n, hidden) -> (n, vocab), on the last stage."""
        assert self.lm_head is not None
        return self.lm_head(hidden)

    def compute_local_logits(self, hidden: Tensor) -> Tensor:
        """(n, hidden) -> (n, vocab_shard.size), on the last stage."""
        assert self.lm_head is not None
        return self.lm_head.compute_local_logits(hidden)

    def checkpoint_map(self) -> dict[str, Callable[[Tensor], None]]:
        """Collected from the layers, which know their names in the checkpoint."""
        return collect_weight_loaders(self)

    def is_ignored_tensor(self, name: str) -> bool:
        """Old checkpoints store what is derived from config.json: rotary frequencies, their cosines and sines."""
        return ".rotary_emb." in f".{name}"

    def process_weights_after_loading(self) -> Iterator[str]:
        """Every layer repacks as its quantization method needs."""
        return process_weights_after_loading(self)


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm that also adds the residual."""

    def __init__(self, config: Any, builder: LayerBuilder, layer: int, shape: AttentionShape, mlp_bias: bool) -> None:
        super().__init__()
        name, eps = f"model.layers.{layer}", config.rms_norm_eps
        self.input_layernorm = builder.make_rms_norm(f"{name}.input_layernorm", config.hidden_size, eps)
        cos_sin = builder.make_rope_table(config, shape.head_dim)
        self.self_attn = Attention(builder, f"{name}.self_attn", layer, shape, cos_sin)
        self.post_attention_layernorm = builder.make_rms_norm(
            f"{name}.post_attention_layernorm", config.hidden_size, eps
        )
        self.mlp = GatedMLP(
            builder, f"{name}.mlp", config.hidden_size, config.intermediate_size, config.hidden_act, mlp_bias
        )

    def forward(
        self, x: Tensor | PartialSum, residual: Tensor | None, positions: Tensor, context: ForwardContext
    ) -> tuple[Tensor | PartialSum, Tensor | None]:
        """The residual stream is ``x + residual``, both (num_tokens, hidden), or ``x`` where ``residual`` is None. Of a
        partial sum ranks have yet to exchange their parts."""
        x, residual = self.self_attn(self.input_layernorm, x, residual, positions, context)
        return self.mlp(self.post_attention_layernorm, x, residual)


def get_head_dim(config: Any) -> int:
    """``head_dim`` where config.json gives it, else the hidden size over the heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
