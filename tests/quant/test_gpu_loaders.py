"""Fixtures on a GPU: the kernels' layers give the logits of the tools' own weights, up to rounding."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tests.models.paged import PagedRunner
from tests.quant.test_fixtures import FIXTURES, NAMES, load

from quire.core.layers.linear import Linear
from quire.plugins.quant.assembled import AssembledLinear

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 24])
def test_the_logits_are_those_of_the_tools_own_weights(name: str, tokens: int) -> None:
    expected = load_file(FIXTURES / name / "expected.safetensors")
    model = load(FIXTURES / name, dtype=torch.bfloat16, device="cuda")
    runner, prompt = PagedRunner(model, 1, max_len=32), expected["tokens"].tolist()
    steps = [runner.step({0: prompt[at : at + tokens]})[0] for at in range(0, len(prompt), tokens)]
    got, want = torch.cat(steps).float().cpu(), expected["logits"]
    off = ((got - want).norm() / want.norm()).item()
    methods = [layer.method for layer in model.modules() if isinstance(layer, Linear)]
    wide = sum(isinstance(m, AssembledLinear) and m._wide is not None for m in methods)
    print(f"{name} by {tokens}: off {off:.4f}, {wide} of {len(methods)} layers wide")
    assert off < (0.1 if "8-" in name or "w8a8" in name or "fp8" in name else 0.05)
