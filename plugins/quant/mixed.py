"""A fused layer whose parts a checkpoint stores in different schemes: a product for each, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from quire.sdk import LayerInfo, LinearMethod, QuantActivation

__all__ = ["MixedLinear"]


class MixedLinear(LinearMethod):
    """``methods`` has one for each part, which the layer holds as modules ``part0``, ``part1`` ..."""

    def __init__(self, names: Sequence[str], methods: Sequence[LinearMethod]) -> None:
        self.methods = tuple(methods)
        self._methods_by_name = dict(zip(names, methods, strict=True))

    def create_weights(self, layer: nn.Module, info: LayerInfo, device: torch.device) -> None:
        """As each part's method does."""
        for part, method in enumerate(self.methods):
            module = nn.Module()
            layer.add_module(f"part{part}", module)
            method.create_weights(module, info.select_part(part), device)

    def tensor_names(self, info: LayerInfo) -> tuple[str, ...]:
        """Of the part's method."""
        return self._methods_by_name[info.name].tensor_names(info)

    def optional_names(self, info: LayerInfo) -> tuple[str, ...]:
        """Of the part's method."""
        return self._methods_by_name[info.name].optional_names(info)

    def alias_names(self, info: LayerInfo) -> Mapping[str, str]:
        """Of the part's method."""
        return self._methods_by_name[info.name].alias_names(info)

    def load_tensor(
        self, layer: nn.Module, info: LayerInfo, part: int, tensor_name: str, tensor: Tensor, rank: int, world_size: int
    ) -> None:
        """Hand it to the part."""
        module = layer.get_submodule(f"part{part}")
        self.methods[part].load_tensor(module, info.select_part(part), 0, tensor_name, tensor, rank, world_size)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """As each part's method does."""
        for part, method in enumerate(self.methods):
            method.process_weights_after_loading(layer.get_submodule(f"part{part}"))

    def apply(self, layer: nn.Module, x: Tensor | QuantActivation, bias: Tensor | None = None) -> Tensor:
        """The parts' products side by side; each adds its own bias."""
        products = []
        for part, method in enumerate(self.methods):
            module = layer.get_submodule(f"part{part}")
            products.append(method.apply(module, x, getattr(module, "bias", None)))
        return torch.cat(products, dim=1)
