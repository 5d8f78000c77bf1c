"""All-reduce kernels: their arithmetic in the interpreter, where one process is all ranks in turn. What the ranks do at
the same time is tested on several GPUs (``test_all_reduce_gpu.py``)."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.core.contracts.quant import ActivationFormat
from quire.core.layers.parallel import PartialSum, TensorParallel
from quire.core.ops.all_reduce import AllReduceKernels
from quire.core.ops.device_profile import PROFILES, AllReduceLimits
from quire.core.ops.kernels import all_reduce_launch
from quire.core.ops.kernels.all_reduce_launch import (
    MAX_MARKED_ROWS,
    MAX_PROGRAMS,
    SymmetricLayout,
    launch_one_shot,
    launch_one_shot_norm,
    launch_sum_sent,
    launch_two_shot,
)
from quire.core.ops.kernels.norm_kernel import launch_rms_norm


class Ranks:
    """The memory of several ranks in one process."""

    def __init__(self, ranks: int, **sizes: int) -> None:
        self.layout = SymmetricLayout(ranks, **sizes)
        self.memory = [torch.zeros(self.layout.total_bytes, dtype=torch.uint8) for _ in range(ranks)]
        self.buffers = torch.tensor([each.data_ptr() for each in self.memory])
        self.epochs = [torch.zeros(3, MAX_PROGRAMS, dtype=torch.int32) for _ in range(ranks)]

    def run(self, launch: Any, arguments: list[tuple], num_phases: int) -> list[Any]:
        """Each phase on every rank before the next; what each rank has after the last."""
        for phase in range(1, num_phases + 1):
            results = [
                launch(*mine, self.buffers, self.epochs[rank], self.layout, rank, phase)
                for rank, mine in enumerate(arguments)
            ]
        return results


def make_parts(ranks: int, rows: int, features: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, features, generator=generator).to(dtype) for _ in range(ranks)]


def sum_in_order(parts: list[Tensor]) -> Tensor:
    total = torch.zeros_like(parts[0], dtype=torch.float32)
    for part in parts:
        total += part.float()
    return total.to(parts[0].dtype)


@pytest.mark.parametrize(("ranks", "rows", "features"), [(2, 1, 96), (4, 3, 64), (3, 5, 33)])
def test_one_shot_sums_in_order_of_rank(ranks: int, rows: int, features: int) -> None:
    """Every rank gets the same bits, call after call, with rows of other calls' sizes between."""
    group = Ranks(ranks, max_row_bytes=512, max_bytes=4096)
    for call, (num_rows, width) in enumerate([(rows, features), (rows + 1, features // 2), (rows, features)]):
        parts = make_parts(ranks, num_rows, width, torch.float16, call)
        for summed in group.run(launch_one_shot, [(part,) for part in parts], 2):
            assert torch.equal(summed, sum_in_order(parts))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_marked_rows_sum_to_the_same_bits(dtype: torch.dtype) -> None:
    """As rows with flags, also by turns with them: both count in one counter."""
    group, flagged = (Ranks(3, max_row_bytes=512, max_bytes=4096) for _ in range(2))
    for call, (rows, width, marked) in enumerate([(2, 96, True), (3, 64, True), (3, 96, False), (1, 32, True)]):
        parts = [(part,) for part in make_parts(3, rows, width, dtype, call)]
        parts[0][0][0, 0] = float("nan")
        expected = flagged.run(launch_one_shot, parts, 2)[0].view(torch.int16)
        for summed in group.run(partial(launch_one_shot, marked=marked), parts, 2):
            assert torch.equal(summed.view(torch.int16), expected)


@pytest.mark.parametrize("marked", [False, True])
def test_the_norm_of_sixteen_bits_follows_in_the_same_kernel(marked: bool) -> None:
    parts, residual = make_parts(2, 3, 96, torch.float16), torch.randn(3, 96).half()
    weight, wanted = torch.rand(96).half() + 0.5, ActivationFormat()
    expected, stream = launch_rms_norm(sum_in_order(parts), weight, 1e-5, residual, wanted)
    group = Ranks(2, max_row_bytes=512, max_bytes=4096)
    arguments = [(part, residual, weight, 1e-5, wanted) for part in parts]
    for normed, summed in group.run(partial(launch_one_shot_norm, marked=marked), arguments, 2):
        assert torch.equal(summed, stream) and torch.equal(normed, expected)


@pytest.mark.parametrize("kind", ["native", "int8_token"])
def test_the_norm_follows_in_the_same_kernel(kind: Any) -> None:
    """The same bits as the sum and the norm's own kernel one after the other."""
    parts, residual = make_parts(2, 3, 96, torch.float32), torch.randn(3, 96)
    weight, wanted = torch.rand(96) + 0.5, ActivationFormat(kind)
    expected, stream = launch_rms_norm(sum_in_order(parts), weight, 1e-5, residual, wanted)
    group = Ranks(2, max_row_bytes=512, max_bytes=4096)
    arguments = [(part, residual, weight, 1e-5, wanted) for part in parts]
    for normed, summed in group.run(launch_one_shot_norm, arguments, 2):
        assert torch.equal(summed, stream)
        if kind == "native":
            assert torch.equal(normed, expected)
        else:
            assert torch.equal(normed.values, expected.values) and torch.equal(normed.scale, expected.scale)


@pytest.mark.parametrize(("ranks", "rows", "features"), [(2, 3, 104), (4, 2, 1036), (3, 40, 128), (2, 1, 8)])
def test_two_shots_sum_in_order_of_rank(ranks: int, rows: int, features: int) -> None:
    """Shares and chunks that do not divide, some ranks' empty."""
    group = Ranks(ranks, max_row_bytes=16, max_bytes=65536)
    for call in range(2):
        parts = make_parts(ranks, rows, features, torch.float16, call)
        for summed in group.run(launch_two_shot, [(part,) for part in parts], 3):
            assert torch.equal(summed, sum_in_order(parts))


@pytest.mark.parametrize(("ranks", "rows", "features"), [(2, 5, 96), (2, 81, 1024), (3, 45, 1024), (4, 16, 32)])
def test_parts_that_were_sent_are_summed_and_normed(
    monkeypatch: pytest.MonkeyPatch, ranks: int, rows: int, features: int
) -> None:
    """The same bits as the sum and the norm's own kernel one after the other, on every rank; shares that do not divide
    into pieces, call after call, and with sums of two shots between."""
    monkeypatch.setattr(all_reduce_launch, "MAX_PROGRAMS", 2)
    group = Ranks(ranks, max_row_bytes=512, max_bytes=4096, max_sent_bytes=(rows + ranks) * features * 2)
    weight = torch.rand(features).half() + 0.5
    for call, num_rows in enumerate((rows, ranks**2, rows)):
        parts = make_parts(ranks, num_rows, features, torch.float16, call)
        residual = torch.randn(num_rows, features, generator=torch.Generator().manual_seed(call)).half()
        shares = [part.split(-(-num_rows // ranks)) for part in parts]
        for source in range(ranks):
            for target in (rank for rank in range(ranks) if rank != source):
                part, offset = shares[source][target], group.layout.find_part(source, target)
                group.memory[target][offset : offset + part.nbytes] = part.reshape(-1).view(torch.uint8)
        for norm in (weight, None):
            outputs = [(torch.full_like(residual, torch.nan), torch.full_like(residual, torch.nan)) for _ in parts]
            for phase in (1, 2):
                for rank in range(ranks):
                    sent = (shares[rank][rank], num_rows, None if norm is None else residual, norm, 1e-5, call)
                    memory = (group.buffers, group.epochs[rank], group.layout, rank, phase)
                    launch_sum_sent(*sent, *memory, outputs=outputs[rank])
            expected = sum_in_order(parts), sum_in_order(parts)
            if norm is not None:
                expected = launch_rms_norm(expected[0], norm, 1e-5, residual)
            for normed, stream in outputs:
                assert torch.equal(stream, expected[1]) and (norm is None or torch.equal(normed, expected[0]))
        few = make_parts(ranks, 1, 16, torch.float16, call)
        for total in group.run(launch_two_shot, [(part,) for part in few], 3):
            assert torch.equal(total, sum_in_order(few))
    assert all(torch.equal(each, group.epochs[0]) for each in group.epochs)


def test_programs_keep_to_their_own_memory() -> None:
    """What a program writes overlaps neither another one's nor the flags, whatever the sizes of a call: the flags of
    one program say nothing of another's."""
    layout = SymmetricLayout(2, max_row_bytes=64, max_bytes=1 << 23, max_sent_bytes=1000)
    assert layout.chunk_bytes >= layout.max_bytes // (2 * MAX_PROGRAMS)
    assert layout.rows_offset >= 4 * 3 * MAX_PROGRAMS * 2
    assert layout.marked_offset == layout.rows_offset + 2 * MAX_PROGRAMS * 2 * 64
    assert layout.chunks_offset == layout.marked_offset + 2 * MAX_MARKED_ROWS * 2 * 128
    assert 4 * (layout.sent_flags + 2) <= layout.rows_offset
    assert layout.parts_offset >= layout.chunks_offset + 2 * MAX_PROGRAMS * 2 * layout.chunk_bytes
    assert layout.sums_offset >= layout.parts_offset + 500 and layout.total_bytes >= layout.sums_offset + 500
    group = Ranks(2, max_row_bytes=64, max_bytes=4096)
    group.run(launch_one_shot, [(torch.full((1, 16), 1.0),)] * 2, 2)  # 64 bytes of program 0, of each rank
    written = group.memory[0].nonzero()[:, 0]
    first = layout.rows_offset + MAX_PROGRAMS * 2 * 64  # the second buffer: calls count from 1
    assert first <= int(written.min()) and int(written.max()) < first + 2 * 64


def test_the_kernel_is_chosen_by_the_size_of_the_message() -> None:
    """One rank, whose flags are its own: the whole of a call, waiting included, again and again."""
    layout = SymmetricLayout(1, max_row_bytes=256, max_bytes=4096)
    memory = torch.zeros(layout.total_bytes, dtype=torch.uint8)
    limits = AllReduceLimits(marked_bytes=128, one_shot_bytes=512, fused_norm_bytes=1024, two_shot_bytes=4096)
    kernels = AllReduceKernels(0, torch.tensor([memory.data_ptr()]), layout, limits)
    weight, wanted = torch.rand(64).half() + 0.5, ActivationFormat()
    for rows in (1, 4, 3, 8, 1):  # 128 bytes each
        x, residual = make_parts(2, rows, 64, torch.float16, rows)
        summed, fused = kernels.all_reduce(x), kernels.all_reduce_add_norm(x, residual, weight, 1e-5, wanted)
        assert summed is not None and torch.equal(summed, x)
        assert fused is not None
        expected, stream = launch_rms_norm(x, weight, 1e-5, residual, wanted)
        assert torch.equal(fused[0], expected) and torch.equal(fused[1], stream)
    x, residual = make_parts(2, 9, 64, torch.float16)
    assert kernels.all_reduce_add_norm(x, residual, weight, 1e-5, wanted) is None, "beyond its limit"
    assert torch.equal(kernels.all_reduce(x), x), "two shots"
    others = [torch.zeros(33, 64).half(), torch.zeros(4, 64), torch.zeros(3, 33).half(), torch.zeros(4, 64).half().T]
    assert all(kernels.all_reduce(each) is None for each in others), "too long, too wide a type, not eights, no rows"


def test_one_sum_is_in_flight_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two partial sums would overwrite the parts of the first: it goes another way."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    layout = SymmetricLayout(1, max_row_bytes=256, max_bytes=4096, max_sent_bytes=4096)
    memory = torch.zeros(layout.total_bytes, dtype=torch.uint8)
    limits = AllReduceLimits(128, 512, 1024, 4096, min_sent_bytes=0, max_sent_bytes=4096)
    kernels = AllReduceKernels(0, torch.tensor([memory.data_ptr()]), layout, limits)
    parallel = TensorParallel(0, 2, kernels=kernels)
    x = torch.randn(4, 64).half()
    for _ in range(2):
        first = parallel.multiply_and_send(x, 64, lambda rows: rows * 2)
        assert first is not None and parallel.multiply_and_send(x, 64, lambda rows: rows * 3) is None
        assert torch.equal(PartialSum(x * 3, parallel).reduce(), x * 3)
        assert first.num_tokens == len(x) and torch.equal(first.reduce(), x * 2)


def test_cards_without_figures_leave_sums_to_nccl() -> None:
    """So does a number of GPUs for which none are known."""
    profiles = {profile.name: profile for profile in PROFILES}
    assert profiles["A100"].get_all_reduce_limits(2) is None and profiles["H200"].get_all_reduce_limits(3) is None
    limits = profiles["H200"].get_all_reduce_limits(2)
    assert limits is not None and limits.one_shot_bytes <= limits.fused_norm_bytes <= limits.two_shot_bytes
