"""Rotary tables are those of transformers, in every variant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from quire.core.errors import CheckpointError
from quire.core.layers.rotary import list_rope_types, make_rope_table
from quire.core.testing.tiny_models import ROPE_VARIANTS

CPU = torch.device("cpu")
VARIANTS: dict[str, dict[str, Any]] = {name: dict(parameters) for name, parameters in ROPE_VARIANTS.items()} | {
    "yarn mscale": {**ROPE_VARIANTS["yarn"], "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False},
    "yarn attention factor": {**ROPE_VARIANTS["yarn"], "attention_factor": 1.7},
}


def make_config(parameters: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(head_dim=32, max_position_embeddings=256, rope_parameters=parameters)


@pytest.mark.parametrize("variant", VARIANTS)
def test_table_is_transformers(variant: str) -> None:
    config = make_config(VARIANTS[variant])
    positions = torch.arange(200)
    cos, sin = LlamaRotaryEmbedding(config)(torch.empty(1), positions[None])  # (1, 200, 32), each half the same
    table = make_rope_table(config, 32, 200, CPU)  # (200, 32): cosines, then sines
    torch.testing.assert_close(table[:, :16], cos[0, :, :16], atol=1e-5, rtol=0)
    torch.testing.assert_close(table[:, 16:], sin[0, :, :16], atol=1e-5, rtol=0)


def test_an_unknown_variant_is_refused_with_those_there_are() -> None:
    config = make_config(VARIANTS["default"])
    config.rope_parameters = {"rope_type": "spiral", "rope_theta": 1e4}
    with pytest.raises(CheckpointError, match=r"'spiral' in config.json is not supported.*default, dynamic, linear"):
        make_rope_table(config, 32, 8, CPU)
    assert list_rope_types() == sorted(ROPE_VARIANTS)
