"""FP8 weights with a scale for each 128x128 block: the library's products and ours, beside bf16 and scales by row.

    PYTHONPATH=src python benchmarks/kernels/fp8_blocks.py

Microseconds of a product as replays of a CUDA graph that goes through several copies of the weights, to bf16.
Activations are quantized before (``+quantize``: by a kernel of their own); gate and additions are left out. ``ours`` is
the launch that the table has for so many tokens. Every product by block is first checked against float64 on the
dequantized operands.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from linear import Layer, layers, measure
from torch import Tensor

from quire.core.contracts.quant import ActivationFormat, QuantActivation
from quire.plugins.quant.kernels import fp8
from quire.plugins.quant.kernels.fp8_gemm_medium_m import launch_fp8_gemm_medium_m
from quire.plugins.quant.kernels.fp8_layer import dequantize_weight, get_gemm_plan, takes_quantized
from quire.plugins.quant.kernels.fp8_quantize import dequantize_activation, launch_quantize_activation

GROUP = ActivationFormat("fp8_group")
TOKENS = (32, 64, 128, 256, 512, 2048, 8192)


def ours(x: QuantActivation, scale: Tensor, weight: Tensor) -> Tensor:
    """By the kernel of the table."""
    launch = get_gemm_plan(weight.device, *weight.shape, weight.dtype).select_launch(len(x.values), True, False, True)
    assert launch is not None and takes_quantized(launch)
    out = torch.empty(len(x.values), len(weight), dtype=x.dtype, device=weight.device)
    launch_fp8_gemm_medium_m(
        x.values, weight, None, out, scale=scale, x_scale=x.scale, enable_pdl=True, **launch.options
    )
    return out


def by_block(scale: Tensor, x: QuantActivation, weight: Tensor) -> Tensor:
    """By the library."""
    return fp8.multiply_by_library(x, weight, scale, None)


def sweep(layer: Layer) -> None:
    """A line for every number of tokens."""
    features, inputs = layer.features, layer.inputs
    weights = [torch.randn(features, inputs, device="cuda").mul(60).to(torch.float8_e4m3fn) for _ in range(4)]
    plain = [torch.randn(features, inputs, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    scale = (torch.rand(features // 128, inputs // 128, device="cuda") + 0.1) / 60 / inputs**0.5
    row = torch.rand(features, device="cuda") / 60 / inputs**0.5
    for tokens in TOKENS:
        x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
        q, by_token = launch_quantize_activation(x, GROUP), fp8.quantize_activation(x)
        runs: dict[str, Callable[[Tensor], Tensor]] = {
            "library": partial(by_block, scale, q),
            "+quantize": lambda w, x=x: by_block(scale, launch_quantize_activation(x, GROUP), w),
        }
        if tokens <= 128:
            runs["ours"] = partial(ours, q, scale)
        if tokens <= 512:
            want = dequantize_activation(q, torch.float64) @ dequantize_weight(weights[0], scale, torch.float64).T
            for name, run in runs.items():
                error = ((run(weights[0]).double() - want).norm() / want.norm()).item()
                assert error < 5e-3, (layer.name, tokens, name, error)
        times = {name: measure(run, weights) for name, run in runs.items()}
        times["by row"] = measure(lambda w, x=by_token: fp8.multiply_by_library(x, w, row, None), weights)
        times["bf16"] = measure(partial(F.linear, x), plain)
        floor = max(2 * tokens * features * inputs / 1280e6, (features + tokens) * inputs / 4.29e6)
        text = "  ".join(f"{name} {us:.1f}" for name, us in times.items())
        print(f"{layer.name:8} M={tokens:<5} floor {floor:7.1f}  {text}", flush=True)


if __name__ == "__main__":
    for each in layers("llama-3.1-8b"):
        if each.name != "head":
            sweep(each)
