"""Quantization of a row to 8 bits, as the last part of the norm's and the activation's kernel.

Algorithm: ``scale = max|y| / largest``, for a whole row (``fp8_token``, ``int8_token``) or for each 128 features
(``fp8_group``), 1e-12 at least; or a scale that is given (``fp8_tensor``). Then ``y / scale``, rounded to the nearest,
ties to even, and saturated.

Shapes: values (rows, features); scales (rows, 1), (1,), or (rows, features / 128) stored by group, with room for whole
fours of rows, as cuBLAS reads them.
Registers: the whole row. Shared memory: the reductions alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.core.contracts.quant import ActivationFormat, QuantActivation

__all__ = ["ACTIVATION_FORMAT_CODES", "NATIVE_FORMAT", "allocate_activation", "get_row_warps", "quantize_and_store_row"]

ACTIVATION_FORMAT_CODES = {"native": 0, "fp8_tensor": 1, "fp8_token": 2, "int8_token": 3, "fp8_group": 4}
"""The ``kind`` of ``quantize_and_store_row``."""
NATIVE_FORMAT = ActivationFormat()


def allocate_activation(
    x: Tensor, features: int, output_format: ActivationFormat
) -> tuple[Tensor | QuantActivation, Tensor, Tensor]:
    """(what to return, its values, its scale) for as many rows as ``x`` has; the scale of a native one is not read."""
    if output_format.kind == "native":
        values = x.new_empty(x.shape[0], features)
        return values, values, values
    dtype = torch.int8 if output_format.kind == "int8_token" else torch.float8_e4m3fn
    rows, groups, scale = x.shape[0], 1, output_format.scale
    if output_format.kind == "fp8_group":
        rows, groups = rows + -rows % 4, features // 128
    values = x.new_empty(rows, features, dtype=dtype)[: x.shape[0]]
    if output_format.kind != "fp8_tensor" or scale is None:
        scale = x.new_empty(groups, rows, dtype=torch.float32).T[: x.shape[0]]
    return QuantActivation(values, scale, dtype=x.dtype), values, scale


def get_row_warps(block: int) -> int:
    """Warps of a program that holds a row of ``block`` numbers."""
    return min(32 if block > 16384 else 16, max(1, block // 256))


@triton.jit
def quantize_and_store_row(y, row, offs, out_ptr, scale_ptr, features: tl.constexpr, kind: tl.constexpr):
    """Store a whole row, zero where ``offs`` is outside, as the format of ``kind`` wants it."""
    if kind:
        y = y.to(tl.float32)
        if kind == 4:
            y = tl.reshape(y, (y.shape[0] // 128, 128))
            group = tl.arange(0, y.shape[0])
            scale = tl.maximum(tl.max(tl.abs(y), 1) / 448.0, 1e-12)
            scale_stride = (tl.num_programs(0) + 3) // 4 * 4
            tl.store(scale_ptr + group * scale_stride + row, scale, mask=group < features // 128)
            scale = scale[:, None]
        elif kind == 1:
            scale = tl.load(scale_ptr)
        else:
            scale = tl.maximum(tl.max(tl.abs(y)) / (127.0 if kind == 3 else 448.0), 1e-12)
            tl.store(scale_ptr + row, scale)
        y = y / scale
        if kind == 3:
            y = (y + 12582912.0) - 12582912.0  # to the nearest whole number, ties to even
        else:
            y = tl.reshape(tl.minimum(tl.maximum(y, -448.0), 448.0), offs.shape)
    tl.store(out_ptr + row * features + offs, y.to(out_ptr.dtype.element_ty), mask=offs < features)
