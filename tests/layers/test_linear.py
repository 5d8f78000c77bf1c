"""The shards of every rank make up the whole layer, fused or not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from quire.core.errors import CheckpointError

from .shards import load_tensors, make_builder

IN, OUT = 24, 12


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(5, IN)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_column_shards_side_by_side_are_the_merged_parts(x: torch.Tensor, ranks: int) -> None:
    weights = {part: torch.randn(OUT, IN) for part in ("gate", "up")}
    biases = {part: torch.randn(OUT) for part in weights}
    tensors = {f"{part}.weight": weight for part, weight in weights.items()}
    tensors |= {f"{part}.bias": bias for part, bias in biases.items()}
    shards: dict[str, list[torch.Tensor]] = {"gate": [], "up": []}
    for rank in range(ranks):
        layer = make_builder(rank, ranks).make_column_parallel_linear("gate_up", IN, dict.fromkeys(weights, OUT), True)
        load_tensors(layer, tensors)
        for part, shard in zip(shards, layer(x).split(OUT // ranks, -1), strict=True):
            shards[part].append(shard)
    for part, weight in weights.items():
        torch.testing.assert_close(torch.cat(shards[part], -1), F.linear(x, weight, biases[part]))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_row_shards_sum_to_the_whole(x: torch.Tensor, ranks: int) -> None:
    weight = torch.randn(OUT, IN)
    results = []
    for rank, share in enumerate(x.chunk(ranks, -1)):
        layer = make_builder(rank, ranks).make_row_parallel_linear("o", IN, OUT)
        load_tensors(layer, {"o.weight": weight})
        results.append(layer(share))
    torch.testing.assert_close(sum(results), F.linear(x, weight))


def test_a_row_parallel_bias_is_added_once(x: torch.Tensor) -> None:
    """After the ranks' sum, so not by each of them."""
    weight, bias = torch.randn(OUT, IN), torch.randn(OUT)
    layer = make_builder(0, 2).make_row_parallel_linear("o", IN, OUT, bias=True)
    load_tensors(layer, {"o.weight": weight, "o.bias": bias})
    share = x[:, : IN // 2]
    torch.testing.assert_close(layer(share), F.linear(share, weight[:, : IN // 2]) + bias)


@pytest.mark.parametrize(("ranks", "kv_heads"), [(1, 2), (2, 2), (4, 2), (4, 1)])
def test_a_rank_has_the_kv_heads_of_its_query_heads(x: torch.Tensor, ranks: int, kv_heads: int) -> None:
    heads, head_dim = 8, 3
    weights = {
        "attn.q_proj": torch.randn(heads * head_dim, IN),
        "attn.k_proj": torch.randn(kv_heads * head_dim, IN),
        "attn.v_proj": torch.randn(kv_heads * head_dim, IN),
    }
    whole = {part: F.linear(x, weight).unflatten(-1, (-1, head_dim)) for part, weight in weights.items()}
    for rank in range(ranks):
        builder = make_builder(rank, ranks)
        local_heads, local_kv_heads = builder.count_local_heads(heads, kv_heads)
        layer = builder.make_qkv_parallel_linear("attn", IN, heads, kv_heads, head_dim)
        load_tensors(layer, {f"{part}.weight": weight for part, weight in weights.items()})
        sizes = [count * head_dim for count in (local_heads, local_kv_heads, local_kv_heads)]
        q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in layer(x).split(sizes, -1))
        for head in range(local_heads):
            global_head = rank * local_heads + head
            kv_head = head * local_kv_heads // local_heads
            global_kv_head = global_head * kv_heads // heads
            torch.testing.assert_close(q[:, head], whole["attn.q_proj"][:, global_head])
            torch.testing.assert_close(k[:, kv_head], whole["attn.k_proj"][:, global_kv_head])
            torch.testing.assert_close(v[:, kv_head], whole["attn.v_proj"][:, global_kv_head])


def test_a_tensor_of_another_shape_is_refused_by_name() -> None:
    layer = make_builder().make_row_parallel_linear("model.o", IN, OUT)
    with pytest.raises(CheckpointError, match=r"'model.o.weight' has shape \[12, 23\]"):
        layer.weight_loaders()["model.o.weight"](torch.zeros(OUT, IN - 1))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_vocabulary_shards_make_up_embedding_and_head(ranks: int) -> None:
    """Also where the last rank's shard is padded: 10 tokens on 3 ranks."""
    torch.manual_seed(1)
    vocab_size, hidden_size = 10, 4
    weight, ids = torch.randn(vocab_size, hidden_size), torch.tensor([0, 9, 3, 5], dtype=torch.int32)
    hidden = torch.randn(3, hidden_size)
    embedded, logits = [], []
    for rank in range(ranks):
        builder = make_builder(rank, ranks)
        embedding = builder.make_embedding("embed", vocab_size, hidden_size)
        load_tensors(embedding, {"embed.weight": weight})
        embedded.append(embedding(ids))
        head = builder.make_lm_head("lm_head", vocab_size, hidden_size)
        load_tensors(head.weight_source, {"lm_head.weight": weight})
        logits.append(head(hidden))
    torch.testing.assert_close(sum(embedded), weight[ids.long()])
    torch.testing.assert_close(torch.cat(logits, -1)[:, :vocab_size], hidden @ weight.T)
