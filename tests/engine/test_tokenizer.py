"""Text becomes the tokens of ``tokenizer.json``, as transformers reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from quire.core.engine.tokenizer import Tokenizer

TRUNCATION = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 256, "pad_type_id": 0,
    "pad_token": "<|endoftext|>",
}  # fmt: skip


def copy_tokenizer(source: Path, folder: Path, **fields: Any) -> Path:
    """The tokenizer of ``source``, with ``fields`` set in its ``tokenizer.json``."""
    folder.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)
    edit(folder / "tokenizer.json", **fields)
    return folder


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **fields}), "utf-8")


@pytest.mark.parametrize("fields", [{"truncation": TRUNCATION}, {"padding": PADDING}], ids=["truncation", "padding"])
def test_prompts_are_neither_cut_nor_padded(tiny: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    folder = copy_tokenizer(tiny, tmp_path, **fields)
    tokenizer, reference = Tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)
    for text in ("abc", "a" * 100):
        assert tokenizer.encode(text) == reference(text)["input_ids"]
        messages = [{"role": "user", "content": text}]
        expected = reference.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert tokenizer.apply_chat_template(messages) == expected
