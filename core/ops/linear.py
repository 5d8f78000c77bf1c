"""Linear layers at small batch: Quire's kernels where they are faster than the library's GEMM."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from quire.core.contracts.quant import LowRankShrink

__all__ = ["SmallBatchGemm", "get_small_batch_gemm"]


class SmallBatchGemm(Protocol):
    """``x`` (num_tokens, inputs) times ``weight`` (features, inputs), with its neighbours; None: not faster here.

    ``norm`` is the weight (inputs,) and epsilon of an RMS norm before the layer; ``gated``: the halves of the result
    become ``silu(first) * second``; ``residual`` is added last. ``adapters`` launches the first product of the layer's
    adapters, and the second is added to this one.
    """

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        norm: tuple[Tensor, float] | None = None,
        gated: bool = False,
        residual: Tensor | None = None,
        adapters: LowRankShrink | None = None,
    ) -> Tensor | None:
        """Multiply, or decline."""
        ...


def get_small_batch_gemm(
    device: torch.device, features: int, inputs: int, dtype: torch.dtype, enable_pdl: bool = True
) -> SmallBatchGemm | None:
    """The kernels for a layer of this shape, or None where ``device`` has none. ``enable_pdl``: they start while the
    kernel before still runs (programmatic dependent launch), where ``device`` can."""
    if device.type != "cuda":
        return None
    from quire.core.ops.kernels.linear_kernel import TritonSmallBatchGemm

    return TritonSmallBatchGemm(device, features, inputs, dtype, enable_pdl)
