"""The LoRA kernels against their torch twin: in the interpreter by default, in bfloat16 on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quire.plugins.adapters.lora.batch import AdapterBatch
from quire.plugins.adapters.lora.kernels import launch_lora
from quire.plugins.adapters.lora.reference import apply_lora, apply_one_adapter
from quire.sdk import AdapterLimits

PLACES = [
    pytest.param("cpu", torch.float32, 1e-6, id="interpreter"),
    pytest.param("cuda", torch.bfloat16, 1e-2, id="gpu", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float16, 2e-3, id="gpu-f16", marks=pytest.mark.gpu),
]
NUM_SLOTS = 5


class Problem:
    """Random adapters of several ranks in slots, one of which is empty, for a layer of ``part_sizes``."""

    def __init__(
        self, device: str, dtype: torch.dtype, part_sizes: tuple[int, ...], inputs: int, max_rank: int,
        num_slots: int = NUM_SLOTS,
    ) -> None:  # fmt: skip
        torch.manual_seed(inputs)
        parts, features = len(part_sizes), sum(part_sizes)
        self.part_sizes, self.num_slots = part_sizes, num_slots
        self.ranks = torch.randint(1, max_rank + 1, (num_slots, parts), dtype=torch.int32)
        self.ranks[0, 0], self.ranks[1, -1], self.ranks[3] = 0, max_rank, 0
        self.a = torch.randn(num_slots, parts, max_rank, inputs) * inputs**-0.5
        self.b = torch.randn(num_slots, max_rank, features)
        for slot in range(num_slots):
            at = 0
            for part, size in enumerate(part_sizes):
                rank = int(self.ranks[slot, part])
                self.a[slot, part, rank:] = 0
                self.b[slot, rank:, at : at + size] = 0
                at += size
        self.a, self.b = self.a.to(device, dtype), self.b.to(device, dtype)
        self.ranks = self.ranks.to(device)
        self.device, self.dtype, self.inputs, self.features = device, dtype, inputs, features

    def make_batch(self, slots: list[int], *, is_captured: bool = False) -> AdapterBatch:
        limits = AdapterLimits(self.num_slots, 64, 600, self.dtype, torch.device(self.device))
        batch = AdapterBatch(limits)
        batch.update(np.array(slots, np.int32), is_captured=is_captured)
        return batch

    def make_rows(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, out = torch.randn(num_tokens, self.inputs), torch.randn(num_tokens, self.features)
        return x.to(self.device, self.dtype), out.to(self.device, self.dtype)

    def compute_exact(self, x: torch.Tensor, out: torch.Tensor, slots: list[int]) -> torch.Tensor:
        exact = out.double().cpu()
        a, b = self.a.double().cpu(), self.b.double().cpu()
        for token, slot in enumerate(slots):
            if slot >= 0:
                row = exact[token : token + 1]
                apply_one_adapter(x[token : token + 1].double().cpu(), row, a[slot], b[slot], self.part_sizes)
        return exact


@pytest.mark.parametrize(("device", "dtype", "tolerance"), PLACES)
@pytest.mark.parametrize("is_captured", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize(
    ("part_sizes", "inputs", "max_rank", "slots"),
    [
        ((48, 16, 16), 96, 16, [2]),
        ((48, 16, 16), 1100, 32, [1, -1, 0, 1, 4, 3, -1, 2]),
        ((160, 160), 64, 16, [4, 4, -1] * 13 + [1] * 5),
        ((144,), 640, 64, [-1, 2, 1, 0] * 5),
        ((600, 600, 300), 64, 32, [1, -1, 0, 1, 4, 3, -1, 2]),
        ((32,), 64, 16, [-1] * 3),
    ],
    ids=["one token", "all ranks", "long segments", "rank 64", "many tiles", "base"],
)
def test_kernels_add_what_the_twin_adds(
    device: str, dtype: torch.dtype, tolerance: float, part_sizes, inputs, max_rank, slots, is_captured: bool
) -> None:
    problem = Problem(device, dtype, part_sizes, inputs, max_rank)
    x, out = problem.make_rows(len(slots))
    exact, before = problem.compute_exact(x, out, slots), out.clone()
    batch = problem.make_batch(slots, is_captured=True if len(set(slots)) == 1 else is_captured)
    twin = out.clone().cpu()
    launch_lora(x, out, problem.a, problem.b, problem.ranks, part_sizes, batch)
    apply_lora(x.cpu(), twin, problem.a.cpu(), problem.b.cpu(), problem.ranks.cpu(), part_sizes, batch)
    base = torch.tensor(slots) < 0
    for got in (out.cpu(), twin):
        assert (got.double() - exact).norm() <= tolerance * exact.norm()
        assert torch.equal(got[base], before.cpu()[base]), "a row without an adapter changed"


@pytest.mark.parametrize(("device", "dtype", "tolerance"), PLACES)
def test_many_tokens_are_cut_into_long_segments(device: str, dtype: torch.dtype, tolerance: float) -> None:
    problem = Problem(device, dtype, (32, 16), 64, 16)
    slots = [2] * 70 + [-1] * 10 + [4] * 460 + [0]
    x, out = problem.make_rows(len(slots))
    exact, batch = problem.compute_exact(x, out, slots), problem.make_batch(slots)
    assert batch.shape.max_rows == 64 and batch.shape.num_segments == 2 + 8 + 1
    launch_lora(x, out, problem.a, problem.b, problem.ranks, problem.part_sizes, batch)
    assert (out.cpu().double() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize(("device", "dtype", "tolerance"), [PLACES[0], PLACES[1]])
@pytest.mark.parametrize("slots", [[2], [1, -1, 0, 1, 4, 3, -1, 2]], ids=["one token", "mixed"])
def test_a_norm_is_folded_in(device: str, dtype: torch.dtype, tolerance: float, slots: list[int]) -> None:
    problem = Problem(device, dtype, (48, 16, 16), 1100, 32)
    x, out = problem.make_rows(len(slots))
    x, weight = x * 3, torch.rand(1100).to(device, dtype) + 0.5
    normed = torch.nn.functional.rms_norm(x.double(), (1100,), weight.double(), 1e-5)
    exact, before = problem.compute_exact(normed, out, slots), out.clone()
    twin, batch = out.clone().cpu(), problem.make_batch(slots, is_captured=True)
    sizes, norm = problem.part_sizes, (weight, 1e-5)
    launch_lora(x, out, problem.a, problem.b, problem.ranks, sizes, batch, norm)
    operands = [tensor.cpu() for tensor in (problem.a, problem.b, problem.ranks)]
    apply_lora(x.cpu(), twin, *operands, sizes, batch, (weight.cpu(), 1e-5))
    base = torch.tensor(slots) < 0
    for got in (out.cpu(), twin):
        assert (got.double() - exact).norm() <= max(tolerance, 3e-6) * exact.norm()
        assert torch.equal(got[base], before.cpu()[base]), "a row without an adapter changed"


def test_what_lies_beyond_a_rank_is_not_read() -> None:
    """Another adapter's weights, or numbers that are none."""
    problem = Problem("cpu", torch.float32, (32, 16), 64, 32)
    slots = [1, 0, 2, 4, 0]
    x, out = problem.make_rows(len(slots))
    batch, clean = problem.make_batch(slots), out.clone()
    launch_lora(x, clean, problem.a, problem.b, problem.ranks, problem.part_sizes, batch)
    for slot in range(NUM_SLOTS):
        for part in range(2):
            problem.a[slot, part, problem.ranks[slot, part] :] = float("nan")
        problem.b[slot, problem.ranks[slot].max() :] = float("nan")
    launch_lora(x, out, problem.a, problem.b, problem.ranks, problem.part_sizes, batch)
    assert torch.equal(out, clean)


def test_a_captured_batch_has_one_shape() -> None:
    """Whatever slots its tokens have, as many tokens are launched alike, and fit."""
    problem = Problem("cpu", torch.float32, (16,), 64, 16)
    rng = np.random.default_rng(0)
    for num_tokens in (1, 2, 16, 17, 100):
        shapes = set()
        for num_slots in range(NUM_SLOTS + 1):
            slots = rng.integers(-1, num_slots, num_tokens).tolist() if num_slots else [-1] * num_tokens
            batch = problem.make_batch(slots, is_captured=True)
            shapes.add(batch.shape)
            counts = batch.segments[2, : batch.shape.num_segments]
            assert int(counts.sum()) == int((np.array(slots) >= 0).sum()) == int(batch.segments[2].sum())
        assert len(shapes) == 1
