"""Random LoRA adapters of a model folder, in the layout that PEFT writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from quire.core.loading.hf_config import read_hf_config

__all__ = ["LINEAR_MODULES", "get_module_shapes", "make_tiny_adapter"]

LINEAR_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of Llama and its relatives."""


def get_module_shapes(model_path: str | Path) -> dict[str, tuple[int, int]]:
    """Name in the checkpoint -> (out_features, in_features) of every linear layer of a model of Llama's shape."""
    config = read_hf_config(model_path)
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = {
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (kv_heads, hidden),
        "self_attn.v_proj": (kv_heads, hidden),
        "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    layers = range(config.num_hidden_layers)
    return {f"model.layers.{layer}.{name}": shape for layer in layers for name, shape in shapes.items()}


def make_tiny_adapter(
    model_path: str | Path,
    path: str | Path,
    *,
    rank: int = 4,
    alpha: float | None = None,
    target_modules: Sequence[str] = LINEAR_MODULES,
    seed: int = 0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    **config_fields: Any,
) -> Path:
    """Save a random adapter of the model in ``model_path`` to ``path`` and return the path. ``scale`` is how large what
    it adds is beside random weights; ``config_fields`` are further fields of ``adapter_config.json``."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, (out_features, in_features) in get_module_shapes(model_path).items():
        if name.rpartition(".")[2] in target_modules:
            key = f"base_model.model.{name}"
            a = torch.randn(rank, in_features, generator=generator) * in_features**-0.5
            b = torch.randn(out_features, rank, generator=generator) * scale
            tensors |= {f"{key}.lora_A.weight": a.to(dtype), f"{key}.lora_B.weight": b.to(dtype)}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model_path),
        "r": rank,
        "lora_alpha": rank if alpha is None else alpha,
        "target_modules": list(target_modules),
        "bias": "none",
        **config_fields,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    return folder
