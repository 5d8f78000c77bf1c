"""A Llama of random weights that prefers long tokens, as trained models do where a text is forced.

Of the tokens that spell a forced text in part, a random model takes any, and a trained one almost always the one that
the tokenizer would write. Without this, drafts of forced tokens would be refused for a reason that no model in use has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quire.plugins.models.llama import LlamaForCausalLM

__all__ = ["LongTokenLlama"]


class LongTokenLlama(LlamaForCausalLM):
    """Adds to each logit what the file ``token_lengths`` of its folder, a tensor of (vocab,), gives for its token."""

    def __init__(self, config: Any, builder: Any) -> None:
        super().__init__(config, builder)
        lengths = torch.load(Path(config.name_or_path, config.token_lengths), weights_only=True)
        weight = next(self.lm_head.parameters())
        self.register_buffer("length_bias", (4.0 * lengths).to(weight.dtype).to(weight.device), persistent=False)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """(n, vocab)."""
        return super().compute_logits(hidden) + self.length_bias
