"""config.json of transformers v4 and v5, and what is read from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from quire.core.engine.args import EngineArgs
from quire.core.engine.config_builder import build_config
from quire.core.errors import CheckpointError, PluginError
from quire.core.loading.hf_config import PlainConfig, get_architecture, get_context_length, read_hf_config
from quire.core.testing.tiny_models import make_tiny_model

MODELS = Path(__file__).parents[2] / "benchmarks" / "models"
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}
FULL = LLAMA | {
    "attention_bias": False,
    "hidden_act": "silu",
    "intermediate_size": 128,
    "mlp_bias": False,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 512,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}
EDITS = {
    "model_type": st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
    "sliding_window": st.sampled_from([None, 16]),
    "use_sliding_window": st.booleans(),
    "max_window_layers": st.just(1),
    "head_dim": st.sampled_from([None, 16, 32]),
    "num_key_value_heads": st.sampled_from([None, 2]),
    "attention_bias": st.booleans(),
    "mlp_bias": st.booleans(),
    "layer_types": st.just(["full_attention", "sliding_attention", "full_attention"]),
    "rope_scaling": st.sampled_from(
        [None, {"type": "linear", "factor": 2.0}, LLAMA3 | {"rope_type": "llama3"}, {"rope_type": "llama3", **LLAMA3}]
    ),
    "rope_parameters": st.just({"rope_type": "default", "rope_theta": 1e4}),
    "partial_rotary_factor": st.just(0.5),
    "dtype": st.sampled_from(["float16", "float32"]),
    "quantization_config": st.just({"quant_method": "awq", "bits": 4}),
}
READ = (
    *("architectures", "attention_bias", "head_dim", "hidden_act", "hidden_size", "intermediate_size"),
    *("max_position_embeddings", "mlp_bias", "model_type", "num_attention_heads", "num_hidden_layers", "rms_norm_eps"),
    *("num_key_value_heads", "quantization_config", "rope_parameters", "tie_word_embeddings", "vocab_size"),
)
"""What models and the engine read of a configuration."""


@given(st.fixed_dictionaries({}, optional=EDITS), st.sets(st.sampled_from(sorted(FULL.keys() - {"model_type"}))))
def test_what_is_read_is_what_transformers_reads(tmp_path_factory: pytest.TempPathFactory, edits, dropped) -> None:
    raw = {key: value for key, value in (FULL | edits).items() if key in edits or key not in dropped}
    folder = tmp_path_factory.mktemp("config")
    try:
        ours = read(folder, raw)
    except CheckpointError:
        with pytest.raises(Exception):  # noqa: B017 - whatever transformers says
            AutoConfig.from_pretrained(folder)
        return
    theirs = AutoConfig.from_pretrained(folder)
    names = [name for name in READ if hasattr(theirs, name)]
    assert {name: getattr(ours, name, None) for name in names} == {name: getattr(theirs, name) for name in names}
    assert str(ours.dtype).removeprefix("torch.") == str(theirs.dtype).removeprefix("torch.")
    if raw["model_type"] == "mistral":
        assert ours.sliding_window == theirs.sliding_window
    if raw["model_type"].startswith("qwen"):
        assert [t == "full_attention" for t in ours.layer_types] == [t == "full_attention" for t in theirs.layer_types]


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-3.1-8b-awq", "llama-3.2-1b", "qwen3-0.6b"])
def test_published_configurations_need_no_import_of_transformers(name: str) -> None:
    assert isinstance(read_hf_config(MODELS / name), PlainConfig)


def test_whatever_else_is_asked_is_answered_by_transformers() -> None:
    folder = MODELS / "qwen3-0.6b"
    config, theirs = read_hf_config(folder), AutoConfig.from_pretrained(folder)
    assert config.name_or_path == theirs.name_or_path == str(folder)
    assert config.attention_dropout == theirs.attention_dropout
    assert getattr(config, "quantization_config", None) is None and not hasattr(config, "no_such_field")


def test_v4_and_v5_spellings_agree(tmp_path: Path) -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}
    v4 = {"rope_theta": 5e5, "rope_scaling": scaling | {"rope_type": "llama3"}, "torch_dtype": "bfloat16"}
    v5 = {"rope_parameters": scaling | {"rope_type": "llama3", "rope_theta": 5e5}, "dtype": "bfloat16"}
    old, new = read(tmp_path, LLAMA | v4), read(tmp_path, LLAMA | v5)
    assert dict(old.rope_parameters) == dict(new.rope_parameters)
    assert old.dtype == new.dtype == torch.bfloat16
    assert get_architecture(old) == "LlamaForCausalLM"


def test_older_type_key(tmp_path: Path) -> None:
    config = read(tmp_path, LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert config.rope_parameters["rope_type"] == "linear" and config.rope_parameters["rope_theta"] == 10000.0


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (None, 4096),
        ({"rope_type": "linear", "factor": 4.0}, 16384),
        ({"rope_type": "dynamic", "factor": 2.0}, 8192),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 16384),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),
        ({"rope_type": "yarn", "factor": 4.0}, 16384),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            },
            4096,
        ),
    ],
)
def test_context_length(rope: dict | None, expected: int, tmp_path: Path) -> None:
    assert get_context_length(read(tmp_path, LLAMA | {"rope_scaling": rope})) == expected


def test_a_family_that_transformers_does_not_know(tmp_path: Path) -> None:
    """Left to plugins; code in the folder is not run."""
    raw = {"model_type": "brandnew", "architectures": ["BrandNewLM"], "auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "evil.py").write_text("raise SystemExit")
    assert get_architecture(read(tmp_path, raw)) == "BrandNewLM"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "has no config.json"),
        ("{", "cannot be read"),
        ("[]", "is not a JSON object"),
        (json.dumps(LLAMA | {"hidden_size": "many"}), "is not a valid configuration"),
    ],
)
def test_broken_configurations(text: str | None, reason: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_hf_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_architecture(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="names no architecture"):
        get_architecture(read(tmp_path, {"model_type": "llama"}))


def test_of_several_architectures_the_first_that_a_plugin_brings_is_taken(tmp_path: Path) -> None:
    path = make_tiny_model("llama", tmp_path)
    config = json.loads((path / "config.json").read_text())
    chosen = "LlamaForCausalLM"
    for names in (["LlamaOmni", chosen], [chosen, "Qwen3ForCausalLM"]):
        (path / "config.json").write_text(json.dumps({**config, "architectures": names}))
        model = build_config(EngineArgs(model=str(path), device="cpu")).config
        assert (model.model.architecture, model.plugin("model").name) == (chosen, chosen)
    (path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaOmni", "Other"]}))
    with pytest.raises(PluginError, match="LlamaOmni"):
        build_config(EngineArgs(model=str(path), device="cpu"))


def read(folder: Path, raw: dict):
    (folder / "config.json").write_text(json.dumps(raw))
    return read_hf_config(folder)
