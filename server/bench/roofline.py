"""The floor of a workload: the least time that its bytes and operations take at a card's measured ceilings.

No launch costs, no sampling, no host. Weights are read once a step; a prompt's step computes every token; a decode step
at batch ``B`` and context ``c`` reads ``B * c`` tokens of keys and values. Matrix products and attention follow each
other, so their times add; of each, the larger of its reading and its computing counts (the roofline model, Williams et
al. 2009).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["CEILINGS", "Ceilings", "ModelShape", "decode_floor", "workload_floor"]


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a card reaches on random data."""

    bytes_s: float
    """Reading device memory."""
    flops_s: float
    """A large product of 16-bit matrices."""


CEILINGS = {"NVIDIA H200": Ceilings(4.29e12, 680e12)}
"""Cards that were measured, by the name that their driver gives."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes that count of a dense decoder with grouped-query attention."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    itemsize: int = 2

    @classmethod
    def of(cls, hf_config: Any) -> ModelShape:
        """Read from a transformers configuration."""
        heads = hf_config.num_attention_heads
        return cls(
            layers=hf_config.num_hidden_layers,
            hidden=hf_config.hidden_size,
            heads=heads,
            kv_heads=hf_config.num_key_value_heads,
            head_dim=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads,
            intermediate=hf_config.intermediate_size,
            vocab=hf_config.vocab_size,
        )

    @property
    def linear(self) -> int:
        """Weights of the layers' linear maps."""
        qkvo = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (qkvo + 3 * self.hidden * self.intermediate)

    @property
    def kv_bytes(self) -> int:
        """Bytes of one cached token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.itemsize

    def products(self, tokens: int, drawn: int, card: Ceilings) -> float:
        """Seconds of a step's linear layers for ``tokens``, and of the head for those ``drawn``."""
        head = self.hidden * self.vocab
        return _slower(self.linear * self.itemsize, 2 * tokens * self.linear, card) + _slower(
            head * self.itemsize, 2 * drawn * head, card
        )

    def decode_step(self, batch: int, context: float, card: Ceilings) -> float:
        """Seconds of a step in which ``batch`` requests of ``context`` tokens draw one each."""
        attention = _slower(
            batch * (context + 1) * self.kv_bytes,
            4 * batch * context * self.heads * self.head_dim * self.layers,
            card,
        )
        return self.products(batch, batch, card) + attention

    def prompts(self, lengths: Sequence[int], card: Ceilings) -> float:
        """Seconds to compute prompts, causally, as matrix products alone."""
        attention = sum(2 * self.layers * self.heads * self.head_dim * n * n for n in lengths)
        return (2 * sum(lengths) * self.linear + attention) / card.flops_s


def decode_floor(shape: ModelShape, prompt_lens: Sequence[int], answer_lens: Sequence[int], card: Ceilings) -> float:
    """Seconds in which every answer's tokens after the first can be drawn, all requests running from the start."""
    total = 0.0
    for made in range(1, max(answer_lens)):
        running = [n for n, answer in zip(prompt_lens, answer_lens, strict=True) if answer > made]
        total += shape.decode_step(len(running), sum(running) / len(running) + made, card)
    return total


def workload_floor(shape: ModelShape, prompt_lens: Sequence[int], answer_lens: Sequence[int], card: Ceilings) -> float:
    """Seconds in which the whole can be done: every prompt, then every answer."""
    return shape.prompts(prompt_lens, card) + decode_floor(shape, prompt_lens, answer_lens, card)


def _slower(num_bytes: float, flops: float, card: Ceilings) -> float:
    return max(num_bytes / card.bytes_s, flops / card.flops_s)
