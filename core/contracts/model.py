"""Model: a family's forward pass, and how its checkpoint maps onto it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quire.core.contracts.attention import AttentionBackend, AttentionSpec, LayerKV

if TYPE_CHECKING:
    from quire.core.layers.vocab import VocabShard

__all__ = ["AuxHiddenStates", "ForwardContext", "Model"]


@dataclass(slots=True)
class ForwardContext:
    """What a forward pass needs of its step beside tokens and positions. Passed as an argument, never global."""

    backends: list[AttentionBackend]
    """By group of layers with equal specs; ``prepare_metadata`` was called for this step."""
    slot_mapping: list[Tensor]
    """By group: (num_tokens,) int64, ``block * block_size + offset`` of each token; padding points into block 0."""
    kv: list[LayerKV]
    """By layer: its part of the KV cache."""
    group_of: list[int]
    """By layer: its group."""
    hidden_states: Tensor | None = None
    """(num_tokens, hidden) On a stage of a pipeline that is not the first: what the stage before made of the tokens.
    Layers above are counted from this stage's first."""


@dataclass(slots=True)
class AuxHiddenStates:
    """Hidden states of some layers, which every forward pass writes into one static buffer, for a proposer."""

    layers: tuple[int, ...]
    """The residual stream before each of these layers."""
    states: Tensor  # (max_num_tokens, len(layers) * hidden): the step's tokens first, layers side by side

    def capture_layer(self, layer: int, x: Tensor, residual: Tensor | None) -> None:
        """Keep the residual stream before ``layer`` if it is one of ``layers``: ``x + residual``, both (num_tokens,
        hidden), or ``x`` alone."""
        columns = self.states[: len(x)].chunk(len(self.layers), 1)  # each (num_tokens, hidden)
        for captured_layer, out in zip(self.layers, columns, strict=True):
            if captured_layer == layer:
                torch.add(x, 0 if residual is None else residual, out=out)

    def move_tokens(self, first: int, start: int, count: int) -> None:
        """Move ``count`` tokens from ``start`` on to right behind the ``first`` tokens, over the padding between."""
        self.states[first : first + count] = self.states[start : start + count].clone()


class Model(nn.Module, ABC):
    """One architecture. Constructed with ``Model(hf_config, builder)``, where ``builder``
    (``quire.core.layers.builder.LayerBuilder``) makes linear, embedding and norm layers for this rank, device, dtype
    and quantization.
    """

    vocab_shard: VocabShard | None = None
    """Where ranks share the vocabulary and ``compute_local_logits`` is offered: this rank's part of it."""
    supports_pipeline_parallel: bool = False
    """Whether it can be one stage of several: it makes the layers and modules of ``builder.stage`` alone
    (``LayerBuilder.make_layers``, ``is_on_stage``), goes on from ``ForwardContext.hidden_states``, and ``forward`` of a
    stage that is not the last returns the residual stream, summed over the ranks."""
    supports_aux_hidden_states: bool = False
    """Whether ``forward`` fills ``aux_hidden_states``."""
    aux_hidden_states: AuxHiddenStates | None = None
    """Set by a proposer before the first step, and filled in every forward pass."""

    @classmethod
    def example_config(cls) -> Mapping[str, Any]:
        """The ``config.json`` of a tiny model of this architecture, ``model_type`` included. The conformance checks
        fill one with random weights and compare it with transformers' class of that type."""
        return {}

    @abstractmethod
    def attention_specs(self) -> list[AttentionSpec]:
        """One per layer of this stage, on this rank."""

    @abstractmethod
    def forward(self, input_ids: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """(num_tokens,) int32 tokens and int64 positions -> (num_tokens, hidden), after the final norm of the last
        stage."""

    @abstractmethod
    def compute_logits(self, hidden: Tensor) -> Tensor:
        """(n, hidden) -> (n, vocab) in the model's dtype, on every rank."""

    def compute_local_logits(self, hidden: Tensor) -> Tensor:
        """(n, hidden) -> (n, vocab_shard.size): the logits of this rank's tokens, which
        ``vocab_shard.gather_logits`` makes into those of ``compute_logits``. Without ``vocab_shard`` never called."""
        raise NotImplementedError

    @abstractmethod
    def checkpoint_map(self) -> dict[str, Callable[[Tensor], None]]:
        """Checkpoint tensor name -> what copies this rank's shard of the tensor into place. The loader calls each
        exactly once, streaming, and reports what is missing or left over."""

    def is_ignored_tensor(self, name: str) -> bool:
        """Whether a checkpoint tensor may be left out (``rotary_emb.inv_freq``)."""
        return False

    def process_weights_after_loading(self) -> Iterator[str]:
        """Repack weights after loading, yielding the names of the layers done."""
        yield from ()
