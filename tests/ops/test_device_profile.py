"""Profiles of GPUs, and the launches that they choose."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quire.core.errors import ConfigError
from quire.core.ops.device_profile import INTERPRETER, PROFILES, DeviceProfile, check_device
from quire.core.ops.kernels import linear_kernel
from quire.core.ops.launch_table import Launch, find_launches, fit_stages
from quire.plugins.quant.kernels.fp8_layer import GemmPlan
from quire.plugins.quant.kernels.int4_table import get_int4_steps

H200 = next(profile for profile in PROFILES if profile.name == "H200")
GPU = torch.device("cuda")
FROZEN = json.loads((Path(__file__).parent / "h200_launches.json").read_text())
"""What every layer of Qwen3-0.6B and Llama-3.1-8B launched on an H200 before there were profiles: for each format, the
tokens from which on it is another launch, and which."""


def fake_gpu(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], num_sms: int) -> None:
    properties = SimpleNamespace(
        name=name, major=capability[0], minor=capability[1], multi_processor_count=num_sms, L2_cache_size=50 << 20
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.fixture(autouse=True)
def _detect_anew() -> Iterator[None]:
    DeviceProfile.detect.cache_clear()
    yield
    DeviceProfile.detect.cache_clear()


@pytest.mark.parametrize(
    ("name", "capability", "num_sms", "known", "table"),
    [
        ("NVIDIA H200", (9, 0), 132, "H200", "h200"),
        ("NVIDIA H200 MIG 1g.18gb", (9, 0), 16, None, None),
        ("NVIDIA H200 NVL", (9, 0), 132, None, None),
        ("NVIDIA GH200 480GB", (9, 0), 132, None, None),
        ("NVIDIA H100 80GB HBM3", (9, 0), 132, "H100", None),
        ("NVIDIA H100 PCIe", (9, 0), 114, "H100", None),
        ("NVIDIA A100-SXM4-80GB", (8, 0), 108, "A100", None),
        ("NVIDIA L4", (8, 9), 58, "L4", None),
        ("NVIDIA L40S", (8, 9), 142, "L40S", None),
        ("NVIDIA GeForce RTX 4090", (8, 9), 128, "RTX 4090", None),
        ("NVIDIA B200", (10, 0), 148, "B200", None),
        ("NVIDIA GeForce RTX 3090", (8, 6), 82, None, None),
    ],
)
def test_cards_are_told_apart(
    name: str,
    capability: tuple[int, int],
    num_sms: int,
    known: str | None,
    table: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fake_gpu(monkeypatch, name, capability, num_sms)
    with caplog.at_level(logging.INFO, "quire"):
        profile = DeviceProfile.detect(GPU)
        assert DeviceProfile.detect(GPU) is profile
    assert profile.name == (known or name)
    assert (profile.capability, profile.num_sms, profile.launch_table) == (capability, num_sms, table)
    lines = [record.message for record in caplog.records]
    assert len(lines) == (table is None) and all(name in line and "no launch table" in line for line in lines)


def test_shared_memory_of_unknown_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch, "NVIDIA GeForce RTX 3090", (8, 6), 82)
    assert DeviceProfile.detect(GPU).shared_memory == 99 * 1024
    assert DeviceProfile.detect(torch.device("cpu")) is INTERPRETER


def test_a_card_before_ampere_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch, "Tesla T4", (7, 5), 40)
    with pytest.raises(ConfigError, match=r"Tesla T4 has compute capability 7\.5.*--device cpu, or a newer GPU"):
        check_device(GPU)


def test_the_cpu_and_newer_cards_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    check_device(torch.device("cpu"))
    fake_gpu(monkeypatch, "NVIDIA A100-SXM4-80GB", (8, 0), 108)
    check_device(GPU)


def test_fit_stages() -> None:
    l4 = next(profile for profile in PROFILES if profile.name == "L4")
    assert fit_stages(H200, 6, 16 << 10) == 6
    assert fit_stages(l4, 8, 16 << 10, other_bytes=4 << 10) == 6
    assert fit_stages(l4, 6, 1 << 20) == 1


def as_entry(launch: Launch | None) -> dict[str, Any] | None:
    if launch is None:
        return None
    return {"kernel": launch.kernel, **launch.options} | ({"separate_norm": True} if launch.separate_norm else {})


def launches_on_h200(kind: str, features: int, inputs: int, num_tokens: int) -> Launch | None:
    if kind == "bf16":
        return (*find_launches(linear_kernel.get_bf16_steps(H200, features, inputs), num_tokens), None)[0]
    if kind.startswith("w"):
        steps = get_int4_steps(H200, features, inputs, int(kind[1]), kind == "w4a16")
        return (*find_launches(steps, num_tokens), None)[0]
    plan = GemmPlan(GPU, features, inputs, torch.int8 if kind.startswith("int8") else torch.float8_e4m3fn)
    return plan.select_launch(num_tokens, "quantized" in kind, "native" in kind, "blocks" in kind)


@pytest.mark.parametrize("shape", FROZEN["layers"])
def test_an_h200_launches_what_it_always_did(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch, "NVIDIA H200", (9, 0), 132)
    features, inputs = map(int, shape.split("x"))
    for kind, expected in FROZEN["layers"][shape].items():
        entries = [(m, as_entry(launches_on_h200(kind, features, inputs, m))) for m in range(1, 257)]
        runs = [next(run) for _, run in groupby(entries, key=lambda pair: pair[1])]
        assert runs == [(first, FROZEN["launches"][index]) for first, index in expected], kind
