"""EOS tokens and sampling defaults of a model's files."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from quire.core.errors import CheckpointError, ConfigError
from quire.core.loading.generation_config import read_generation_defaults

QWEN = {
    "bos_token_id": 1, "do_sample": True, "eos_token_id": [2, 1], "pad_token_id": 1, "repetition_penalty": 1.05,
    "temperature": 0.7, "top_p": 0.8, "top_k": 20, "transformers_version": "4.37.0",
}  # fmt: skip
QWEN_DEFAULTS = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}


def write(folder: Path, keys: dict[str, Any], name: str = "generation_config.json") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(keys), "utf-8")
    return folder


def test_sampling_defaults_are_taken_and_named_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "quire")
    write(tmp_path, {**QWEN, "num_beams": 4, "top_k": None, "max_new_tokens": 64})
    defaults = read_generation_defaults([tmp_path], "auto", None).sampling_params
    assert defaults == {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.05, "max_tokens": 64}
    taken, unused = [record.getMessage() for record in caplog.records]
    assert "temperature 0.7, top_p 0.8, repetition_penalty 1.05, max_tokens 64" in taken
    assert unused.endswith("not used: num_beams")


def test_another_folder_none_and_single_keys_win(tmp_path: Path) -> None:
    model, other = write(tmp_path / "model", QWEN), write(tmp_path / "other", {"top_k": 5})
    assert read_generation_defaults([model], str(other), None).sampling_params == {"top_k": 5}
    for nothing in ("none", "vllm"):
        assert read_generation_defaults([model], nothing, None).sampling_params == {}
    changed = read_generation_defaults([model], "auto", '{"temperature": 0.2, "top_k": null, "eos_token_id": 9}')
    assert changed.sampling_params == {"temperature": 0.2, "top_p": 0.8, "repetition_penalty": 1.05}
    assert changed.eos_token_ids == (9,)
    assert read_generation_defaults([model], "none", {"min_p": 0.1}).sampling_params == {"min_p": 0.1}


def test_every_folder_and_file_adds_its_eos_tokens(tmp_path: Path) -> None:
    model, tokenizer = write(tmp_path / "model", QWEN), write(tmp_path / "tokenizer", {"eos_token_id": 7})
    write(model, {"eos_token_id": 3}, "config.json")
    assert read_generation_defaults([model, tokenizer, model], "none", None).eos_token_ids == (2, 1, 3, 7)
    assert read_generation_defaults([tmp_path], "auto", None).eos_token_ids == ()


@pytest.mark.parametrize(
    ("source", "override", "reason"),
    [
        ("nowhere", None, "nowhere: it has no generation_config.json"),
        ("auto", "{", "is not JSON"),
        ("auto", "[1]", "must be a JSON object"),
        ("auto", {"temprature": 1}, "did you mean temperature"),
        ("auto", {"top_p": 3}, "top_p must be between"),
    ],
)
def test_a_wrong_setting_is_refused(tmp_path: Path, source: str, override: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        read_generation_defaults([write(tmp_path, QWEN)], source, override)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").touch()
    with pytest.raises(CheckpointError, match=r"generation_config\.json cannot be read .*; download it again"):
        read_generation_defaults([tmp_path], "auto", None)
    write(tmp_path, {"temperature": -1})
    with pytest.raises(ConfigError, match=r"temperature must be between .*--generation-config none"):
        read_generation_defaults([tmp_path], "auto", None)
