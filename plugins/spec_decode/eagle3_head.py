"""EAGLE-3 heads as they are published: what ``config.json`` says, and the layers.

The head: Li et al., "EAGLE-3: Scaling up Inference Acceleration of Large Language Models via Training-Time Test", 2025,
arXiv:2503.01840. The format: https://github.com/SafeAILab/EAGLE (``midlayer.*``, ``fc``, ``d2t``, ``t2d``), which
https://github.com/sgl-project/SpecForge writes too; https://github.com/vllm-project/speculators puts the layer's sizes
into ``transformer_layer_config`` and calls the layer ``layers.0``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quire.sdk import AttentionSpec, CheckpointError, ForwardContext
from quire.sdk.layers import GatedMLP, LayerBuilder, VocabEmbedding

__all__ = ["Eagle3Config", "Eagle3Head"]

_UNSUPPORTED_VARIANTS = ("fc_norm", "norm_before_fc", "norm_output", "parallel_drafting")
"""Later variants of the head, each a switch of ``config.json`` or its ``eagle_config``."""


@dataclass(frozen=True, slots=True)
class Eagle3Config:
    """What ``config.json`` says of a head, in whichever of its spellings."""

    layer_config: Any
    """Sizes of the decoder layer, spelled as Llama's."""
    vocab_size: int
    draft_vocab_size: int
    target_hidden_size: int
    aux_hidden_state_layer_ids: tuple[int, ...]
    """Layers of the target whose inputs (the residual stream before them) the head takes."""
    norm_before_residual: bool
    """Whether the residual stream starts from the normed hidden state, or from that before the norm."""
    unsupported_variants: tuple[str, ...]

    @classmethod
    def from_hf_config(cls, config: Any, target_config: Any) -> Eagle3Config:
        """Raises ``CheckpointError`` where there is nothing to read."""
        layer, nested = config, getattr(config, "eagle_config", None) or {}
        if isinstance(inner := getattr(config, "transformer_layer_config", None), dict):
            from transformers import LlamaConfig

            layer = LlamaConfig(**{key: value for key, value in inner.items() if key != "model_type"})
        missing = [key for key in ("hidden_size", "num_attention_heads", "vocab_size") if not hasattr(layer, key)]
        if missing or getattr(layer, "rope_parameters", None) is None:
            raise CheckpointError(f"its config.json lacks {', '.join(missing or ['a model_type that is known'])}")
        count = int(target_config.num_hidden_layers)
        layer_ids = getattr(config, "eagle_aux_hidden_state_layer_ids", None)
        if not layer_ids:  # SpecForge counts the outputs of layers; the published default is in terms of inputs
            output_ids = nested.get("eagle_aux_hidden_state_layer_ids")
            layer_ids = [int(i) + 1 for i in output_ids] if output_ids else [2, count // 2, count - 3]
        variants = [name for name in _UNSUPPORTED_VARIANTS if nested.get(name) or getattr(config, name, None)]
        return cls(
            layer_config=layer,
            vocab_size=int(layer.vocab_size),
            draft_vocab_size=int(getattr(config, "draft_vocab_size", None) or layer.vocab_size),
            target_hidden_size=int(getattr(config, "target_hidden_size", None) or layer.hidden_size),
            aux_hidden_state_layer_ids=tuple(int(i) for i in layer_ids),
            norm_before_residual=bool(getattr(config, "norm_before_residual", False)),
            unsupported_variants=tuple(variants),
        )

    @property
    def aux_hidden_size(self) -> int:
        """Features of the target's hidden states, side by side."""
        return len(self.aux_hidden_state_layer_ids) * self.target_hidden_size

    def find_mismatches(self, target_config: Any) -> list[str]:
        """Why the head cannot draft for the target."""
        reasons = []
        if self.vocab_size != target_config.vocab_size:
            reasons.append(
                f"has a vocabulary of {self.vocab_size} tokens, the target one of {target_config.vocab_size}"
            )
        if self.target_hidden_size != target_config.hidden_size:
            sizes = f"{self.target_hidden_size} features, the target's have {target_config.hidden_size}"
            reasons.append(f"reads hidden states of {sizes}")
        count = target_config.num_hidden_layers
        layer_ids = list(self.aux_hidden_state_layer_ids)
        if any(not 0 <= layer < count for layer in layer_ids):
            reasons.append(f"reads hidden states of layers {layer_ids}, the target has 0 to {count - 1}")
        if not 0 < self.draft_vocab_size <= self.vocab_size:
            reasons.append(f"has a draft_vocab_size of {self.draft_vocab_size} out of {self.vocab_size} tokens")
        if (layers := self.layer_config.num_hidden_layers) != 1:
            reasons.append(f"has {layers} layers; only heads of one are supported")
        if self.unsupported_variants:
            reasons.append(f"is of a variant that is not supported: {', '.join(self.unsupported_variants)}")
        return reasons


class Eagle3Head(nn.Module):
    """One decoder layer over the next token's embedding and what the target, or the head itself, made of this one."""

    def __init__(self, config: Eagle3Config, builder: LayerBuilder, embedding: VocabEmbedding | None) -> None:
        """``embedding`` is the target's; None: the head brings its own."""
        super().__init__()
        c, name = config.layer_config, "layers.0"
        hidden, eps, self.head_dim = c.hidden_size, c.rms_norm_eps, _get_head_dim(c)
        self._run_rope = builder.operations.rope_and_cache
        self.num_heads, self.num_kv_heads = builder.count_local_heads(c.num_attention_heads, c.num_key_value_heads)
        self.norm_before_residual = config.norm_before_residual
        self.embed_tokens: VocabEmbedding | None = None
        if embedding is None:
            self.embed_tokens = embedding = builder.make_embedding("embed_tokens", config.vocab_size, hidden)
        self._embedding = (embedding,)  # in a tuple: the target's is no module of the head
        self.fc = builder.make_replicated_linear("fc", config.aux_hidden_size, {"fc": hidden})
        self.input_layernorm = builder.make_rms_norm(f"{name}.input_layernorm", hidden, eps)
        self.hidden_norm = builder.make_rms_norm(f"{name}.hidden_norm", hidden, eps)
        attn, bias = f"{name}.self_attn", bool(getattr(c, "attention_bias", False))
        num_heads, num_kv_heads = c.num_attention_heads, c.num_key_value_heads
        self.q_proj = builder.make_head_parallel_linear(
            f"{attn}.q_proj", 2 * hidden, {f"{attn}.q_proj": num_heads}, self.head_dim, bias
        )
        kv_parts = {f"{attn}.k_proj": num_kv_heads, f"{attn}.v_proj": num_kv_heads}
        self.kv_proj = builder.make_head_parallel_linear(f"{attn}.kv_proj", 2 * hidden, kv_parts, self.head_dim, bias)
        self.o_proj = builder.make_row_parallel_linear(f"{attn}.o_proj", num_heads * self.head_dim, hidden, bias)
        self.post_attention_layernorm = builder.make_rms_norm(f"{name}.post_attention_layernorm", hidden, eps)
        self.mlp = GatedMLP(
            builder, f"{name}.mlp", hidden, c.intermediate_size, c.hidden_act, bool(getattr(c, "mlp_bias", False))
        )
        self.norm = builder.make_rms_norm("norm", hidden, eps)
        self.lm_head = builder.make_lm_head("lm_head", config.draft_vocab_size, hidden)
        self.cos_sin = builder.make_rope_table(c, self.head_dim)
        self.draft_to_target_ids = torch.arange(config.draft_vocab_size, device=builder.device)
        """Token of the target's vocabulary for each draft token (``d2t``)."""
        self.spec = AttentionSpec(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            qk_head_dim=self.head_dim,
            v_head_dim=self.head_dim,
            scale=self.head_dim**-0.5,
            dtype=builder.dtype,
            kv_dtype=builder.kv_dtype,
            block_size=builder.block_size,
            kind="full",
        )

    def write_kv(self, ids: Tensor, hidden: Tensor, positions: Tensor, context: ForwardContext) -> None:
        """Keys and values alone of the tokens at ``positions`` (n,), whose states are ``hidden`` (n, hidden) and whose
        next tokens are ``ids`` (n,)."""
        k, v = self._project_kv(self._combine_inputs(ids, hidden)[0])
        no_queries = k[:, :0]
        self._rotate_and_cache(no_queries, k, v, positions, context)

    def forward(self, ids: Tensor, hidden: Tensor, positions: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """As ``write_kv``, and ``(normed, hidden)``, each (n, hidden): what ``compute_logits`` takes, and what stands
        for the target's hidden states in the next pass."""
        combined, residual_stream = self._combine_inputs(ids, hidden)
        k, v = self._project_kv(combined)
        q = self.q_proj(combined).unflatten(1, (self.num_heads, self.head_dim))
        q = self._rotate_and_cache(q, k, v, positions, context)
        out = torch.empty_like(q)
        context.backends[0].run(0, q, context.kv[0], out)
        x, residual = self.o_proj.forward_add_residual(out.flatten(1), residual_stream)
        x, residual = self.mlp(self.post_attention_layernorm, x, residual)
        return (self.norm(x), x) if residual is None else self.norm(x, residual)

    def compute_logits(self, normed: Tensor) -> Tensor:
        """(n, hidden) -> (n, draft_vocab_size); ``draft_to_target_ids`` says which tokens those are."""
        return self.lm_head(normed)

    def _rotate_and_cache(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        kv, slots = context.kv[0], context.slot_mapping[0]
        return self._run_rope(q, k, v, positions, self.cos_sin, kv, slots, q_norm=None, k_norm=None, eps=0.0)[0]

    def _combine_inputs(self, ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's input (n, 2 * hidden), and the residual stream (n, hidden)."""
        (embed,), normed = self._embedding, self.hidden_norm(hidden)
        assert embed is not None
        embedded = self.input_layernorm(embed(ids))
        return torch.cat((embedded, normed), -1), normed if self.norm_before_residual else hidden

    def _project_kv(self, combined: Tensor) -> tuple[Tensor, Tensor]:
        kv = self.kv_proj(combined).unflatten(1, (2 * self.num_kv_heads, self.head_dim))
        return kv[:, : self.num_kv_heads], kv[:, self.num_kv_heads :]


def _get_head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
