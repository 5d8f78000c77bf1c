"""The builder makes each rank's shard of a layer, under the names of the checkpoint."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from quire.core.errors import ConfigError

from .shards import make_builder


def test_a_fused_layer_loads_its_parts_by_their_own_names() -> None:
    layer = make_builder(rank=1, size=2).make_column_parallel_linear("mlp.gate_up", 8, {"mlp.gate": 12, "mlp.up": 12})
    assert layer.name == "mlp.gate_up"
    assert list(layer.weight_loaders()) == ["mlp.gate.weight", "mlp.up.weight"]
    info = layer.info
    assert (info.in_features, info.out_features, info.part_sizes, info.part_totals) == (8, 12, (6, 6), (12, 12))


def test_a_row_parallel_layer_has_a_share_of_the_inputs() -> None:
    layer = make_builder(rank=1, size=2).make_row_parallel_linear("o", 8, 6, bias=True)
    assert (layer.info.in_features, layer.info.in_total, layer.info.out_features) == (4, 8, 6)
    assert list(layer.weight_loaders()) == ["o.weight", "o.bias"]


@pytest.mark.parametrize(
    ("ranks", "heads", "kv_heads", "local"),
    [(1, 8, 2, (8, 2)), (2, 8, 2, (4, 1)), (4, 8, 2, (2, 1)), (8, 8, 1, (1, 1)), (4, 12, 4, (3, 1))],
)
def test_heads_are_divided_and_few_kv_heads_are_held_by_several_ranks(
    ranks: int, heads: int, kv_heads: int, local: tuple[int, int]
) -> None:
    builder = make_builder(rank=ranks - 1, size=ranks)
    assert builder.count_local_heads(heads, kv_heads) == local
    info = builder.make_qkv_parallel_linear("attn", 32, heads, kv_heads, 4).info
    assert info.part_names == ("attn.q_proj", "attn.k_proj", "attn.v_proj")
    assert info.part_sizes == (local[0] * 4, local[1] * 4, local[1] * 4)
    assert info.part_totals == (heads * 4, kv_heads * 4, kv_heads * 4)


@pytest.mark.parametrize(
    ("ranks", "heads", "kv_heads", "message"),
    [
        (1, 7, 2, "7 attention heads cannot share 2 KV heads evenly"),
        (3, 8, 8, "num_attention_heads is 8 and .* which 3 ranks cannot share evenly; .* of 1, 2, 4 or 8"),
        (4, 12, 6, "num_key_value_heads is 6, which 4 ranks cannot share evenly; .* of 1, 2, 3, 6 or 12"),
        (5, 7, 7, "5 ranks cannot share evenly; use a tensor_parallel_size of 1 or 7"),
    ],
)
def test_heads_that_cannot_be_divided_are_refused(ranks: int, heads: int, kv_heads: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_builder(size=ranks).count_local_heads(heads, kv_heads)


def test_a_tied_head_has_the_weights_of_the_embedding() -> None:
    builder = make_builder()
    embedding = builder.make_embedding("embed", 10, 4)
    embedding.weight.data.normal_()
    head = builder.make_lm_head("lm_head", 10, 4, embedding)
    assert head.tied and [name for name, _ in head.named_parameters()] == ["weight_source.weight"]
    hidden = torch.randn(3, 4)
    torch.testing.assert_close(head(hidden), hidden @ embedding.weight.T)


def test_layers_share_one_rotary_table() -> None:
    builder = make_builder(max_positions=32)
    config = LlamaConfig(head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    table = builder.make_rope_table(config, 8)
    assert table.shape == (32, 8) and builder.make_rope_table(config, 8) is table
    assert builder.make_rope_table(config, 4) is not table
    with pytest.raises(ValueError, match="max_positions"):
        make_builder().make_rope_table(config, 8)
