"""Makes a model's layers for one rank: device, dtype, sharding and quantization are decided here, once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from quire.core.contracts.quant import LayerInfo, QuantizationLoader
from quire.core.errors import ConfigError
from quire.core.layers.attention import AttentionShape
from quire.core.layers.embedding import LMHead, VocabEmbedding, compute_rows_per_rank
from quire.core.layers.linear import Linear
from quire.core.layers.norm import RMSNorm
from quire.core.layers.parallel import TensorParallel
from quire.core.layers.rotary import make_rope_table

__all__ = ["LayerBuilder"]


@dataclass
class LayerBuilder:
    """Sizes are those of the whole model; each method gives this rank's layer.

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
    """Positions the rotary tables cover; None: all that config.json allows."""
    _rope_tables: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def make_column_parallel_linear(
        self, name: str, inputs: int, parts: Mapping[str, int], bias: bool = False
    ) -> Linear:
        """Output features shared out over the ranks; ``parts`` are the fused parts' checkpoint names and sizes."""
        sizes = [self.parallel.divide_evenly(size, f"the output size of {part}") for part, size in parts.items()]
        return self._make_linear(name, "linear", inputs, inputs, parts, sizes, "column", bias)

    def make_qkv_parallel_linear(self, name: str, shape: AttentionShape) -> Linear:
        """The query, key and value projections of the attention module ``name``, fused, sharded by head."""
        heads, kv_heads = self.count_local_heads(shape.num_heads, shape.num_kv_heads)
        counts = {"q_proj": shape.num_heads, "k_proj": shape.num_kv_heads, "v_proj": shape.num_kv_heads}
        parts = {f"{name}.{part}": count * shape.head_dim for part, count in counts.items()}
        sizes = [heads * shape.head_dim, kv_heads * shape.head_dim, kv_heads * shape.head_dim]
        hidden = shape.hidden
        return self._make_linear(f"{name}.qkv_proj", "linear", hidden, hidden, parts, sizes, "column", shape.qkv_bias)

    def make_row_parallel_linear(self, name: str, inputs: int, outputs: int, bias: bool = False) -> Linear:
        """Input features shared out over the ranks; the ranks' results are summed."""
        mine = self.parallel.divide_evenly(inputs, f"the input size of {name}")
        return self._make_linear(name, "linear", mine, inputs, {name: outputs}, [outputs], "row", bias)

    def make_embedding(self, name: str, vocab_size: int, hidden: int) -> VocabEmbedding:
        """The token embedding."""
        return VocabEmbedding(name, vocab_size, hidden, self.parallel, self.dtype, self.device)

    def make_lm_head(self, name: str, vocab_size: int, hidden: int, tied_to: VocabEmbedding | None = None) -> LMHead:
        """The head; ``tied_to`` an embedding it has no weights of its own."""
        if tied_to is not None:
            return LMHead(vocab_size, self.parallel, tied_to)
        rows = compute_rows_per_rank(vocab_size, self.parallel)
        linear = self._make_linear(name, "lm_head", hidden, hidden, {name: vocab_size}, [rows], "column", False)
        return LMHead(vocab_size, self.parallel, linear)

    def make_rms_norm(self, name: str, size: int, eps: float) -> RMSNorm:
        """An RMS norm, the same on every rank."""
        return RMSNorm(name, size, eps, self.dtype, self.device)

    def make_rope_table(self, hf_config: Any, head_dim: int) -> Tensor:
        """The rotary table (max_positions, rotary_dim) float32 for ``config.rope_parameters``; made once, shared."""
        key = f"{hf_config.rope_parameters}/{head_dim}"
        if key not in self._rope_tables:
            self._rope_tables[key] = make_rope_table(hf_config, head_dim, self.max_positions, self.device)
        return self._rope_tables[key]

    def count_local_heads(self, num_heads: int, num_kv_heads: int) -> tuple[int, int]:
        """Query and KV heads on this rank. Fewer KV heads than ranks: each is held by several."""
        size = self.parallel.size
        if num_heads % num_kv_heads:
            raise ConfigError(
                f"{num_heads} attention heads cannot share {num_kv_heads} KV heads evenly; mend config.json"
            )
        heads = self.parallel.divide_evenly(num_heads, "num_attention_heads")
        if num_kv_heads < size and size % num_kv_heads == 0:
            return heads, 1
        return heads, self.parallel.divide_evenly(num_kv_heads, "num_key_value_heads")

    def _make_linear(
        self,
        name: str,
        kind: Literal["linear", "lm_head"],
        inputs: int,
        in_total: int,
        parts: Mapping[str, int],
        sizes: list[int],
        shard: Literal["column", "row"],
        bias: bool,
    ) -> Linear:
        info = LayerInfo(
            name=name,
            kind=kind,
            in_features=inputs,
            out_features=sum(sizes),
            part_names=tuple(parts),
            part_sizes=tuple(sizes),
            part_totals=tuple(parts.values()),
            in_total=in_total,
            shard=shard,
            dtype=self.dtype,
            bias=bias,
        )
        method = self.quant.get_linear_method(info)
        layer = Linear(info, method, self.parallel)
        method.create_weights(layer, info, self.device)
        return layer
