"""INT8 weights and activations (W8A8): a plain checkpoint quantized at load; others are compressed-tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quire.plugins.quant.scaled import ScaledLinear

__all__ = ["Int8Linear"]


class Int8Linear(ScaledLinear):
    """See ``ScaledLinear``; ``kernels.int8`` multiplies on a GPU. Zero points are zero."""

    dtype = torch.int8
    largest = 127.0

    def kernel(self) -> Any:
        """Of INT8."""
        from quire.plugins.quant.kernels import int8

        return int8

    def quantized(self, numbers: Tensor) -> Tensor:
        """To the nearest, ties to even."""
        return numbers.round().to(torch.int8)
