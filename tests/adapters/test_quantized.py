"""Adapters beside quantized bases: the tokens of transformers' model of the dequantized weights with the adapter merged
into them. They read the activation as it is, whatever the base makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.adapters.conftest import merge_adapter
from tests.quant.test_fixtures import FIXTURES, load
from tests.quant.tolerances import FLOAT32, assert_near
from transformers import AutoConfig, AutoModelForCausalLM

from quire import LLM, LoRARequest, SamplingParams
from quire.core.layers.linear import Linear
from quire.core.testing.tiny_adapters import make_tiny_adapter
from quire.core.testing.tiny_models import make_tiny_model
from quire.testing import assert_matches_reference

CHECKPOINTS = [
    "awq-gemm-llama",
    "awq-gemv-mistral",
    "gptq-act-order-qwen2",
    "gptq-asym-v2-mistral",
    "ct-fp8-dynamic-qwen3",
    "ct-fp8-block-llama",
    "ct-w8a8-mistral",
    "ct-w4a16-asym-llama",
]
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
PROMPTS = [[60, *range(5, 5 + length)] for length in (3, 17, 8, 30)]
ADAPTERS = ["all", None, "qv", "all"]


def load_dequantized(path: Path, loader: str = "auto") -> Any:
    """transformers' model with the weights that the loader reads; that these are the tool's is what
    ``tests/quant/test_fixtures.py`` shows, and a checkpoint's logits beside it show again."""
    config = AutoConfig.from_pretrained(path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    weights = {
        name: tensor.float() for name, tensor in load_file(path / "model.safetensors").items() if "_proj" not in name
    }
    for layer in load(path, name=loader).modules():
        if isinstance(layer, Linear) and layer.info.kind == "linear":
            for tensor_name in ("weight", "bias"):
                fused = getattr(layer, tensor_name, None)
                parts = () if fused is None else fused.float().split(layer.info.part_sizes)
                weights |= {f"{part}.{tensor_name}": w for part, w in zip(layer.info.part_names, parts, strict=False)}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return model


def assert_adapted_tokens(path: Path, where: Path, loader: str = "auto", **settings: Any) -> None:
    folders = {
        "all": make_tiny_adapter(path, where / "all", rank=8, alpha=12, seed=1),
        "qv": make_tiny_adapter(path, where / "qv", rank=3, target_modules=["q_proj", "v_proj"], seed=2),
    }
    references = {name: merge_adapter(load_dequantized(path, loader), folder) for name, folder in folders.items()}
    references[None] = load_dequantized(path, loader)
    modules = {name: str(folder) for name, folder in folders.items()}
    llm = LLM(str(path), device="cpu", dtype="float32", max_model_len=64, lora_modules=modules, **settings)
    requests = [None if name is None else LoRARequest(name) for name in ADAPTERS]
    outputs = llm.generate(PROMPTS, GREEDY, lora_request=requests)
    llm.shutdown()
    for output, name in zip(outputs, ADAPTERS, strict=True):
        token_ids = output.outputs[0].token_ids
        assert_matches_reference(references[name], output.prompt_token_ids, token_ids, GREEDY, tolerance=2e-3)
    texts = [tuple(output.outputs[0].token_ids) for output in outputs]
    assert len(set(texts)) == len(texts), "the adapters change nothing"


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_of_each_format(base: Path, name: str, tmp_path: Path) -> None:
    expected = load_file(FIXTURES / name / "expected.safetensors")
    with torch.inference_mode():
        logits = load_dequantized(FIXTURES / name)(expected["tokens"][None]).logits[0]
    assert_near(logits[-len(expected["logits"]) :], expected["logits"], 10 * FLOAT32)
    assert_adapted_tokens(FIXTURES / name, tmp_path, tokenizer=str(base))


@pytest.mark.parametrize("quantization", ["fp8", "int8"])
def test_bases_that_are_quantized_at_load(quantization: str, tmp_path: Path) -> None:
    path = make_tiny_model("llama", tmp_path / "base")
    assert "quantization_config" not in json.loads((path / "config.json").read_text())
    assert_adapted_tokens(path, tmp_path, quantization, quantization=quantization)
