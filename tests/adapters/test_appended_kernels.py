"""Kernels that find adapters' first product behind a layer's, against their torch twin: in the interpreter, and in
bfloat16 on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.adapters.test_kernels import NUM_SLOTS, PLACES, Problem

from quire.core.contracts.attention import LayerKV
from quire.core.contracts.quant import ActivationFormat, AppendedTerm
from quire.core.ops.kernels.rope_kernel import launch_rope_and_cache
from quire.core.ops.norm import rms_norm_in_torch
from quire.plugins.adapters.lora.appended_kernels import launch_add_appended, launch_add_appended_and_norm
from quire.plugins.adapters.lora.batch import AdapterBatch
from quire.plugins.adapters.lora.reference import add_appended
from quire.sdk import AdapterLimits

MIXED = [1, -1, 0, 1, 4, 3, -1, 2]


def make_wide(problem: Problem, slots: list[int], num_slots: int) -> tuple[torch.Tensor, AdapterBatch, torch.Tensor]:
    """A product with ``v`` behind it, what was made of the tokens, and what exact sums add to it."""
    x, y = problem.make_rows(len(slots))
    a = problem.a[:num_slots].flatten(0, 2)
    wide = torch.cat([y, x @ a.T, torch.full((len(slots), 16), float("nan")).to(y)], 1)
    batch = AdapterBatch(AdapterLimits(problem.num_slots, 64, 600, problem.dtype, torch.device(problem.device)))
    batch.tiles.update(np.array(slots, np.int32), num_slots)
    return wide, batch, problem.compute_exact(x, y, slots)


@pytest.mark.parametrize(("device", "dtype", "tolerance"), PLACES)
@pytest.mark.parametrize(
    ("part_sizes", "max_rank", "slots", "num_slots"),
    [
        ((48, 16, 16), 16, [0] * 3, 1),
        ((48, 16, 16), 16, MIXED, NUM_SLOTS),
        ((160, 160), 16, ([4, 4, -1] * 13 + [1] * 5) * 3, NUM_SLOTS),
        ((144,), 64, [-1, 2, 1, 0] * 9, 3),
        ((600, 600, 300), 32, MIXED * 3, NUM_SLOTS),
        ((200, 40), 16, [*range(12), -1] * 3, 12),
        ((32,), 16, [-1] * 20, 1),
    ],
    ids=["one", "mixed", "tiles of tokens", "rank 64", "tiles of features", "many slots", "base"],
)
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_kernels_add_what_the_twin_adds(
    device: str, dtype: torch.dtype, tolerance: float, part_sizes: Any, max_rank: int, slots: list[int],
    num_slots: int, with_residual: bool,
) -> None:  # fmt: skip
    problem = Problem(device, dtype, part_sizes, 96, max_rank, max(num_slots, NUM_SLOTS))
    wide, batch, exact = make_wide(problem, slots, num_slots)
    residual = torch.randn_like(exact).to(wide) if with_residual else None
    got = launch_add_appended(wide, problem.b, problem.ranks, part_sizes, batch, residual=residual)
    twin = add_appended(wide, problem.b, part_sizes, batch, residual=residual)
    expected = exact if residual is None else exact + residual.cpu().double()
    base = torch.tensor(slots) < 0
    for out in (got.cpu(), twin.cpu()):
        assert (out.double() - expected).norm() <= max(tolerance, 3e-6) * expected.norm()
        if residual is None:
            assert torch.equal(out[base], wide.cpu()[base, : problem.features]), "a row without an adapter changed"


@pytest.mark.parametrize(("device", "dtype", "tolerance"), PLACES)
@pytest.mark.parametrize("slots", [[2] * 20, MIXED], ids=["one", "mixed"])
def test_the_activation_function_comes_behind(
    device: str, dtype: torch.dtype, tolerance: float, slots: list[int]
) -> None:
    problem = Problem(device, dtype, (144, 144), 96, 32)
    wide, batch, exact = make_wide(problem, slots, NUM_SLOTS)
    gate, up = exact.chunk(2, 1)
    expected = torch.nn.functional.silu(gate) * up
    got = launch_add_appended(wide, problem.b, problem.ranks, (144, 144), batch, gated=True)
    twin = add_appended(wide, problem.b, (144, 144), batch, gated=True)
    for out in (got, twin):
        assert (out.cpu().double() - expected).norm() <= max(tolerance, 3e-6) * expected.norm()


@pytest.mark.parametrize(("device", "dtype", "tolerance"), PLACES)
@pytest.mark.parametrize("max_rank", [16, 64])
@pytest.mark.parametrize("kind", ["native", "int8_token"])
def test_the_norm_comes_behind(device: str, dtype: torch.dtype, tolerance: float, max_rank: int, kind: Any) -> None:
    problem = Problem(device, dtype, (160,), 96, max_rank)
    wide, batch, exact = make_wide(problem, MIXED, NUM_SLOTS)
    residual, weight = torch.randn_like(exact).to(wide), torch.rand(160).to(wide) + 0.5
    norm, output_format = (weight, 1e-5), ActivationFormat(kind)
    normed, stream = launch_add_appended_and_norm(wide, problem.b, problem.ranks, batch, residual, norm, output_format)
    expected = exact + residual.cpu().double()
    assert (stream.cpu().double() - expected).norm() <= max(tolerance, 3e-6) * expected.norm()
    twin, _ = rms_norm_in_torch(stream, *norm, None, output_format)
    if kind == "native":
        assert (normed - twin).norm() <= max(tolerance, 3e-6) * twin.norm()
    else:
        assert (normed.values.int() - twin.values.int()).abs().max() <= 1
        torch.testing.assert_close(normed.scale, twin.scale, rtol=1e-2 if device == "cuda" else 1e-5, atol=0)


@pytest.mark.parametrize(("device", "dtype", "tolerance"), PLACES)
@pytest.mark.parametrize(("rotary", "normed"), [(32, False), (32, True), (16, True), (16, False)])
def test_the_rotary_embedding_comes_behind(
    device: str, dtype: torch.dtype, tolerance: float, rotary: int, normed: bool
) -> None:
    """With the norm of heads and the write of keys and values: as of the whole sum."""
    dim, sizes = 32, (192, 64, 64)
    problem = Problem(device, dtype, sizes, 96, 32)
    wide, batch, _ = make_wide(problem, MIXED, NUM_SLOTS)
    whole = add_appended(wide, problem.b, sizes, batch)
    angles = torch.rand(64, rotary // 2) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1).to(device)
    positions, norm = torch.arange(len(MIXED), device=device) * 3, None
    if normed:
        norm = (torch.rand(dim) + 0.5).to(wide)

    def rotate(x: torch.Tensor, term: AppendedTerm | None) -> list[torch.Tensor]:
        q, k, v = (each.unflatten(1, (-1, dim)) for each in x[:, : sum(sizes)].split(sizes, 1))
        cache = torch.zeros(2, 4, 2, 16, dim, dtype=dtype, device=device)
        kv = LayerKV(cache[0], cache[1])
        q, k = launch_rope_and_cache(q, k, v, positions, cos_sin, kv, positions, norm, norm, 1e-6, term)
        return [q, k, cache]

    term = AppendedTerm(wide[:, problem.features :], problem.b, problem.ranks, batch.tiles.token_slots)
    for got, expected in zip(rotate(wide, term), rotate(whole, None), strict=True):
        assert (got - expected).norm() <= max(tolerance, 3e-6) * expected.norm()
