"""The model folder of ``benchmarks/structured_output.py``, which is prepared on one machine and run on another."""

import importlib
import json
from pathlib import Path

import torch

from quire import LLM

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_a_moved_folder_serves(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = importlib.import_module("structured_output")
    monkeypatch.setattr(benchmark, "find_sources", lambda folder: [Path(__file__)])
    prepared, moved = tmp_path / "prepared", tmp_path / "moved"
    benchmark.prepare(prepared, "tiny")
    prepared.rename(moved)
    assert str(prepared) not in json.dumps(json.loads((moved / "config.json").read_text()))
    torch.save(torch.nn.functional.one_hot(torch.tensor(5), 8192) * 1e3, moved / "token_lengths.pt")
    output = LLM(str(moved), load_format="dummy", max_model_len=64, dtype="float32").generate([[1, 2]])[0].outputs[0]
    assert set(output.token_ids) == {5}, "the bias is that of the folder"
