"""config.json of transformers v4 and v5, and what is read from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from quire.core.errors import CheckpointError
from quire.core.hf_config import architecture, context_length, read_hf_config

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}


def test_v4_and_v5_spellings_agree(tmp_path: Path) -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}
    v4 = {"rope_theta": 5e5, "rope_scaling": scaling | {"rope_type": "llama3"}, "torch_dtype": "bfloat16"}
    v5 = {"rope_parameters": scaling | {"rope_type": "llama3", "rope_theta": 5e5}, "dtype": "bfloat16"}
    old, new = read(tmp_path, LLAMA | v4), read(tmp_path, LLAMA | v5)
    assert dict(old.rope_parameters) == dict(new.rope_parameters)
    assert old.dtype == new.dtype == torch.bfloat16
    assert architecture(old) == "LlamaForCausalLM"


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
    assert context_length(read(tmp_path, LLAMA | {"rope_scaling": rope})) == expected


def test_a_family_that_transformers_does_not_know(tmp_path: Path) -> None:
    """Left to plugins; code in the folder is not run."""
    raw = {"model_type": "brandnew", "architectures": ["BrandNewLM"], "auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "evil.py").write_text("raise SystemExit")
    assert architecture(read(tmp_path, raw)) == "BrandNewLM"


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
        architecture(read(tmp_path, {"model_type": "llama"}))


def read(folder: Path, raw: dict):
    (folder / "config.json").write_text(json.dumps(raw))
    return read_hf_config(folder)
