"""Text becomes the tokens of ``tokenizer.json``, as transformers reads it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as BackendTokenizer
from transformers import AutoTokenizer

from quire.core.engine.tokenizer import Tokenizer
from quire.core.errors import CheckpointError, InvalidRequestError
from quire.core.loading.hf_config import read_tokenizer_hint

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


def test_byte_level_tokenizer_labelled_llama_keeps_its_spaces(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSeek-R1-Distill-Llama and others, also with the transformers that rebuild them as SentencePiece."""
    folder = copy_tokenizer(tiny, tmp_path)
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("\u0120", "h"), ("\u0120h", "i"), ("h", "i")]
    vocab |= {first + second: len(vocab) + i for i, (first, second) in enumerate(merges)}
    original = BackendTokenizer(models.BPE(vocab, merges))
    original.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    original.decoder = decoders.ByteLevel()
    original.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    original.save(str(folder / "tokenizer.json"))
    edit(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")
    load = AutoTokenizer.from_pretrained

    def load_as_transformers_5_15(*args: Any, **kwargs: Any) -> Any:
        tokenizer = load(*args, **kwargs)
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
        backend.add_tokens([AddedToken("<|extra|>", special=True)])
        return tokenizer

    text = "hi hi  there\n\n\u00dcber"
    for patched in (False, True):
        if patched:
            monkeypatch.setattr(AutoTokenizer, "from_pretrained", load_as_transformers_5_15)
        tokenizer = Tokenizer(str(folder))
        assert tokenizer.encode(text) == original.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("hi<|extra|>")[-1] == original.get_vocab_size()


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_class_is_the_one_that_transformers_chooses(tiny: Path, tmp_path: Path, model_type: str) -> None:
    folder = copy_tokenizer(tiny, tmp_path)
    fields = {"use_sliding_window": False, "head_dim": 32, "attention_bias": False, "sliding_window": None}
    config = json.loads((tiny / "config.json").read_text()) | fields | {"model_type": model_type}
    (folder / "config.json").write_text(json.dumps(config))
    hinted = 0
    for name in ("PreTrainedTokenizerFast", "LlamaTokenizerFast", "Qwen2Tokenizer", "GPT2Tokenizer", "Unknown", None):
        edit(folder / "tokenizer_config.json", tokenizer_class=name)
        tokenizer, reference = Tokenizer(str(folder)).hf_tokenizer, AutoTokenizer.from_pretrained(folder)
        assert type(tokenizer) is type(reference)
        assert tokenizer.backend_tokenizer.to_str() == reference.backend_tokenizer.to_str()
        hinted += read_tokenizer_hint(folder) is not None
    assert hinted == 5  # the model's own class is imported where no class of a tokenizer is named


@pytest.mark.parametrize("in_files", [False, True], ids=["tokenizer_config.json", "additional_chat_templates"])
def test_of_named_chat_templates_the_one_for_tools_or_the_default_is_taken(
    tiny: Path, tmp_path: Path, in_files: bool
) -> None:
    default = "{% for m in messages %}D:{{ m.content }}{% endfor %}"
    tool_use = "{% for m in messages %}T{{ (tools or []) | length }}:{{ m.content }}{% endfor %}"
    folder = copy_tokenizer(tiny, tmp_path)
    if in_files:
        edit(folder / "tokenizer_config.json", chat_template=None)
        (folder / "chat_template.jinja").write_text(default, "utf-8")
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(tool_use, "utf-8")
    else:
        named = [{"name": "default", "template": default}, {"name": "tool_use", "template": tool_use}]
        edit(folder / "tokenizer_config.json", chat_template=named)
    tokenizer, reference = Tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "hi"}]
    for tools in (None, [{"type": "function", "function": {"name": "f", "parameters": {}}}]):
        expected = reference.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(tokenizer.apply_chat_template(messages, tools=tools)) == expected
    assert tokenizer.decode(tokenizer.apply_chat_template(messages, chat_template="tool_use")) == "T0:hi"
    by_name = Tokenizer(str(folder), "tool_use")
    assert by_name.decode(by_name.apply_chat_template(messages)) == "T0:hi"


def test_named_chat_templates_without_a_default_are_listed(tiny: Path, tmp_path: Path) -> None:
    folder = copy_tokenizer(tiny, tmp_path)
    edit(folder / "tokenizer_config.json", chat_template=[{"name": "rag", "template": "{{ messages }}"}])
    with pytest.raises(InvalidRequestError, match="no default chat template, only rag"):
        Tokenizer(str(folder)).apply_chat_template([{"role": "user", "content": "hi"}])


def test_tokenizer_model_alone_says_which_packages_read_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_tokenizer(tiny, tmp_path)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\n")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model needs .*; pip install sentencepiece protobuf"):
        Tokenizer(str(folder))


def test_a_text_that_is_too_long_is_found_without_tokenizing_it_whole(tiny: Path, monkeypatch) -> None:
    tokenizer = Tokenizer(str(tiny))
    encode, lengths = tokenizer.encode, []

    def count(text: str, add_special_tokens: bool = True) -> list[int]:
        lengths.append(len(text))
        return encode(text, add_special_tokens)

    monkeypatch.setattr(tokenizer, "encode", count)
    for text in ("a b " * 1_500_000, " " * 6_000_000, "\u00e9" * 6_000_000, "x" * 6_000_000):
        lengths.clear()
        num_tokens = tokenizer.find_excess(text, 500)
        assert num_tokens is not None and num_tokens > 500
        assert sum(lengths) <= 200_000


@pytest.mark.parametrize("text", ["a b ", "hello world", " ", "\n\n\t", "\u00e9\u4e2d", "0123456789", "x"])
def test_a_text_that_may_fit_is_not_found_too_long(tiny: Path, text: str) -> None:
    tokenizer = Tokenizer(str(tiny))
    for length in (1, 100, 5000, 200_000):
        long_text = (text * length)[:length]
        num_tokens = len(tokenizer.encode(long_text))
        assert tokenizer.find_excess(long_text, num_tokens) is None
        found = tokenizer.find_excess(long_text, num_tokens // 3)
        assert found is None or found <= num_tokens
