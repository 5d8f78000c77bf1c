"""The torch twins, against transformers' own functions and against loops."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from quire.core import ops
from quire.core.contracts.attention import KVLayout
from quire.core.layers.rotary import make_rope_table
from quire.core.testing.attention_problem import make_spec
from quire.core.testing.tiny_models import ROPE_VARIANTS

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_llamas(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(5, 96, dtype=dtype), torch.randn(5, 96, dtype=dtype)
    norm = LlamaRMSNorm(96, eps=1e-5).to(dtype)
    norm.weight.data.normal_()
    y, summed = ops.rms_norm(x, norm.weight, 1e-5, residual)
    assert torch.equal(summed, x + residual)
    assert torch.equal(y, norm(x + residual))
    assert torch.equal(ops.rms_norm(x, norm.weight, 1e-5)[0], norm(x))


@pytest.mark.parametrize("rope", ROPE_VARIANTS)
def test_rope_is_transformers(rope: str) -> None:
    """Tables and rotation, up to positions where float32 angles have lost digits."""
    config = LlamaConfig(head_dim=64, max_position_embeddings=40_000, rope_parameters=dict(ROPE_VARIANTS[rope]))
    positions = torch.tensor([0, 1, 63, 64, 1000, 39_999])
    cos, sin = LlamaRotaryEmbedding(config)(torch.empty(1), positions[None])
    q, k = torch.randn(6, 4, 64), torch.randn(6, 2, 64)
    expected = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    table = make_rope_table(config, 64, 40_000, CPU)
    for x, want in zip((q, k), expected, strict=True):
        torch.testing.assert_close(ops.apply_rope(x, table[positions]), want[0].transpose(0, 1), atol=2e-3, rtol=0)
        near = ops.apply_rope(x, table[positions])[:4]
        torch.testing.assert_close(near, want[0].transpose(0, 1)[:4], atol=2e-5, rtol=0)


def test_partial_rotation_leaves_the_rest() -> None:
    x, table = torch.randn(3, 2, 64), torch.randn(3, 48)
    rotated = ops.apply_rope(x, table)
    assert torch.equal(rotated[..., 48:], x[..., 48:])
    torch.testing.assert_close(rotated[..., :48], ops.apply_rope(x[..., :48], table))


@pytest.mark.parametrize("order", ["head", "slot"])
def test_kv_goes_to_its_slots_in_either_layout(order: str) -> None:
    spec = make_spec(num_kv_heads=2, block_size=4)
    layout = KVLayout(spec, order)
    kv = layout.view(torch.zeros(5, layout.bytes_per_block, dtype=torch.uint8))
    k, v = torch.randn(3, 2, 64), torch.randn(3, 2, 64)
    slots = torch.tensor([18, 5, 7])
    ops.write_kv(k, v, kv, slots)
    for i, slot in enumerate(slots.tolist()):
        assert torch.equal(kv.k[slot // 4, :, slot % 4], k[i])
        assert torch.equal(kv.v[slot // 4, :, slot % 4], v[i])
    assert kv.k.count_nonzero() == k.numel()


def test_embedding_shards_sum_to_the_whole() -> None:
    weight, ids = torch.randn(10, 6), torch.tensor([0, 4, 5, 9, 3], dtype=torch.int32)
    shards = [ops.embedding(ids, weight[first : first + 5], first, is_whole=False) for first in (0, 5)]
    assert torch.equal(sum(shards), ops.embedding(ids, weight))


def test_silu_and_mul() -> None:
    gate_up = torch.randn(3, 8)
    assert torch.equal(ops.silu_and_mul(gate_up), torch.nn.functional.silu(gate_up[:, :4]) * gate_up[:, 4:])
