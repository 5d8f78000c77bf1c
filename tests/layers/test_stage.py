"""How layers are divided between the stages of a pipeline, and that a stage loads its own tensors alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quire.core.errors import CheckpointError, ConfigError
from quire.core.layers.stage import PipelineStage
from quire.core.loading.hf_config import read_hf_config
from quire.core.loading.loader import load_model
from quire.core.testing.tiny_models import make_tiny_model
from quire.plugins.models.llama import LlamaForCausalLM
from quire.plugins.quant.none import Unquantized


class Undivided(LlamaForCausalLM):
    supports_pipeline_parallel = False


def load_stage(path: Path, stage: PipelineStage, model_class: type = LlamaForCausalLM, load_format: str = "auto"):
    return load_model(
        model_class,
        read_hf_config(path),
        path,
        dtype=torch.float32,
        device=torch.device("cpu"),
        kv_dtype=torch.float32,
        block_size=16,
        quant=Unquantized({}),
        load_format=load_format,
        progress=False,
        stage=stage,
    )


@pytest.mark.parametrize(
    ("num_layers", "size", "counts"),
    [(32, 2, [16, 16]), (33, 2, [17, 16]), (30, 4, [7, 8, 8, 7]), (31, 4, [8, 8, 8, 7]), (3, 3, [1, 1, 1])],
)
def test_stages_are_even(num_layers: int, size: int, counts: list[int]) -> None:
    stages = [PipelineStage(index, size).list_layers(num_layers) for index in range(size)]
    assert [len(stage) for stage in stages] == counts
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))


def test_a_stage_has_a_layer() -> None:
    with pytest.raises(ConfigError, match="4 is more than the 3 layers of the model; give 1 to 3"):
        PipelineStage(0, 4).list_layers(3)


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize("tied", [False, True])
def test_stages_together_have_every_weight_once(tmp_path: Path, tied: bool, load_format: str) -> None:
    """But for an embedding that is the head too."""
    path = make_tiny_model("llama", tmp_path, num_hidden_layers=3, tie_word_embeddings=tied)
    whole = load_stage(path, PipelineStage(), load_format=load_format)
    stages = [load_stage(path, PipelineStage(index, 2), load_format=load_format) for index in range(2)]
    counts = [sum(p.numel() for p in model.parameters()) for model in (whole, *stages)]
    embedding = whole.embed_tokens.weight.numel()
    assert sum(counts[1:]) == counts[0] + (embedding if tied else 0)
    assert [len(stage.layers) for stage in stages] == [2, 1]
    layers = [layer for stage in stages for layer in stage.layers]
    parts = (stages[0].embed_tokens, *layers, stages[1].lm_head)
    for part, same in zip(parts, (whole.embed_tokens, *whole.layers, whole.lm_head), strict=True):
        torch.testing.assert_close(part.state_dict(), same.state_dict(), rtol=0, atol=0)
    assert (stages[0].norm, stages[0].lm_head) == (None, None) and (stages[1].embed_tokens is not None) == tied


def test_what_no_stage_has_is_found(tmp_path: Path) -> None:
    path = make_tiny_model("llama", tmp_path)
    file = path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"model.layers.1.mlp.extra.weight": torch.ones(2)}, file, {"format": "pt"})
    load_stage(path, PipelineStage(0, 2))
    with pytest.raises(CheckpointError, match="extra"):
        load_stage(path, PipelineStage(1, 2))


def test_a_model_that_cannot_be_divided_says_so(tmp_path: Path) -> None:
    path = make_tiny_model("llama", tmp_path)
    with pytest.raises(ConfigError, match=r"Undivided cannot be divided into stages: .* pipeline_parallel_size 2"):
        load_stage(path, PipelineStage(0, 2), Undivided)
