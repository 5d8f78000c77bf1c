"""Both products where a layer's partial sums are added up: in the interpreter, and in 16 bits on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.adapters.test_kernels import PLACES, Problem

from quire.core.contracts.quant import LowRankTerm
from quire.core.layers.adapters import ModelAdapters
from quire.core.layers.builder import LayerBuilder
from quire.plugins.adapters.lora.method import Lora
from quire.plugins.adapters.lora.partial_kernels import launch_add_to_partial
from quire.plugins.quant.awq import AWQ
from quire.sdk import AdapterLimits

MAX_POLLS = 1 << 20
"""A program that waits in vain gives up, rather than hang."""
MIXED = [1, -1, 0, 1, 4, 3, 2, -1, 2, 2]


@pytest.mark.parametrize(("device", "dtype", "tolerance"), PLACES)
@pytest.mark.parametrize(
    ("part_sizes", "inputs", "max_rank", "slots", "num_partials", "neighbours"),
    [
        ((96, 32, 32), 640, 16, MIXED, 2, {"bias"}),
        ((96, 96), 256, 16, MIXED * 4, 1, {"gated"}),
        ((64,), 9216, 16, [2] * 20, 4, {"residual"}),
        ((80, 48), 256, 32, MIXED, 3, {"bias", "residual"}),
        ((64, 64), 256, 48, MIXED * 2, 2, {"gated", "bias", "residual"}),
        ((64,), 256, 16, [-1] * 9, 2, set()),
    ],
    ids=["qkv", "gated", "one adapter", "rank 32", "rank 48", "base"],
)
def test_partial_sums_and_adapters_are_added(
    device: str, dtype: torch.dtype, tolerance: float, part_sizes, inputs, max_rank, slots, num_partials, neighbours
) -> None:
    problem = Problem(device, dtype, part_sizes, inputs, max_rank)
    num_tokens, width = len(slots), sum(part_sizes) // (2 if "gated" in neighbours else 1)
    x, _ = problem.make_rows(num_tokens)
    partial = torch.randn(num_partials, num_tokens, problem.features, device=device)
    bias = torch.randn(problem.features).to(x) if "bias" in neighbours else None
    residual = torch.randn(num_tokens, width).to(x) if "residual" in neighbours else None
    batch = problem.make_batch(slots, is_captured=True)
    batch.tiles.update(np.array(slots, np.int32), problem.num_slots)
    y = partial.double().sum(0).cpu()
    y = problem.compute_exact(x, y if bias is None else y + bias.double().cpu(), slots)
    if "gated" in neighbours:
        gate, up = y.chunk(2, 1)
        y = F.silu(gate) * up
    y = y if residual is None else y + residual.double().cpu()
    results = []
    for layer in (0, 1, 1):  # what another layer, or the pass before, handed over counts no more
        batch.words.bitwise_xor_(0x3F800000)
        batch.begin_layer(layer)
        shrink = batch.describe_shrink(problem.a, layer, MAX_POLLS)
        term = LowRankTerm(None, problem.b, problem.ranks, batch.slots, part_sizes, shrink)
        results.append(
            launch_add_to_partial(x, partial, bias, term, batch, gated="gated" in neighbours, residual=residual)
        )
    assert (results[0].double().cpu() - y).norm() <= max(tolerance, 3e-6) * y.norm()
    assert all(torch.equal(results[0], result) for result in results[1:])


class AwqLayers:
    """Layers of random int4 weights, entered in each of the ways that a decoder layer does, with adapters in slots."""

    def __init__(self, options: Lora.Options) -> None:
        torch.manual_seed(0)
        device, dtype = torch.device("cuda"), torch.bfloat16
        self.method = Lora(AdapterLimits(12, 16, 512, dtype, device), options)
        adapters = ModelAdapters(self.method)
        builder = LayerBuilder(
            dtype,
            device,
            dtype,
            16,
            AWQ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}),
            adapters=adapters,
        )
        self.qkv = builder.make_qkv_parallel_linear("self_attn", 1024, 8, 2, 128, bias=True)
        self.o = builder.make_row_parallel_linear("o_proj", 1024, 1024)
        self.gate_up = builder.make_column_parallel_linear("gate_up_proj", 1024, {"gate_proj": 2048, "up_proj": 2048})
        self.norm = builder.make_rms_norm("norm", 1024, 1e-5)
        for layer in (self.qkv, self.o, self.gate_up):
            layer.process_weights_after_loading()
        self.qkv.bias.data.normal_()
        for layer in adapters.layers.values():
            for slot in range(12):
                *matrices, ranks = layer.slot_buffers(slot)
                for matrix in matrices:
                    matrix.normal_(0, 0.1)
                ranks.fill_(16)

    def prepare(self, slots: np.ndarray) -> None:
        self.method.is_active = True
        self.method.num_named_slots = 12
        self.method.prepare_metadata(slots.astype(np.int32), is_captured=True)

    def run(self, x: torch.Tensor) -> list[torch.Tensor]:
        y, rest = self.o.forward_add_residual(x, x)
        gated, _ = self.gate_up.forward_after_norm(self.norm, x, x, activation="silu")
        return [self.qkv(x), y if rest is None else y + rest, gated]


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [9, 16, 32, 64, 130, 256])
@torch.inference_mode()
def test_quantized_layers_add_the_same_beside_and_behind_their_products(num_tokens: int) -> None:
    beside, behind = AwqLayers(Lora.Options()), AwqLayers(Lora.Options(shrink_beside_product=False))
    x = torch.randn(num_tokens, 1024, device="cuda", dtype=torch.bfloat16)
    beside.prepare(np.full(num_tokens, -1))
    beside.run(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = beside.run(x)
    for slots in (np.arange(num_tokens) % 13 - 1, np.zeros(num_tokens), np.arange(num_tokens) % 3 + 5):
        beside.prepare(slots)
        behind.prepare(slots)
        x.normal_()
        eager, expected = beside.run(x), behind.run(x)
        for _ in range(3):
            graph.replay()
        for got, same, wanted in zip(captured, eager, expected, strict=True):
            assert torch.equal(got, same)
            assert (got.double() - wanted.double()).norm() <= 1e-2 * wanted.double().norm()
