"""Layers' own kernels that add what adapters make of each token: in the interpreter, and in bfloat16 on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.adapters.test_kernels import PLACES, Problem

from quire.core.contracts.quant import LowRankTerm
from quire.core.ops.kernels.gemm_small_m import launch_gemm_small_m
from quire.core.ops.kernels.gemv import launch_gemv, launch_gemv_k_loop
from quire.plugins.adapters.lora.kernels import launch_shrink
from quire.plugins.quant.kernels.fp8_gemm_small_m import launch_fp8_gemm_small_m
from quire.plugins.quant.kernels.fp8_gemv import launch_fp8_gemv, launch_fp8_gemv_k_loop
from quire.plugins.quant.kernels.fp8_layer import dequantize_weight
from quire.plugins.quant.kernels.int4 import pack_weights
from quire.plugins.quant.kernels.int4_launch import launch_int4_gemm_small_m
from quire.plugins.quant.kernels.int4_weights import dequantize_to_float64

MAX_POLLS = 1 << 20
"""A program that waits in vain gives up, rather than hang."""
ONE, MIXED = [2], [1, -1, 0, 1, 4, 3, 2]
GEMV = {"block_m": 1, "block_n": 2, "tiles_per_program": 3, "num_warps": 4}
SMALL_M = {"block_m": 8, "block_n": 16, "block_k": 64, "slice_k": 2, "num_stages": 3}
KERNELS = {
    "gemv": (launch_gemv, ONE, GEMV),
    "gemv, 2 tokens": (launch_gemv, [4, -1], GEMV | {"block_m": 2}),
    "gemv_k_loop": (launch_gemv_k_loop, ONE, {"block_n": 4, "block_k": 512, "num_warps": 2}),
    "gemm_small_m": (launch_gemm_small_m, MIXED, SMALL_M),
    "gemm_small_m, 1 token": (launch_gemm_small_m, ONE, SMALL_M),
    "gemm_small_m, base": (launch_gemm_small_m, [-1, -1], SMALL_M),
    "fp8_gemv": (launch_fp8_gemv, [4, -1], GEMV | {"block_m": 2}),
    "fp8_gemv_k_loop": (launch_fp8_gemv_k_loop, ONE, {"block_n": 4, "block_k": 512, "num_warps": 2}),
    "fp8_gemm_small_m": (launch_fp8_gemm_small_m, MIXED, SMALL_M),
    "int4_gemm_small_m": (
        launch_int4_gemm_small_m, MIXED, {"block_m": 8, "tiles": 2, "slice_k": 2, "unroll_k": 1, "num_stages": 2},
    ),
}  # fmt: skip

SHRINKING = {
    "gemv": (launch_gemv, [[0], [-1]], GEMV),
    "gemv_k_loop": (launch_gemv_k_loop, [[0]], {"block_n": 4, "block_k": 256, "num_warps": 1}),
    "gemm_small_m": (launch_gemm_small_m, [MIXED, [2], [-1, -1]], SMALL_M),
    "fp8_gemv": (launch_fp8_gemv, [[0]], GEMV),
    "fp8_gemv_k_loop": (launch_fp8_gemv_k_loop, [[0]], KERNELS["fp8_gemv_k_loop"][2]),
    "fp8_gemm_small_m": (launch_fp8_gemm_small_m, [MIXED], SMALL_M),
    "int4_gemm_small_m": (launch_int4_gemm_small_m, [MIXED, [2]], KERNELS["int4_gemm_small_m"][2]),
}  # fmt: skip
"""Kernels that do both products: what launches them, the slots of several steps, and constants."""


class Layer(Problem):
    """A layer of two parts, or of three, with adapters in its slots."""

    def __init__(
        self,
        device: str,
        dtype: torch.dtype,
        part_sizes: tuple[int, ...],
        neighbours: set[str],
        inputs: int = 2048,
        max_rank: int = 32,
    ) -> None:
        super().__init__(device, dtype, part_sizes, inputs, max_rank)
        self.weight = torch.randn(self.features, self.inputs).mul_(self.inputs**-0.5).to(device, dtype)
        gains = torch.rand(self.inputs).to(device, dtype) + 0.5
        self.norm = (gains, 1e-5) if "norm" in neighbours else None
        self.bias = torch.randn(self.features).to(device, dtype) if "bias" in neighbours else None
        self.is_gated, self.has_residual = "gated" in neighbours, "residual" in neighbours

    def launch(
        self,
        kernel: Callable[..., None],
        x: torch.Tensor,
        slots: list[int] | None,
        *,
        in_product: bool = False,
        **options: Any,
    ) -> Any:
        """The layer's output, and what it should be in float64. ``in_product``: the kernel shrinks too, again and
        again."""
        weight, scale, dense = self.quantize(kernel.__name__)
        has_norm = kernel not in (launch_fp8_gemm_small_m, launch_int4_gemm_small_m)
        options |= {"norm": self.norm} if has_norm else {}
        norm = self.norm if has_norm else None
        tokens, width = len(x), self.features // 2 if self.is_gated else self.features
        residual = torch.randn(tokens, width).to(x) if self.has_residual else None
        out = torch.full((tokens, width), float("nan")).to(x)
        batch = None if slots is None else self.make_batch(slots, is_captured=True)

        def launch(layer: int) -> None:
            term = None
            if batch is not None:
                batch.begin_layer(layer)
                shrink = batch.describe_shrink(self.a, layer, MAX_POLLS) if in_product else None
                v = None if in_product else launch_shrink(x, self.a, self.ranks, batch, norm)[0]
                term = LowRankTerm(v, self.b, self.ranks, batch.slots, self.part_sizes, shrink)
            kernel(
                x, weight, self.bias, out, gated=self.is_gated, residual=residual, adapters=term, enable_pdl=False,
                **scale, **options,
            )  # fmt: skip

        launch(0)
        if in_product and batch is not None:
            once = out.clone()
            for layer in (1, 1, 3, 0) if out.is_cuda else (1, 1):
                batch.words.bitwise_xor_(0x3F800000)  # what was handed over before counts no more
                launch(layer)
                assert torch.equal(out, once)
        x = x.double().cpu()
        if norm is not None:
            x = F.rms_norm(x, (self.inputs,), norm[0].double().cpu(), norm[1])
        y = self.compute_exact(x, x @ dense.double().cpu().T, slots or [-1] * tokens)
        y = y if self.bias is None else y + self.bias.double().cpu()
        if self.is_gated:
            gate, up = y.chunk(2, 1)
            y = F.silu(gate) * up
        return out.cpu(), y if residual is None else y + residual.double().cpu()

    def quantize(self, kernel: str) -> tuple[Any, dict[str, torch.Tensor], torch.Tensor]:
        """The weight as the kernel takes it, its scale, and what it stands for."""
        if "fp8" in kernel:
            scale = (self.weight.float().abs().amax(1) / 448).contiguous()
            weight = (self.weight.float() / scale[:, None]).to(torch.float8_e4m3fn)
            return weight, {"scale": scale}, dequantize_weight(weight, scale, torch.float64)
        if "int4" in kernel:
            codes = (self.weight.float() * 100 + 8).round().clamp(0, 15).to(torch.uint8)
            scales = torch.full((self.features, self.inputs // 128), 0.01, dtype=torch.float16, device=codes.device)
            packed = pack_weights(codes, scales, None, 128, 4)
            assert packed is not None
            return packed, {}, dequantize_to_float64(packed)
        return self.weight, {}, self.weight


@pytest.mark.parametrize(("device", "dtype", "tolerance"), [PLACES[0], PLACES[1]])
@pytest.mark.parametrize("neighbours", [{"bias"}, {"norm", "gated"}, {"residual"}], ids=["plain", "norm", "residual"])
@pytest.mark.parametrize("case", KERNELS)
def test_a_product_adds_adapters(
    device: str, dtype: torch.dtype, tolerance: float, case: str, neighbours: set[str]
) -> None:
    kernel, slots, options = KERNELS[case]
    inputs = 1024 if device == "cpu" else 2048
    layer = Layer(device, dtype, (32, 32) if "gated" in neighbours else (24, 8, 8), neighbours, inputs)
    x = torch.randn(len(slots), layer.inputs).to(device, dtype) * 2
    torch.manual_seed(0)
    got, expected = layer.launch(kernel, x, slots, **options)
    assert (got.double() - expected).norm() <= max(tolerance, 3e-6) * expected.norm()
    torch.manual_seed(0)
    plain, _ = layer.launch(kernel, x, None, **options)
    is_base = torch.tensor(slots) < 0
    assert torch.equal(got[is_base], plain[is_base]), "a row without an adapter changed"
    assert is_base.all() or not torch.allclose(got[~is_base], plain[~is_base])


@pytest.mark.parametrize(("device", "dtype", "tolerance"), [PLACES[0], PLACES[1]])
@pytest.mark.parametrize("neighbours", [{"bias"}, {"norm", "gated"}, {"residual"}], ids=["plain", "norm", "residual"])
@pytest.mark.parametrize("case", SHRINKING)
def test_a_product_shrinks_too(
    device: str, dtype: torch.dtype, tolerance: float, case: str, neighbours: set[str]
) -> None:
    kernel, batches, options = SHRINKING[case]
    sizes, max_rank = ((32, 32), 32) if "gated" in neighbours else ((32, 16, 16), 16)
    layer = Layer(device, dtype, sizes, neighbours, 1024, max_rank)
    for slots in batches:
        x = torch.randn(len(slots), layer.inputs).to(device, dtype) * 2
        got, expected = layer.launch(kernel, x, slots, in_product=True, **options)
        assert (got.double() - expected).norm() <= max(tolerance, 3e-6) * expected.norm()


def test_what_lies_beyond_a_rank_is_not_added() -> None:
    layer = Layer("cpu", torch.float32, (24, 8, 8), set())
    x = torch.randn(len(MIXED), layer.inputs)
    clean, _ = layer.launch(launch_gemm_small_m, x, MIXED, **SMALL_M)
    for slot, ranks in enumerate(layer.ranks.tolist()):
        for part, rank in enumerate(ranks):
            layer.a[slot, part, rank:] = float("nan")
        layer.b[slot, max(ranks) :] = float("nan")
    got, _ = layer.launch(launch_gemm_small_m, x, MIXED, **SMALL_M)
    assert torch.equal(got, clean)
