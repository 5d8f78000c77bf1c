"""The bundled models, loaded from a folder for ``PagedRunner``."""

from __future__ import annotations

from pathlib import Path

import torch

from quire.core.contracts.model import Model
from quire.core.layers.parallel import TensorParallel
from quire.core.loading.hf_config import get_architecture, read_hf_config
from quire.core.loading.loader import load_model
from quire.core.testing.paged_runner import PagedRunner
from quire.plugins.models import llama, mistral, qwen2, qwen3
from quire.plugins.quant.none import Unquantized

__all__ = ["CLASSES", "PagedRunner", "load"]

CLASSES = {
    "LlamaForCausalLM": llama.LlamaForCausalLM,
    "MistralForCausalLM": mistral.MistralForCausalLM,
    "Qwen2ForCausalLM": qwen2.Qwen2ForCausalLM,
    "Qwen3ForCausalLM": qwen3.Qwen3ForCausalLM,
}


def load(
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    block_size: int = 16,
    parallel: TensorParallel = TensorParallel(),
    load_format: str = "auto",
    seed: int = 0,
) -> Model:
    config = read_hf_config(path)
    return load_model(
        CLASSES[get_architecture(config)],
        config,
        path,
        dtype=dtype,
        device=torch.device(device),
        kv_dtype=dtype,
        block_size=block_size,
        quant=Unquantized({}),
        load_format=load_format,
        seed=seed,
        parallel=parallel,
    )
