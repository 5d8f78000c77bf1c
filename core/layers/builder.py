"""Makes the layers of a model for one rank: device, dtype, sharding and quantization are decided here, once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quire.core.contracts.quant import LayerInfo, QuantizationLoader
from quire.core.errors import ConfigError
from quire.core.layers.adapters import ModelAdapters
from quire.core.layers.embedding import LMHead, VocabEmbedding
from quire.core.layers.linear import Linear
from quire.core.layers.norm import LayerNorm, RMSNorm
from quire.core.layers.parallel import TensorParallel
from quire.core.layers.position import LearnedPositions
from quire.core.layers.rotary import make_rope_table
from quire.core.layers.stage import PipelineStage
from quire.core.layers.vocab import VocabShard
from quire.core.ops.operation_table import OperationTable

__all__ = ["LayerBuilder"]


@dataclass
class LayerBuilder:
    """Sizes are those of the whole model; each method makes this rank's shard of a layer.

    Layer names are those of the checkpoint (``model.layers.0.mlp.down_proj``); a fused layer has a name of its own and
    its parts' names.
    """

    dtype: torch.dtype
    device: torch.device
    kv_dtype: torch.dtype
    block_size: int
    quant: QuantizationLoader
    parallel: TensorParallel = field(default_factory=TensorParallel)
    max_positions: int | None = None
    """Positions that rotary tables cover; without it none can be made."""
    operations: OperationTable = field(default_factory=OperationTable)
    """What runs norms, activations, rotary positions, embedding and head."""
    adapters: ModelAdapters | None = None
    """Where it is given, linear layers can have adapters, and are entered there."""
    _rope_tables: dict[str, Tensor] = field(default_factory=dict, repr=False)
    stage: PipelineStage = field(default_factory=PipelineStage)
    """Which layers of the model this rank has."""
    other_stage_names: list[str] = field(default_factory=list, init=False)
    """Modules that other stages have: their tensors are passed over when weights are loaded."""
    first_layer: int = field(default=0, init=False)
    """The first of this stage's layers, by its number in the model."""

    def make_layers(self, name: str, num_layers: int, make_layer: Callable[[int], nn.Module]) -> nn.ModuleList:
        """The layers of this stage, of ``num_layers`` whose names in the checkpoint are ``name`` and their number;
        ``make_layer`` makes the one of a number."""
        layers = self.stage.list_layers(num_layers)
        self.first_layer = layers.start
        self.other_stage_names += [f"{name}.{layer}" for layer in range(num_layers) if layer not in layers]
        return nn.ModuleList(make_layer(layer) for layer in layers)

    def is_on_stage(self, name: str, is_here: bool) -> bool:
        """``is_here``: whether this stage makes the module ``name``. If not, note that another one has it."""
        if not is_here:
            self.other_stage_names.append(name)
        return is_here

    def make_column_parallel_linear(
        self, name: str, in_features: int, parts: Mapping[str, int], bias: bool = False
    ) -> Linear:
        """A linear layer whose output features are divided between the ranks. ``parts`` are the checkpoint names and
        sizes of the projections that it fuses; one part is a plain layer."""
        sizes = [self.parallel.divide_evenly(size, f"the output size of {part}") for part, size in parts.items()]
        return self._make_linear(name, "linear", in_features, in_features, parts, sizes, "column", bias)

    def make_qkv_parallel_linear(
        self, name: str, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, bias: bool = False
    ) -> Linear:
        """The query, key and value projections of the attention module ``name``, fused, sharded by head."""
        self.count_local_heads(num_heads, num_kv_heads)
        num_heads_by_part = {"q_proj": num_heads, "k_proj": num_kv_heads, "v_proj": num_kv_heads}
        parts = {f"{name}.{part}": count for part, count in num_heads_by_part.items()}
        return self.make_head_parallel_linear(f"{name}.qkv_proj", hidden_size, parts, head_dim, bias)

    def make_head_parallel_linear(
        self, name: str, in_features: int, parts: Mapping[str, int], head_dim: int, bias: bool = False
    ) -> Linear:
        """A linear layer whose output features are whole heads. ``parts`` are the checkpoint names and numbers of heads
        of the projections that it fuses; several ranks hold the same head of a part that has fewer than ranks."""
        totals = {part: num_heads * head_dim for part, num_heads in parts.items()}
        sizes = [max(1, num_heads // self.parallel.size) * head_dim for num_heads in parts.values()]
        return self._make_linear(name, "linear", in_features, in_features, totals, sizes, "column", bias)

    def make_replicated_linear(
        self, name: str, in_features: int, parts: Mapping[str, int], bias: bool = False
    ) -> Linear:
        """A linear layer that every rank holds whole: its result is whole on each without a collective."""
        return self._make_linear(
            name, "linear", in_features, in_features, parts, list(parts.values()), "replicated", bias
        )

    def make_row_parallel_linear(self, name: str, in_features: int, out_features: int, bias: bool = False) -> Linear:
        """A linear layer whose input features are divided between the ranks; the ranks' results are summed."""
        local_features = self.parallel.divide_evenly(in_features, f"the input size of {name}")
        return self._make_linear(
            name, "linear", local_features, in_features, {name: out_features}, [out_features], "row", bias
        )

    def make_embedding(self, name: str, vocab_size: int, hidden_size: int) -> VocabEmbedding:
        """The token embedding."""
        return VocabEmbedding(name, vocab_size, hidden_size, self.parallel, self.dtype, self.device, self.operations)

    def make_lm_head(
        self, name: str, vocab_size: int, hidden_size: int, tied_to: VocabEmbedding | None = None
    ) -> LMHead:
        """The language model's head. ``tied_to`` an embedding, it has no weights but those."""
        if tied_to is not None:
            return LMHead(name, vocab_size, self.parallel, tied_to, self.operations)
        shard_size = VocabShard(vocab_size, self.parallel).size
        linear = self._make_linear(
            name, "lm_head", hidden_size, hidden_size, {name: vocab_size}, [shard_size], "column", False
        )
        return LMHead(name, vocab_size, self.parallel, linear, self.operations)

    def make_rms_norm(self, name: str, size: int, eps: float) -> RMSNorm:
        """An RMS norm, the same on every rank."""
        return RMSNorm(name, size, eps, self.dtype, self.device, self.operations)

    def make_layer_norm(self, name: str, size: int, eps: float = 1e-5, bias: bool = True) -> LayerNorm:
        """A layer norm, the same on every rank."""
        return LayerNorm(name, size, eps, self.dtype, self.device, bias)

    def make_learned_positions(self, name: str, num_rows: int, hidden_size: int, offset: int = 0) -> LearnedPositions:
        """A table of positions, the same on every rank; ``offset`` is the row of position 0."""
        return LearnedPositions(name, num_rows, hidden_size, self.dtype, self.device, offset)

    def make_rope_table(self, hf_config: Any, head_dim: int) -> Tensor:
        """The table of ``rotary.make_rope_table``, made once for equal parameters and shared by the layers."""
        if self.max_positions is None:
            raise ValueError("a LayerBuilder without max_positions makes no rotary table")
        key = f"{hf_config.rope_parameters}/{head_dim}"
        if key not in self._rope_tables:
            self._rope_tables[key] = make_rope_table(hf_config, head_dim, self.max_positions, self.device)
        return self._rope_tables[key]

    def count_local_heads(self, num_heads: int, num_kv_heads: int) -> tuple[int, int]:
        """Query and KV heads on this rank. Where KV heads are fewer than ranks, several ranks hold each of them."""
        size = self.parallel.size
        if num_heads % num_kv_heads:
            raise ConfigError(
                f"{num_heads} attention heads cannot share {num_kv_heads} KV heads evenly; mend config.json"
            )

        def is_possible(size: int) -> bool:
            return num_heads % size == 0 and (num_kv_heads % size == 0 or size % num_kv_heads == 0)

        if not is_possible(size):
            reason = f"num_attention_heads is {num_heads} and num_key_value_heads is {num_kv_heads}"
            raise self.parallel.refuse_size(reason, is_possible)
        return num_heads // size, max(1, num_kv_heads // size)

    def _make_linear(
        self,
        name: str,
        kind: Literal["linear", "lm_head"],
        in_features: int,
        in_total: int,
        parts: Mapping[str, int],
        part_sizes: list[int],
        shard: Literal["column", "row", "replicated"],
        bias: bool,
    ) -> Linear:
        info = LayerInfo(
            name=name,
            kind=kind,
            in_features=in_features,
            out_features=sum(part_sizes),
            part_names=tuple(parts),
            part_sizes=tuple(part_sizes),
            part_totals=tuple(parts.values()),
            in_total=in_total,
            shard=shard,
            dtype=self.dtype,
            bias=bias,
        )
        method = self.quant.get_linear_method(info)
        if self.adapters is not None:
            method = self.adapters.wrap_method(info, method, self.parallel.rank, self.parallel.size)
        layer = Linear(info, method, self.parallel, self.operations)
        method.create_weights(layer, info, self.device)
        return layer
