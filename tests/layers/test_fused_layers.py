"""Layers ask the method for fusion and do the parts one by one where it declines; the stream is the same either way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quire.core.contracts.quant import LayerInfo, LinearMethod
from quire.core.layers import Linear, RMSNorm
from quire.core.layers.parallel import TensorParallel
from quire.plugins.quant.none import UnquantizedLinear

CPU = torch.device("cpu")
HIDDEN = 32


class Fused(UnquantizedLinear):
    """A method that offers everything named in ``offers``."""

    def __init__(self, offers: set[str]) -> None:
        super().__init__()
        self.offers = offers
        self.taken: list[set[str]] = []

    def apply_fused(
        self,
        layer: nn.Module,
        x: Tensor,
        bias: Tensor | None = None,
        *,
        norm: tuple[Tensor, float] | None = None,
        activation: str | None = None,
        residual: Tensor | None = None,
    ) -> Tensor | None:
        parts = {"norm": norm, "gate": activation, "residual": residual}
        asked = {name for name, given in parts.items() if given is not None}
        if not asked or not asked <= self.offers:
            return None
        self.taken.append(asked)
        if norm is not None:
            x = F.rms_norm(x, x.shape[-1:], *norm)
        y = F.linear(x, layer.weight, bias)  # type: ignore[arg-type]
        if activation is not None:
            gate, up = y.chunk(2, -1)
            y = F.silu(gate) * up
        return y if residual is None else y + residual


def linear(method: LinearMethod, features: int, inputs: int, shard: str) -> Linear:
    info = LayerInfo(
        "layer", "linear", inputs, features, ("layer",), (features,), (features,), inputs, shard, torch.float32, True
    )  # type: ignore[arg-type]
    layer = Linear(info, method, TensorParallel())
    method.create_weights(layer, info, CPU)
    torch.manual_seed(features)
    for parameter in layer.parameters():
        parameter.normal_()
    return layer


@pytest.mark.parametrize("names", ["", "gate", "residual", "norm", "norm gate residual"])
@pytest.mark.parametrize("pending", [False, True])
def test_any_offer_gives_the_same_stream(names: str, pending: bool) -> None:
    offers = set(names.split())
    torch.manual_seed(1)
    x = torch.randn(3, HIDDEN)
    residual = torch.randn(3, HIDDEN) if pending else None
    norm = RMSNorm("norm", HIDDEN, 1e-5, torch.float32, CPU)
    norm.weight.uniform_(0.5, 1.5)
    results = []
    for method in (Fused(set()), Fused(offers)):
        up = linear(method, 2 * HIDDEN, HIDDEN, "column")
        down = linear(method, HIDDEN, HIDDEN, "row")
        y, stream = up.forward_after_norm(norm, x, residual, activation="silu")
        y, rest = down.forward_add_residual(y, stream)
        results.append(y if rest is None else y + rest)
    torch.testing.assert_close(results[0], results[1])
    expected = (
        [{"norm", "gate"}] if {"norm", "gate"} <= offers and not pending else [{"gate"}] if "gate" in offers else []
    )
    assert method.taken == expected + ([{"residual"}] if "residual" in offers else [])
