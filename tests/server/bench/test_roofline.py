"""Roofline bounds are those of the page on performance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quire.core.errors import ConfigError
from quire.core.loading.hf_config import read_hf_config
from quire.server.bench.roofline import (
    CEILINGS,
    Ceilings,
    ModelShape,
    decode_bound,
    load_ceilings,
    save_ceilings,
    workload_bound,
)
from quire.server.bench.workloads import make_workload

CARD = CEILINGS["NVIDIA H200"]
MODELS = Path(__file__).resolve().parents[3] / "benchmarks" / "models"


def shape(name: str) -> ModelShape:
    return ModelShape.from_hf_config(read_hf_config(MODELS / name))


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
    seconds = decode_bound(shape(model), [len(p) for p in work.prompts], work.max_tokens, CARD)
    assert batch * 255 / seconds == pytest.approx(tokens_s, rel=1e-3)


@pytest.mark.parametrize(
    ("batch", "tokens_s", "quantization", "kv"),
    [
        (1, 533, {"quant_method": "fp8"}, 1),
        (32, 16021, {"quant_method": "fp8"}, 1),
        (1, 911, {"quant_method": "awq", "bits": 4, "group_size": 128}, 2),
        (32, 23856, {"quant_method": "awq", "bits": 4, "group_size": 128}, 2),
        (1, 911, {"config_groups": {"0": {"weights": {"num_bits": 4, "group_size": 128}}}}, 2),
    ],
)
def test_quantized_decode(batch: int, tokens_s: int, quantization: dict, kv: int) -> None:
    config = read_hf_config(MODELS / "llama-3.1-8b")
    config.quantization_config = quantization
    work = make_workload(f"decode-bs{batch}")
    seconds = decode_bound(
        ModelShape.from_hf_config(config, kv_itemsize=kv), [len(p) for p in work.prompts], work.max_tokens, CARD
    )
    assert batch * 255 / seconds == pytest.approx(tokens_s, rel=1e-2)


@pytest.mark.parametrize(
    ("ranks", "stages", "batch", "times"),
    [
        (2, 1, 1, 2.0),  # two GPUs read and compute twice as much
        (1, 2, 1, 1.0),  # a request is in one stage
        (2, 2, 1, 2.0),
        (1, 2, 64, 1.067),  # stages share the keys and values, and each reads its weights for each of two groups
    ],
)
def test_several_gpus(ranks: int, stages: int, batch: int, times: float) -> None:
    work = make_workload(f"decode-bs{batch}")
    prompts = [len(p) for p in work.prompts]
    one = shape("llama-3.1-8b")
    several = replace(one, ranks=ranks, stages=stages)
    gain = decode_bound(one, prompts, work.max_tokens, CARD) / decode_bound(several, prompts, work.max_tokens, CARD)
    assert gain == pytest.approx(times, rel=0.01)
    assert one.prefill_seconds(prompts, CARD) == several.prefill_seconds(prompts, CARD) * several.num_devices


def test_what_this_machine_measured_wins(tmp_path: Path) -> None:
    file = tmp_path / "ceilings.json"
    mine = Ceilings(1e12, 2e12, 3e12)
    save_ceilings("a card", Ceilings(5.0, 6.0), file)
    save_ceilings("NVIDIA H200", mine, file)
    assert load_ceilings("NVIDIA H200", file) == mine and load_ceilings("a card", file) == Ceilings(5.0, 6.0)
    assert load_ceilings("another", file) is None
    file.write_text('{"NVIDIA H200": {}}')
    for broken in (file, tmp_path / "absent"):
        with pytest.raises(ConfigError, match="make one: quire bench ceilings"):
            load_ceilings("NVIDIA H200", broken)


@pytest.mark.parametrize(("model", "tokens_s"), [("qwen3-0.6b", 35640), ("llama-3.1-8b", 12467)])
def test_nano(model: str, tokens_s: int) -> None:
    work = make_workload("nano")
    seconds = workload_bound(shape(model), [len(p) for p in work.prompts], work.max_tokens, CARD)
    assert work.output_tokens / seconds == pytest.approx(tokens_s, rel=2e-3)
