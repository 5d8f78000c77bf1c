"""Sums over the GPUs of a host: Quire's kernels against NCCL, for correctness and for time.

    PYTHONPATH=src python benchmarks/kernels/all_reduce.py [--gpus 2] [--features 4096] [--kib 8 512] [--check-only]

Microseconds of a call among 50 in a CUDA graph, the median of 20 replays, the slowest rank; bf16 bytes of a rank.
``--inputs 2048 7168``: row-parallel products of so many inputs with the sum and the norm behind them, one after the
other and with parts that are sent while the product runs; eagerly, messages of ``--kib``, 16 to 128 MiB by default.

NVLink multicast is not used; where the host forbids it, set TORCH_SYMM_MEM_DISABLE_MULTICAST=1 and NCCL_NVLS_ENABLE=0.
With residual and norm, NCCL is followed by the norm's own kernel.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from quire.core.contracts.quant import ActivationFormat
from quire.core.ops.all_reduce import AllReduceKernels
from quire.core.ops.device_profile import AllReduceLimits
from quire.core.ops.kernels.all_reduce_launch import MAX_MARKED_ROWS, MAX_PROGRAMS
from quire.core.ops.kernels.norm_kernel import launch_rms_norm

CALLS, REPLAYS = 50, 20
KIB = (8, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
KIB_OF_PRODUCTS = (16384, 32768, 65536, 131072)
NATIVE = ActivationFormat()
NO_LIMIT, NEVER = 1 << 30, -1


class Contender:
    """One way to sum, or to sum and norm; None from ``run`` where it does not take the message."""

    def __init__(self, name: str, run: Callable[[Tensor, Tensor, Tensor], Any], with_norm: bool) -> None:
        self.name = name
        self.run = run
        self.with_norm = with_norm


def make_contenders(rank: int, size: int, device: torch.device) -> list[Contender]:
    """Every rank makes them in this order: opening memory is collective."""

    def open_kernels(limits: AllReduceLimits) -> AllReduceKernels:
        return AllReduceKernels._open(rank, size, None, device, limits)

    marked = open_kernels(AllReduceLimits(NO_LIMIT, NO_LIMIT, NO_LIMIT, 16 << 20))
    one_shot = open_kernels(AllReduceLimits(NEVER, NO_LIMIT, NO_LIMIT, 16 << 20))
    two_shot = open_kernels(AllReduceLimits(NEVER, NEVER, NEVER, 16 << 20))

    def nccl(x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x

    def rows_fit(x: Tensor) -> bool:
        return len(x) <= MAX_PROGRAMS

    def marked_with_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
        return marked.all_reduce_add_norm(x, residual, weight, 1e-5, NATIVE) if len(x) <= MAX_MARKED_ROWS else None

    def sum_then_norm(sum_up: Callable[[Tensor], Tensor | None]) -> Callable[[Tensor, Tensor, Tensor], Any]:
        def run(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
            summed = sum_up(x)
            return None if summed is None else launch_rms_norm(summed, weight, 1e-5, residual)

        return run

    return [
        Contender("nccl", lambda x, r, w: nccl(x), False),
        Contender("marked", lambda x, r, w: marked.all_reduce(x) if len(x) <= MAX_MARKED_ROWS else None, False),
        Contender("one shot", lambda x, r, w: one_shot.all_reduce(x) if rows_fit(x) else None, False),
        Contender("two shots", lambda x, r, w: two_shot.all_reduce(x), False),
        Contender("nccl, norm", sum_then_norm(nccl), True),
        Contender("marked with norm", marked_with_norm, True),
        Contender("one shot with norm", lambda x, r, w: one_shot.all_reduce_add_norm(x, r, w, 1e-5, NATIVE), True),
        Contender("two shots, norm", sum_then_norm(two_shot.all_reduce), True),
    ]


def check(contender: Contender, x: Tensor, residual: Tensor, weight: Tensor, size: int) -> None:
    """Against a sum in float64 of what every rank has, and the same bits on every rank; ten times, since what goes
    wrong between ranks goes wrong at times."""
    parts = [torch.empty_like(x) for _ in range(size)]
    dist.all_gather(parts, x)
    expected = sum(part.double() for part in parts)
    assert isinstance(expected, Tensor)
    if contender.with_norm:
        stream = expected + residual.double()
        expected = weight.double() * stream * torch.rsqrt(stream.pow(2).mean(-1, keepdim=True) + 1e-5)
    for _ in range(10):
        result = contender.run(x.clone(), residual, weight)
        got = result[0] if isinstance(result, tuple) else result
        off = ((got.double() - expected).norm() / expected.norm()).item()
        assert off < 6e-3, f"{contender.name}, {x.nbytes} bytes: off by {off:.2e} of the sum"
        if not contender.name.startswith("nccl"):
            others = [torch.empty_like(got) for _ in range(size)]
            dist.all_gather(others, got.contiguous())
            assert all(torch.equal(other, got) for other in others), f"{contender.name}: ranks have other bits"


def measure(contender: Contender, x: Tensor, residual: Tensor, weight: Tensor) -> float:
    """Microseconds a call."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for _ in range(3):
            contender.run(x, residual, weight)
        stream.synchronize()
        graph.capture_begin(capture_error_mode="thread_local")
        for _ in range(CALLS):
            contender.run(x, residual, weight)
        graph.capture_end()
        times = []
        for _ in range(REPLAYS):
            dist.barrier()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000 / CALLS)
    slowest = torch.tensor([statistics.median(times)], device=x.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def time_products(rank: int, size: int, device: torch.device, features: int, inputs: list[int], kib: list[int]) -> None:
    """Print microseconds of a product, of it with NCCL's sum and the norm, and of it with parts that are sent."""
    limits = AllReduceLimits(NEVER, NEVER, NEVER, 1 << 20, 0, max(kib) << 10)
    kernels = AllReduceKernels._open(rank, size, None, device, limits)
    shared = torch.Generator(device).manual_seed(99)
    gain = torch.rand(features, generator=shared, device=device).bfloat16() + 0.5
    generator = torch.Generator(device).manual_seed(rank)
    if rank == 0:
        print(f"{'KiB':>8}{'inputs':>8}{'product':>20}{'product, nccl, norm':>22}{'parts sent':>20}")
    for num_inputs in inputs:
        weight = torch.randn(features, num_inputs, generator=generator, device=device).bfloat16() * num_inputs**-0.5
        for rows in (each // (2 * features) for each in (size << 10 for size in kib)):
            x = torch.randn(rows, num_inputs, generator=generator, device=device).bfloat16()
            residual = torch.randn(rows, features, generator=shared, device=device).bfloat16()

            def apart(x: Tensor = x, weight: Tensor = weight, residual: Tensor = residual) -> tuple[Tensor, Tensor]:
                part = x @ weight.T
                dist.all_reduce(part)
                return launch_rms_norm(part, gain, 1e-5, residual)

            def together(x: Tensor = x, weight: Tensor = weight, residual: Tensor = residual) -> tuple[Tensor, Tensor]:
                parts = kernels.multiply_and_send(x, features, partial(F.linear, weight=weight))
                assert parts is not None
                return kernels.finish_sum(parts, residual, gain, 1e-5)

            for _ in range(10):
                for got, expected in zip(together(), apart(), strict=True):
                    off = ((got.double() - expected.double()).norm() / expected.double().norm()).item()
                    others = [torch.empty_like(got) for _ in range(size)]
                    dist.all_gather(others, got)
                    assert off < 6e-3 and all(torch.equal(other, got) for other in others), f"off by {off:.2e}"
            runs = [partial(torch.matmul, x, weight.T), apart, together]
            times = [time_eagerly(run, device) for run in runs]
            if rank == 0:
                cells = f"{times[0]:>20.1f}{times[1]:>22.1f}{times[2]:>20.1f}"
                print(f"{rows * features >> 9:>8}{num_inputs:>8}{cells}", flush=True)


def time_eagerly(run: Callable[[], Any], device: torch.device) -> float:
    """Microseconds a call, of the slower rank."""
    times = []
    for _ in range(5):
        dist.barrier()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(20):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / 20)
    slowest = torch.tensor([statistics.median(times)], device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def run_rank(
    rank: int, size: int, store: str, features: int, kib: list[int], check_only: bool, inputs: list[int]
) -> None:
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=size, device_id=device)
    if inputs:
        time_products(rank, size, device, features, inputs, kib)
        torch.cuda.synchronize()
        dist.destroy_process_group()
        return
    contenders = make_contenders(rank, size, device)
    if rank == 0:
        print(f"{size} x {torch.cuda.get_device_name()}, rows of {features} bf16, torch {torch.__version__}")
        print(f"{'KiB':>8}" + "".join(f"{each.name:>20}" for each in contenders))
    generator = torch.Generator(device).manual_seed(rank)
    for nbytes in (each << 10 for each in kib):
        rows = nbytes // (2 * features)
        if rows == 0:
            continue
        x = torch.randn(rows, features, generator=generator, device=device).bfloat16()
        shared = torch.Generator(device).manual_seed(99)
        residual = torch.randn(rows, features, generator=shared, device=device).bfloat16()
        weight = torch.rand(features, generator=shared, device=device).bfloat16() + 0.5
        cells = []
        for contender in contenders:
            if contender.run(x.clone(), residual, weight) is None:
                cells.append(f"{'-':>20}")
                continue
            check(contender, x, residual, weight, size)
            cells.append(f"{'right':>20}" if check_only else f"{measure(contender, x * 0, residual, weight):>20.2f}")
        if rank == 0:
            print(f"{nbytes / 1024:>8.0f}" + "".join(cells), flush=True)
    torch.cuda.synchronize()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--kib", type=int, nargs="+", help="sizes of messages")
    parser.add_argument("--check-only", action="store_true", help="sums alone, without times")
    parser.add_argument("--inputs", type=int, nargs="+", default=[], help="time products with the sum behind them")
    args = parser.parse_args()
    kib = args.kib or (KIB_OF_PRODUCTS if args.inputs else KIB)
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        mp.spawn(run_rank, (args.gpus, store, args.features, kib, args.check_only, args.inputs), nprocs=args.gpus)


if __name__ == "__main__":
    main()
