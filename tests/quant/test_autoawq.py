"""What autoawq's own layers pack is unpacked bit for bit.

autoawq is archived, and its package no longer imports beside current versions of transformers. Its layers need neither
that nor accelerate, whose import is all that they make of it. ``make dev`` puts the package, without what it depends
on, into a folder of its own, so that ``quire quantize`` does not take it for a working tool.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from quire.plugins.quant.awq import GemmFormat, GemvFastFormat, GemvFormat
from quire.plugins.quant.grouped import GroupedFormat

AUTOAWQ = Path(sys.prefix) / "autoawq" / "awq"
OUTPUTS, INPUTS = 64, 256
pytestmark = pytest.mark.skipif(not AUTOAWQ.is_dir(), reason="autoawq's layers are not here: make dev")


@pytest.fixture
def import_awq() -> Iterator[Callable[[str], ModuleType]]:
    """Imports ``awq.<name>``, with an empty package ``awq`` around it; nothing stays imported."""
    with pytest.MonkeyPatch.context() as patch:
        package = ModuleType("awq")
        package.__path__ = [str(AUTOAWQ)]
        patch.setitem(sys.modules, "awq", package)
        if "accelerate" not in sys.modules:
            patch.setitem(sys.modules, "accelerate", ModuleType("accelerate"))
        yield lambda name: importlib.import_module(f"awq.{name}")
    for name in [name for name in sys.modules if name.startswith("awq.")]:
        del sys.modules[name]


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(
    ("layer", "form", "groups_first"),
    [
        ("gemm.WQLinear_GEMM", GemmFormat, True),
        ("gemv.WQLinear_GEMV", GemvFormat, False),
        ("gemv_fast.WQLinear_GEMVFast", GemvFastFormat, False),
    ],
)
def test_what_autoawq_packs_is_unpacked(
    layer: str,
    form: type[GroupedFormat],
    groups_first: bool,
    group_size: int,
    import_awq: Callable[[str], ModuleType],
) -> None:
    module, name = layer.split(".")
    awq_layer = getattr(import_awq(f"modules.linear.{module}"), name)
    generator = torch.Generator().manual_seed(group_size)
    groups = INPUTS // group_size
    codes = torch.randint(0, 16, (OUTPUTS, INPUTS), generator=generator)
    zeros = torch.randint(0, 16, (OUTPUTS, groups), generator=generator)
    scales = torch.rand(OUTPUTS, groups, generator=generator).half() / 16 + 0.01
    linear = nn.Linear(INPUTS, OUTPUTS, bias=False)
    group_of = torch.arange(INPUTS) // group_size
    linear.weight.data = (codes - zeros[:, group_of]) * scales[:, group_of].float()
    arguments: dict[str, Any] = {"scales": scales.float(), "zeros": zeros.float()}
    if groups_first:
        arguments = {key: value.T.contiguous() for key, value in arguments.items()}
    packed = awq_layer.from_linear(linear, 4, group_size, **arguments)
    tensors = {key: getattr(packed, key) for key in ("qweight", "qzeros", "scales")}

    weights = form(4, group_size)
    for key, stored in weights.get_stored_tensors(OUTPUTS, INPUTS).items():
        stored.check(key, tensors[key])
    unpacked = weights.unpack_tensors(tensors, OUTPUTS, INPUTS)
    assert torch.equal(unpacked.codes.long(), codes)
    assert unpacked.zeros is not None and torch.equal(unpacked.zeros.long(), zeros)
    assert torch.equal(unpacked.scales, scales) and unpacked.group_size == group_size
