"""Operations that plugins call, and what their Triton kernels are made of. Each is imported at its first use.

``write_kv``, ``copy_to_device``, the norms, the activation, the rotary embedding and the quantization of activations
run anywhere. The helpers of kernels (``pdl_wait``, ``store_gemm_output`` ...) need Triton.
``NAMES_OF_MODULE`` says which name lives where: the docstrings there are the reference.
"""
# ruff: noqa: F403, F405 - the stars are for type checkers, and __all__ is checked by a test

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quire.core.ops.activation import silu_and_mul, silu_and_mul_quantized
    from quire.core.ops.device_profile import OLDEST_CAPABILITY, DeviceProfile
    from quire.core.ops.embedding import *
    from quire.core.ops.kernels.linear_epilogue import *
    from quire.core.ops.kernels.pdl import *
    from quire.core.ops.kernels.quantize_kernel import (
        ACTIVATION_FORMAT_CODES,
        allocate_activation,
        get_row_warps,
        quantize_and_store_row,
    )
    from quire.core.ops.kernels.shrink_in_gemv import *
    from quire.core.ops.kernels.shrink_in_product import *
    from quire.core.ops.launch_table import Launch, LaunchStep, find_launches, fit_stages, get_launch_steps
    from quire.core.ops.linear import *
    from quire.core.ops.norm import rms_norm, rms_norm_quantized
    from quire.core.ops.pinned import copy_to_device, copy_to_host
    from quire.core.ops.quantize import *
    from quire.core.ops.rope import apply_rope, rope_and_cache, write_kv

__all__ = [
    "ACTIVATION_FORMAT_CODES",
    "OLDEST_CAPABILITY",
    "DeviceProfile",
    "Epilogue",
    "Launch",
    "LaunchStep",
    "SmallBatchGemm",
    "add_adapters",
    "add_low_rank",
    "add_shrink",
    "add_token_shrink",
    "allocate_activation",
    "apply_rope",
    "copy_to_device",
    "copy_to_host",
    "embedding",
    "find_adapter",
    "find_adapters",
    "find_launches",
    "fit_stages",
    "get_launch_steps",
    "get_row_warps",
    "get_small_batch_gemm",
    "get_tile_rows",
    "get_weight_rows",
    "load_adapters",
    "load_low_rank",
    "mark_words",
    "pack_epilogue",
    "pack_gemm_operands",
    "pdl_launch_dependents",
    "pdl_wait",
    "quantize_activation",
    "quantize_and_store_row",
    "receive_rows",
    "receive_words",
    "rms_norm",
    "rms_norm_quantized",
    "rope_and_cache",
    "shrink_rows",
    "shrink_segments",
    "silu_and_mul",
    "silu_and_mul_quantized",
    "store_gemm_output",
    "store_token",
    "supports_pdl",
    "write_kv",
]

NAMES_OF_MODULE = {
    "quire.core.ops.rope": ("write_kv", "rope_and_cache", "apply_rope"),
    "quire.core.ops.norm": ("rms_norm", "rms_norm_quantized"),
    "quire.core.ops.activation": ("silu_and_mul", "silu_and_mul_quantized"),
    "quire.core.ops.embedding": ("embedding",),
    "quire.core.ops.quantize": ("quantize_activation",),
    "quire.core.ops.linear": ("SmallBatchGemm", "get_small_batch_gemm"),
    "quire.core.ops.pinned": ("copy_to_device", "copy_to_host"),
    "quire.core.ops.device_profile": ("DeviceProfile", "OLDEST_CAPABILITY"),
    "quire.core.ops.launch_table": ("Launch", "LaunchStep", "find_launches", "fit_stages", "get_launch_steps"),
    "quire.core.ops.kernels.pdl": ("supports_pdl", "pdl_wait", "pdl_launch_dependents"),
    "quire.core.ops.kernels.linear_epilogue": (
        "Epilogue", "pack_epilogue", "pack_gemm_operands", "get_weight_rows", "get_tile_rows", "add_low_rank",
        "load_low_rank", "store_gemm_output", "store_token",
    ),
    "quire.core.ops.kernels.shrink_in_product": (
        "add_adapters", "add_shrink", "find_adapters", "load_adapters", "mark_words", "receive_words",
        "shrink_segments",
    ),
    "quire.core.ops.kernels.shrink_in_gemv": ("add_token_shrink", "find_adapter", "receive_rows", "shrink_rows"),
    "quire.core.ops.kernels.quantize_kernel": (
        "ACTIVATION_FORMAT_CODES", "allocate_activation", "get_row_warps", "quantize_and_store_row",
    ),
}  # fmt: skip
_MODULE_OF_NAME = {name: module for module, names in NAMES_OF_MODULE.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF_NAME:
        return getattr(importlib.import_module(_MODULE_OF_NAME[name]), name)
    raise AttributeError(f"module 'quire.sdk.ops' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
