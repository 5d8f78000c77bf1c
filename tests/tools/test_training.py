"""The training: packed rows, transformers' own model, a loop that learns and repeats, a folder that Quire serves."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tools.train_tiny import __main__ as command
from tools.train_tiny import dataset
from tools.train_tiny.corpus import read_documents
from tools.train_tiny.export import to_transformers
from tools.train_tiny.heldout import write_held_out
from tools.train_tiny.model import Shape, TinyLlama
from tools.train_tiny.train import Recipe, train

from quire import LLM, SamplingParams
from quire.server.evaluation import Report, SkillScore

from .conftest import ROOT

TOKENIZER = ROOT / "core" / "assets" / "quire-tiny" / "tokenizer.json"
SMALL = Shape(hidden=64, layers=2, heads=1, kv_heads=1, intermediate=64, context=2048)


@given(st.lists(st.integers(1, 40), max_size=30), st.booleans())
def test_packing_loses_nothing(lengths, split):
    documents = [([1000 + i] * n, [True] * n) for i, n in enumerate(lengths)]
    rows = dataset.pack(documents, 32, 0, split=split)
    kept = {1000 + i: n for i, n in enumerate(lengths) if split or n + 1 <= 32}
    tokens, counts = np.unique(rows.tokens[rows.tokens > 0], return_counts=True)
    assert dict(zip(tokens.tolist(), counts.tolist(), strict=True)) == kept
    counted = rows.labels != dataset.IGNORE
    assert (rows.labels[counted] == rows.tokens[counted]).all()
    assert counted.sum() == sum(kept.values()) + len(kept)  # the separator after each is learned too


def test_only_answers_count(monkeypatch):
    monkeypatch.setattr(dataset, "_SHARD", 20)
    made = [
        dataset.make_dialogue_shard(0, tokenizer_file=str(TOKENIZER), length=512, long=False, seed=3) for _ in range(2)
    ]
    assert (made[0].tokens == made[1].tokens).all() and (made[0].labels == made[1].labels).all()
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    learned = tokenizer.decode([t for t in made[0].labels.flatten().tolist() if t != dataset.IGNORE])
    assert learned and "assistant" not in learned.split("\n")[0]
    assert 0.02 < (made[0].labels != dataset.IGNORE).mean() < 0.6


@pytest.mark.parametrize("name", list(command.RECIPES))
def test_the_model_is_the_one_of_transformers(name):
    shape = command.RECIPES[name][0]
    model = TinyLlama(shape, seed=4).eval()
    theirs = to_transformers(model, Tokenizer.from_file(str(TOKENIZER)), torch.float32)
    tokens = torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.allclose(model(tokens), theirs(tokens).logits, atol=1e-4)


def rows(length):
    tokens = np.tile(np.arange(100, 100 + length, dtype=np.uint16), (8, 1))
    return dataset.Rows(tokens, tokens.copy())


def test_the_loop_learns_and_repeats(capsys):
    recipe = Recipe(steps=20, peak_rate=2e-2, tokens_per_step=32, warmup=5)
    short, long = rows(8), rows(16)
    first, second = (train(SMALL, recipe, short, long, device="cpu", compiled=False, log_every=10) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    losses = [float(line.split()[4]) for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert losses[0] > 7 and min(losses) < 1


def test_the_command_from_text_to_folders(tmp_path, monkeypatch, capsys):
    def no_figures(folder, *, device):
        return Report((SkillScore("addition", 0, 1),))

    monkeypatch.setattr(command, "evaluate_folder", no_figures)
    monkeypatch.setattr(command, "write_held_out", lambda folder: write_held_out(folder, 1))
    monkeypatch.setattr(dataset, "_SHARD", 40)
    recipe = command.RECIPES["quire-tiny-draft"][1]
    monkeypatch.setattr(command, "RECIPES", {"quire-tiny-draft": (SMALL, recipe)})
    words = ["--stdlib", str(ROOT / "server" / "evaluation"), "--tokenizer", str(TOKENIZER), "--out", str(tmp_path)]
    words += ["--steps", "2", "--tokens-per-step", "2048", "--dialogues", "1", "--long-dialogues", "1"]
    words += ["--workers", "1", "--device", "cpu", "--no-compile"]
    monkeypatch.setattr(sys, "argv", ["train_tiny", *words])
    command.main()
    assert "million parameters written" in capsys.readouterr().out
    assert len(list((tmp_path / "eval").glob("*.jsonl"))) == 15
    card = (tmp_path / "quire-tiny-draft" / "README.md").read_text()
    assert "| **overall** | **0.0%** | 1 |" in card and all(len(line) <= 120 for line in card.splitlines())
    llm = LLM(model=str(tmp_path / "quire-tiny-draft"), device="cpu")
    try:
        [output] = llm.chat([{"role": "user", "content": "1+1"}], SamplingParams(temperature=0, max_tokens=3))
        assert output.outputs[0].token_ids
    finally:
        llm.shutdown()


def test_documents(tmp_path):
    (tmp_path / "test").mkdir()
    for name, size in (("b.py", 300), ("a.py", 200), ("short.py", 10), ("test/c.py", 300), ("huge.py", 500_000)):
        (tmp_path / name).write_text(name[0] * size)
    (tmp_path / "latin.py").write_bytes(b"\xe9" * 300)
    assert [text[0] + str(len(text)) for text in read_documents(tmp_path, None)] == ["a200", "b300"]
    assert read_documents(None, None) == []


def test_initial_weights_follow_the_seed():
    first, again, other = (TinyLlama(SMALL, seed).model.embed_tokens.weight for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
