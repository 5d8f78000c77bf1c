"""Quantized layers shared by ranks: together they are the whole, and each reads no more than its share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.models.paged import PagedRunner
from tests.quant.test_fixtures import FIXTURES, NAMES, load
from tests.quant.tolerances import FLOAT32, assert_near
from torch import Tensor, nn

from quire.core.contracts.quant import LayerInfo, QuantizationLoader
from quire.core.layers.parallel import TensorParallel
from quire.core.loading.hf_config import read_hf_config
from quire.core.testing.thread_ranks import run_on_ranks
from quire.plugins.quant.awq import AWQ
from quire.plugins.quant.compressed_tensors import CompressedTensors
from quire.plugins.quant.deferred_linear import DeferredLinear
from quire.plugins.quant.gptq import GPTQ
from quire.plugins.quant.grouped_weights import GroupedWeights
from quire.plugins.quant.none import Unquantized
from quire.plugins.quant.shards import Shard

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.parallel)])
def test_ranks_together_equal_one(name: str, size: int) -> None:
    """Groups and blocks are cut, permuted inputs shared out, and two heads for keys and values are one on each of two
    ranks, or on each of two of four."""
    expected = load_file(FIXTURES / name / "expected.safetensors")
    read_hf_config(FIXTURES / name)  # imports transformers, which two threads cannot do at once

    def run(parallel: TensorParallel) -> Tensor:
        runner = PagedRunner(load(FIXTURES / name, parallel=parallel), 1, max_len=32)
        return runner.step({0: expected["tokens"].tolist()})[0]

    for logits in run_on_ranks(size, run):
        assert_near(logits, expected["logits"], FLOAT32)


def make_info(shard: str, size: int, outputs: int, inputs: int) -> LayerInfo:
    local_outputs, local_inputs = (outputs // size, inputs) if shard == "column" else (outputs, inputs // size)
    return LayerInfo(
        name="layer",
        kind="linear",
        in_features=local_inputs,
        in_total=inputs,
        out_features=local_outputs,
        part_names=("layer",),
        part_sizes=(local_outputs,),
        part_totals=(outputs,),
        shard=shard,  # type: ignore[arg-type]
        dtype=torch.float32,
        bias=False,
    )


@pytest.mark.parametrize("shard", ["column", "row"])
@pytest.mark.parametrize("loader", [AWQ, GPTQ, CompressedTensors])
def test_a_rank_unpacks_only_its_share(loader: type[QuantizationLoader], shard: str) -> None:
    """Of four ranks each takes a quarter of the packed bytes to the layer's device, not the whole to cut it there."""
    outputs, inputs, size = 256, 512, 4
    stored = loader.example_tensors(outputs, inputs)
    assert stored is not None
    info, layer, taken = make_info(shard, size, outputs, inputs), nn.Module(), []
    method = loader(loader.example_config()).get_linear_method(info)
    assert isinstance(method, DeferredLinear)
    assemble = method.assemble
    method.assemble = lambda layer, info, parts: (taken.extend(parts), assemble(layer, info, parts))  # type: ignore
    method.create_weights(layer, info, CPU)
    for name, tensor in stored.tensors.items():
        method.load_tensor(layer, info, 0, name, tensor, 3, size)
    whole = sum(tensor.nbytes for name, tensor in stored.tensors.items() if name != "g_idx")
    share = sum(tensor.nbytes for tensors, _ in taken for tensor in tensors.values())
    assert whole / size <= share <= whole / size * 1.05
    at = slice(3 * outputs // size, outputs) if shard == "column" else slice(None)
    columns = slice(3 * inputs // size, inputs) if shard == "row" else slice(None)
    torch.testing.assert_close(layer.weight, stored.weight[at, columns])


def test_a_rank_reads_only_its_pages_of_a_file(tmp_path: Path) -> None:
    """Tensors are mapped from the file, so half of a layer's outputs are half of its bytes."""
    if not Path("/proc/self/smaps").exists():
        pytest.skip("the system does not say which pages are read")
    file, outputs, inputs = tmp_path / "model.safetensors", 2048, 1024
    save_file({"layer.weight": torch.ones(outputs, inputs)}, file)
    info, layer = make_info("column", 2, outputs, inputs), nn.Module()
    method = Unquantized({}).get_linear_method(info)
    method.create_weights(layer, info, CPU)
    with safe_open(file, framework="pt", device="cpu") as tensors:
        weight = tensors.get_tensor("layer.weight")
        method.load_tensor(layer, info, 0, "weight", weight, 1, 2)
        assert 0.5 <= count_read_bytes(file) / weight.nbytes < 0.6
    assert bool((layer.weight == 1).all())


def count_read_bytes(file: Path) -> int:
    """Of a mapped file: the pages that this process has touched."""
    is_file, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split()[0].endswith(":"):
            is_file = str(file) in line
        elif is_file and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.parametrize("symmetric", [True, False])
def test_permuted_inputs_stay_in_groups(symmetric: bool) -> None:
    """A rank has some inputs of every group: it fills groups up with zero columns and keeps four bits a weight."""
    outputs, inputs, size, generator = 8, 512, 4, torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (outputs, inputs), generator=generator, dtype=torch.uint8)
    scales = torch.rand(outputs, 4, generator=generator) + 0.5
    zeros = None if symmetric else torch.randint(0, 16, (outputs, 4), generator=generator, dtype=torch.uint8)
    perm = torch.randperm(inputs, generator=generator).int()
    whole = GroupedWeights(codes, scales, zeros, 4, perm)
    dense, per_rank = whole.dequantize_weights(), inputs // size
    for rank in range(size):
        first = rank * per_rank
        part = whole.take_shard(Shard(0, outputs, first, per_rank, outputs, (outputs, inputs)))
        torch.testing.assert_close(part.dequantize_weights(), dense[:, first : first + per_rank])
        assert part.group_size == 32 and part.codes.shape[1] < 2 * per_rank
        x = torch.randn(3, per_rank, generator=generator)
        assert part.perm is not None
        columns = GroupedWeights(part.codes, part.scales, part.zeros, 4).dequantize_weights()
        product = x[:, part.perm.long().clamp(min=0)] @ columns.T
        torch.testing.assert_close(product, x @ dense[:, first : first + per_rank].T, atol=1e-4, rtol=1e-4)
