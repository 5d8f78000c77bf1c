"""Checkpoints that tools made (tools/make_quant_fixtures.py): the logits are those of the weights as each tool itself
dequantizes them, in float64; and what is wrong is refused with the tensor's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.models.paged import CLASSES, PagedRunner
from tests.quant.tolerances import FLOAT32, assert_near
from torch import Tensor

from quire.core.contracts.model import Model
from quire.core.layers.parallel import TensorParallel
from quire.core.loading.hf_config import get_architecture, read_hf_config
from quire.core.loading.loader import load_model
from quire.core.plugin.manager import PluginManager

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = sorted(folder.name for folder in FIXTURES.iterdir())


def load(
    path: Path,
    dtype: torch.dtype = torch.float32,
    parallel: TensorParallel = TensorParallel(),
    name: str = "auto",
    load_format: str = "auto",
    device: str = "cpu",
    kv_dtype: torch.dtype | None = None,
) -> Model:
    """As the engine does: the loader that ``auto`` finds, asked first whether it can."""
    config = read_hf_config(path)
    plugins = PluginManager(())
    choice = plugins.resolve_plugin("quant", name, {"hf_config": config, "device": device}, announce=False)
    loader = plugins.load_class("quant", choice.target)
    return load_model(
        CLASSES[get_architecture(config)],
        config,
        path,
        dtype=dtype,
        device=torch.device(device),
        kv_dtype=kv_dtype or dtype,
        block_size=16,
        quant=loader(getattr(config, "quantization_config", None) or {}),
        load_format=load_format,
        parallel=parallel,
        progress=False,
    )


def logits_of(path: Path, **options: Any) -> tuple[Tensor, Tensor]:
    expected = load_file(path / "expected.safetensors")
    got = PagedRunner(load(path, **options), 1, max_len=32).step({0: expected["tokens"].tolist()})[0]
    return got, expected["logits"]


@pytest.mark.parametrize("name", NAMES)
def test_the_logits_are_those_of_the_tools_own_weights(name: str) -> None:
    got, want = logits_of(FIXTURES / name)
    assert want.std() > 0.5
    assert_near(got, want, FLOAT32)
