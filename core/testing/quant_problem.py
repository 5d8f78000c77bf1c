"""A linear layer as a quantization stores it, and loads it: to compile its kernels, and to time them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quire.core.contracts.quant import LayerInfo, LinearMethod, QuantizationLoader, StoredWeight
from quire.core.plugin.options import parse_options

__all__ = ["LoadedLayer", "StoredLayer"]


@dataclass(frozen=True)
class LoadedLayer:
    """A layer that multiplies."""

    layer: nn.Module
    method: LinearMethod

    def apply(self, x: Tensor) -> Tensor:
        """The product of ``x`` (num_tokens, inputs)."""
        return self.method.apply(self.layer, x)

    def count_bytes(self) -> int:
        """Of its parameters."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.layer.parameters())


@dataclass(frozen=True)
class StoredLayer:
    """One layer in a checkpoint."""

    loader: type[QuantizationLoader]
    config: Mapping[str, Any]
    """The checkpoint's ``quantization_config``; empty: a plain one."""
    stored: StoredWeight

    @classmethod
    def make_example(cls, loader: type[QuantizationLoader], outputs: int, inputs: int) -> StoredLayer:
        """As ``example_tensors`` stores it, or plain random weights for a loader that reads those."""
        stored = loader.example_tensors(outputs, inputs)
        if stored is not None:
            return cls(loader, loader.example_config(), stored)
        weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(2)) / inputs**0.5
        return cls(loader, {}, StoredWeight({"weight": weight}, weight))

    def load(self, dtype: torch.dtype, device: torch.device) -> LoadedLayer:
        """As one rank loads it."""
        outputs, inputs = self.stored.weight.shape
        info = LayerInfo(
            "layer", "linear", inputs, outputs, ("layer",), (outputs,), (outputs,), inputs, "column", dtype, False
        )
        method = self.loader(self.config, parse_options(self.loader, {})).get_linear_method(info)
        layer = nn.Module()
        with torch.no_grad():
            method.create_weights(layer, info, device)
            for name, tensor in self.stored.tensors.items():
                method.load_tensor(layer, info, 0, name, tensor, 0, 1)
            method.process_weights_after_loading(layer)
        return LoadedLayer(layer, method)
