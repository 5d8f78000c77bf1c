"""Floors are those of the page on performance."""

from __future__ import annotations

from pathlib import Path

import pytest

from quire.core.hf_config import read_hf_config
from quire.server.bench.roofline import CEILINGS, ModelShape, decode_floor, workload_floor
from quire.server.bench.workloads import make_workload

CARD = CEILINGS["NVIDIA H200"]
MODELS = Path(__file__).resolve().parents[2] / "benchmarks" / "models"


def shape(name: str) -> ModelShape:
    return ModelShape.of(read_hf_config(MODELS / name))


@pytest.mark.parametrize(
    ("model", "batch", "tokens_s"),
    [
        ("qwen3-0.6b", 1, 3512),
        ("qwen3-0.6b", 32, 64295),
        ("qwen3-0.6b", 256, 115962),
        ("llama-3.1-8b", 1, 285),
        ("llama-3.1-8b", 64, 15995),
        ("llama-3.1-8b", 256, 33417),
    ],
)
def test_decode(model: str, batch: int, tokens_s: int) -> None:
    work = make_workload(f"decode-bs{batch}")
    seconds = decode_floor(shape(model), [len(p) for p in work.prompts], work.max_tokens, CARD)
    assert batch * 255 / seconds == pytest.approx(tokens_s, rel=1e-3)


@pytest.mark.parametrize(("model", "tokens_s"), [("qwen3-0.6b", 35640), ("llama-3.1-8b", 12467)])
def test_nano(model: str, tokens_s: int) -> None:
    work = make_workload("nano")
    seconds = workload_floor(shape(model), [len(p) for p in work.prompts], work.max_tokens, CARD)
    assert work.output_tokens / seconds == pytest.approx(tokens_s, rel=2e-3)
