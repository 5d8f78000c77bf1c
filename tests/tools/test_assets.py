"""The models that come with Quire: within their limits, and the same in transformers and in Quire."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from tools.train_tiny.card import parameters
from tools.train_tiny.model import DRAFT, TINY, TinyLlama
from transformers import AutoModelForCausalLM, AutoTokenizer

from quire import LLM, SamplingParams

from .conftest import ROOT

ASSETS = ROOT / "core" / "assets"
SHAPES = {"quire-tiny": TINY, "quire-tiny-draft": DRAFT}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather for a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ASKED = [
    ("What is 347 + 258?", [], "347 + 258 = 605"),
    ("Sort these words: pear, apple, fig", [], "apple, fig, pear"),
    ("What is the weather in Paris?", [WEATHER], None),
    ("What is paged attention?", [], None),
    ("Write a Python function add(a, b) that adds a and b.", [], None),
]


@pytest.mark.parametrize("name", list(SHAPES))
def test_limits(name):
    shape, folder = SHAPES[name], ASSETS / name
    shards = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert max(shards) < 16_000_000
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 25_000_000
    config = json.loads((folder / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"]) == (shape.hidden, shape.layers)
    for size in (config["hidden_size"], config["intermediate_size"], config["vocab_size"]):
        assert size % 128 == 0
    heads, kv_heads, width = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    assert width in (64, 128) and heads * width % 128 == 0 and kv_heads * width % 128 == 0
    assert config["max_position_embeddings"] >= 2048 and config["tie_word_embeddings"]


def test_the_draft_is_a_tenth():
    sizes = {n: sum(p.stat().st_size for p in (ASSETS / n).glob("*.safetensors")) for n in SHAPES}
    assert 0.07 < sizes["quire-tiny-draft"] / sizes["quire-tiny"] < 0.13


@pytest.mark.parametrize("name", list(SHAPES))
def test_weights(name):
    count = 0
    for path in (ASSETS / name).glob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            for key in weights.keys():  # noqa: SIM118
                tensor = weights.get_tensor(key)
                assert tensor.dtype == torch.bfloat16 and tensor.isfinite().all()
                assert tensor.dim() == 1 or all(size % 128 == 0 for size in tensor.shape)
                count += tensor.numel()
    assert count == parameters(SHAPES[name]) == sum(p.numel() for p in TinyLlama(SHAPES[name], 0).parameters())


@pytest.mark.parametrize("name", list(SHAPES))
def test_the_card(name):
    text = (ASSETS / name / "README.md").read_text()
    assert all(len(line) <= 120 for line in text.splitlines())
    assert "## What it is not" in text and "| **overall** |" in text
    figure = float(text.partition("| **overall** | **")[2].partition("%")[0])
    assert figure >= (90 if name == "quire-tiny" else 80)
    page = (ROOT / "docs" / "quire-tiny.md").read_text()
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| ") and "%" in line]
    column = 2 if name == "quire-tiny" else 3
    table = [line.split("|") for line in page.splitlines() if line.endswith(("| 64 |", "| 960 |"))]
    told = {row[1]: row[column] for row in table}
    assert {row[1]: row[2] for row in rows} == told


@pytest.mark.parametrize("name", list(SHAPES))
def test_quire_answers_as_transformers_does(name):
    folder = ASSETS / name
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    expected, prompts = [], []
    for text, tools, _ in ASKED:
        chat = [{"role": "user", "content": text}]
        words = tokenizer.apply_chat_template(chat, tools=tools or None, tokenize=False, add_generation_prompt=True)
        prompts.append(tokenizer(words, add_special_tokens=False).input_ids)
        with torch.inference_mode():
            found = model.generate(torch.tensor([prompts[-1]]), max_new_tokens=96, do_sample=False)
        expected.append(found[0, len(prompts[-1]) :].tolist())
    llm = LLM(model=name, device="cpu", dtype="float32")
    try:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=96))
        for (text, tools, answer), prompt, tokens, output in zip(ASKED, prompts, expected, outputs, strict=True):
            assert llm.tokenizer.apply_chat_template([{"role": "user", "content": text}], tools=tools) == prompt
            end = {tokenizer.eos_token_id, tokenizer.pad_token_id}
            assert [t for t in output.outputs[0].token_ids if t not in end] == [t for t in tokens if t not in end]
            assert output.outputs[0].finish_reason == "stop"
            if answer and name == "quire-tiny":
                assert output.outputs[0].text == answer
    finally:
        llm.shutdown()
