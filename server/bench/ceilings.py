"""``quire bench ceilings``: memory bandwidth and matrix throughput of this machine, for the
roofline bounds of the other benchmarks."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quire.core.env import count_cpus, num_threads
from quire.core.errors import ConfigError
from quire.server.bench.report import describe_environment, get_device_name, print_json
from quire.server.bench.roofline import Ceilings, save_ceilings

__all__ = ["measure_ceilings", "run"]


def run(args: argparse.Namespace) -> int:
    """Measure, print and keep."""
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: there is no CUDA GPU here; measure the processor with --device cpu")
    if device == "cpu":
        torch.set_num_threads(args.cpu_threads or num_threads() or max(1, count_cpus() - 1))  # as the engine
    print(f"{get_device_name(device)}: measuring", flush=True)
    ceilings, rows = measure_ceilings(device, progress=print)
    path = save_ceilings(get_device_name(device), ceilings, Path(args.out) if args.out else None)
    print(f"saved in {path}: bounds use the best read, and the best product of each kind")
    if args.json:
        print_json({**describe_environment(device), **asdict(ceilings), "measured": rows})
    return 0


def measure_ceilings(
    device: str, progress: Callable[[str], None] = lambda line: None
) -> tuple[Ceilings, list[dict[str, Any]]]:
    """The ceilings, and every measurement they are the best of: bytes/s and operations/s on random data.

    Copying reads and writes, so it counts both ways; reading is a sum. The products are large and square. On a CPU they
    are of float32, which is what the engine computes in there, and much smaller.
    """
    on_gpu = device == "cuda"
    rows: list[dict[str, Any]] = []

    def record(what: str, unit: str, amount: float, work: Callable[[], object]) -> float:
        rate = amount / _median_seconds(work, device)
        rows.append({"what": what, "unit": unit, "rate": rate})
        scale = 1e12 if on_gpu or unit == "FLOP/s" else 1e9
        progress(f"{what:<34} {rate / scale:10.3f} {'T' if scale == 1e12 else 'G'}{unit}")
        return rate

    count = (1 << 30) if on_gpu else (1 << 25)
    source = torch.empty(count, dtype=torch.float32, device=device).uniform_()
    target = torch.empty_like(source)
    copied = record(f"copy {count * 4 >> 20} MiB", "B/s", 8.0 * count, partial(target.copy_, source))
    read = record(f"read {count * 4 >> 20} MiB", "B/s", 4.0 * count, partial(torch.sum, source))
    dtype = torch.bfloat16 if on_gpu else torch.float32
    sizes = (4096, 8192, 16384) if on_gpu else (512, 1024)
    best_flops_s = best_fp8_flops_s = 0.0
    for n in sizes:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        name = str(dtype).removeprefix("torch.")
        best_flops_s = max(
            best_flops_s, record(f"{name} product {n}", "FLOP/s", 2.0 * n**3, partial(torch.matmul, a, b))
        )
        if on_gpu and torch.cuda.get_device_capability() >= (8, 9):
            best_fp8_flops_s = max(
                best_fp8_flops_s, record(f"fp8 product {n}", "FLOP/s", 2.0 * n**3, _fp8_product(a, b))
            )
    return Ceilings(max(copied, read), best_flops_s, best_fp8_flops_s), rows


def _fp8_product(a: torch.Tensor, b: torch.Tensor) -> Callable[[], object]:
    one = torch.ones((), device=a.device)
    left, right = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t().contiguous().t()
    return lambda: torch._scaled_mm(left, right, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def _median_seconds(work: Callable[[], object], device: str) -> float:
    """Of one call, warm: the median of batches of calls that take about 20 ms each."""
    on_gpu = device == "cuda"
    walls: list[float] = []
    calls = 1
    for batch in range(12):
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            work()
        if on_gpu:
            torch.cuda.synchronize()
        wall = time.perf_counter() - start
        if batch < 2:
            calls = max(1, min(1000, round(calls * 0.02 / wall)))
        else:
            walls.append(wall / calls)
    return statistics.median(walls)
