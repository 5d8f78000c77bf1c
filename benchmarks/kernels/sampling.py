"""Sampling on one GPU: each kind of sampling beside the torch code and the lower bound, and penalties.

    PYTHONPATH=src python benchmarks/kernels/sampling.py

Microseconds for all rows, fed back into the request table, as replays of a CUDA graph that goes through several sets of
random bf16 logits, so that they come from memory and not from the L2 cache. The lower bound reads the logits once at
the bandwidth measured on the same kind of card. ``spread`` is the logits' standard deviation: at 0.7, that of a model
with random weights, nearly the whole vocabulary is in the nucleus.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quire.core.contracts.sampler import SamplingBatch, SamplingTable
from quire.core.sample.filters import apply_filters
from quire.core.sample.inputs import PenaltyColumns
from quire.core.sample.kernels.penalties_kernel import launch_penalties
from quire.core.sample.noise import gumbel
from quire.core.sample.penalties import apply_penalties_torch
from quire.core.sample.sampler import GumbelSampler
from quire.server.plugin_bench.timer import time_graph

READ = 4.29e12
"""Bytes a second, H200."""
SHAPES = [(1, 151936), (32, 151936), (256, 151936), (256, 128256)]
PARAMS: dict[str, tuple[float, int, float, float]] = {  # temperature, top_k, top_p, min_p
    "greedy": (0.0, 0, 1.0, 0.0),
    "T 0.8": (0.8, 0, 1.0, 0.0),
    "T 0.8, top_p 0.95": (0.8, 0, 0.95, 0.0),
    "top_k 50": (0.8, 50, 1.0, 0.0),
    "T 0.6, top_k 20, top_p 0.95": (0.6, 20, 0.95, 0.0),
    "min_p 0.05": (0.8, 0, 1.0, 0.05),
}
CUDA = torch.device("cuda")


def main() -> None:
    torch.manual_seed(0)
    print(f"{'rows':>4} {'vocab':>7} {'spread':>6} {'sampling':<28} {'us':>8} {'bound':>7} {'torch':>9} {'same':>7}")
    for rows, vocab in SHAPES:
        for spread in (0.7, 3.0):
            sets = [(torch.randn(rows, vocab, device=CUDA) * spread).bfloat16() for _ in range(6)]
            sampler = GumbelSampler(vocab, CUDA)
            sampler.prepare_graph_sampling(rows)
            for name, params in PARAMS.items():
                report(rows, vocab, spread, name, params, sets, sampler)
    for rows in (32, 256):
        report_penalties(rows, 151936, 1000)


def report(
    rows: int,
    vocab: int,
    spread: float,
    name: str,
    params: tuple[float, int, float, float],
    sets: list[Tensor],
    sampler: GumbelSampler,
) -> None:
    table = table_of(rows, params)
    index, tokens = torch.arange(rows, device=CUDA), torch.zeros(rows, dtype=torch.int32, device=CUDA)

    def sample(turn: int) -> None:
        sampler.sample_from_table(sets[turn % len(sets)], index, table, tokens, greedy=params[0] == 0)

    us = replay_us(sample)
    table.num_tokens.fill_(100)
    position = table.num_tokens[:rows].long()
    batch = SamplingBatch(
        table.temperature[:rows], table.top_k[:rows], table.top_p[:rows], table.min_p[:rows], table.seed[:rows],
        position, params[0] > 0, params[1] > 0, params[2] < 1, params[3] > 0,
    )  # fmt: skip
    expected = torch_sample(sets[0], batch)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    torch_sample(sets[0], batch)
    end.record()
    end.synchronize()
    sample(0)
    same = (tokens == expected).float().mean().item()
    bound = rows * vocab * 2 / READ * 1e6
    print(
        f"{rows:>4} {vocab:>7} {spread:>6} {name:<28} {us:>8.1f} {bound:>7.1f} {start.elapsed_time(end) * 1e3:>9.0f} "
        f"{same:>7.1%}",
        flush=True,
    )


def torch_sample(logits: Tensor, batch: SamplingBatch) -> Tensor:
    if not batch.any_random:
        return logits.argmax(-1)
    x = apply_filters(logits.float() / batch.temperature[:, None], batch)
    return (x + gumbel(batch.seed, batch.position, x.shape[1])).argmax(-1)


def report_penalties(rows: int, vocab: int, length: int) -> None:
    logits = torch.randn(rows, vocab, device=CUDA)
    table = torch.randint(0, vocab, (rows, length), dtype=torch.int32, device=CUDA)
    index, lens = torch.arange(rows, device=CUDA), torch.full((rows,), length, dtype=torch.int32, device=CUDA)
    columns = PenaltyColumns(table, lens // 2, *(torch.rand(rows, device=CUDA) + 0.5 for _ in range(3)))
    ours = replay_us(lambda _: launch_penalties(logits, index, index, lens, length, columns), 5)
    theirs = replay_us(lambda _: apply_penalties_torch(logits, lens, columns), 5)
    print(f"penalties, {rows} rows of {length} tokens: {ours:.1f} us, torch {theirs:.1f} us")


def table_of(rows: int, params: tuple[float, int, float, float]) -> SamplingTable:
    def column(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((rows + 1,), value, dtype=dtype, device=CUDA)

    return SamplingTable(
        column(0, torch.int32)[:, None].repeat(1, 4096),
        column(100, torch.int32),
        column(params[0], torch.float32),
        column(params[1], torch.int32),
        column(params[2], torch.float32),
        column(params[3], torch.float32),
        torch.randint(0, 2**62, (rows + 1,), device=CUDA),
    )


def replay_us(work: Callable[[int], None], turns: int = 12, repeats: int = 11) -> float:
    """Median over replays of the time of one turn, microseconds."""

    def launch() -> None:
        for turn in range(turns):
            work(turn)

    return 1e6 * time_graph(launch, turns, repeats, num_warmups=0)


if __name__ == "__main__":
    main()
