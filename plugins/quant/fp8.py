"""FP8 (e4m3) weights and activations: the ``fp8`` and ``fbgemm_fp8`` checkpoints, or a plain one quantized at load."""

from __future__ import annotations

from typing import Any

import torch

from quire.plugins.quant.scaled import ScaledLinear

__all__ = ["Fp8Linear"]


class Fp8Linear(ScaledLinear):
    """See ``ScaledLinear``; ``kernels.fp8`` multiplies on a GPU."""

    dtype = torch.float8_e4m3fn
    largest = 448.0

    def kernel(self) -> Any:
        """Of FP8."""
        from quire.plugins.quant.kernels import fp8

        return fp8
