"""The shipped table and the rule beside it name launches that exist and can run."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch

from quire.core.ops.kernels import linear_kernel as linear

TABLES = sorted((Path(linear.__file__).parent / "tables").glob("*.json"))
OF_THE_LAYER = ("x", "weight", "bias", "out", "norm", "epilogue")


def check(launch: linear.Launch, most: int) -> None:
    kernel = linear._KERNELS[launch.kernel]
    wanted = set(inspect.signature(kernel).parameters) - set(OF_THE_LAYER)
    assert set(launch.options) == wanted, launch
    assert launch.options.get("block_m", 1) >= most
    for name in ("block_m", "block_n", "block_k", "slice_k", "num_warps"):
        value = launch.options.get(name, 1)
        assert value & (value - 1) == 0, f"{name} is no power of two in {launch}"


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_tables(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for name in json.loads(path.read_text())["layers"]:
        features, inputs = map(int, name.split("x"))
        steps = linear.get_launches(torch.device("cuda"), features, inputs)
        assert [most for most, _ in steps] == sorted({most for most, _ in steps})
        for most, launch in steps:
            if launch is not None:
                check(launch, most)


@pytest.mark.parametrize(("features", "inputs"), [(4608, 3584), (3584, 18944), (37888, 3584), (152064, 3584), (64, 32)])
def test_layers_that_no_table_names(features: int, inputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    steps = linear.get_launches(torch.device("cuda"), features, inputs)
    assert steps[0][1] is not None
    for most, launch in steps:
        if launch is not None:
            check(launch, most)


def test_other_devices_have_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert linear.get_launches(torch.device("cuda"), 4096, 4096) == []
    assert linear.get_launches(torch.device("cpu"), 4096, 4096) == []
