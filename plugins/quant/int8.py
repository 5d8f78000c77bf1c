"""INT8 weights and activations: a plain checkpoint quantized at load, or one of compressed-tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quire.plugins.quant.compressed_tensors import CompressedTensors
from quire.plugins.quant.layerwise import LayerwiseLoader, Scheme
from quire.plugins.quant.scaled import ScaledFormat
from quire.sdk import LayerInfo, LinearMethod

__all__ = ["Int8"]


class Int8(LayerwiseLoader):
    """Every row gets a scale at load, every token one when it comes; the head stays as it is."""

    @classmethod
    def find_unsupported(cls, quant_config: Mapping[str, Any], device: torch.device) -> list[str]:
        """Other methods."""
        method = quant_config.get("quant_method")
        if method is None:
            return []
        if method == "compressed-tensors":
            return CompressedTensors.find_unsupported_for(torch.int8, quant_config, device)
        return cls.check_quant_method(quant_config, "int8")

    def get_scheme(self, name: str, kind: str) -> Scheme:
        """The same for all layers but the head."""
        return None if kind == "lm_head" else ScaledFormat(torch.int8, "none")

    def get_linear_method(self, info: LayerInfo) -> LinearMethod:
        """Compressed-tensors has a loader of its own."""
        if self.quant_config.get("quant_method") == "compressed-tensors":
            return CompressedTensors(self.quant_config).get_linear_method(info)
        return super().get_linear_method(info)
