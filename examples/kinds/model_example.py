"""A model: register ``model_example:BigramForCausalLM`` under the architecture that ``config.json`` names."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from quire.sdk import AttentionSpec, ForwardContext, Model


class BigramForCausalLM(Model):
    """Each token follows from the one before it: embedding, norm and head, no attention."""

    def __init__(self, config: Any, builder: Any) -> None:
        super().__init__()
        self.embed_tokens = builder.make_embedding("model.embed_tokens", config.vocab_size, config.hidden_size)
        self.norm = builder.make_rms_norm("model.norm", config.hidden_size, config.rms_norm_eps)
        self.lm_head = builder.make_lm_head("lm_head", config.vocab_size, config.hidden_size, self.embed_tokens)

    def attention_specs(self) -> list[AttentionSpec]:
        return []

    def forward(self, input_ids: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        return self.norm(self.embed_tokens(input_ids))

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)

    def checkpoint_map(self) -> dict[str, Callable[[Tensor], None]]:
        return {**self.embed_tokens.weight_loaders(), **self.norm.weight_loaders()}
