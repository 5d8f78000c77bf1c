"""Samplers: whole vocabularies, beside the argmax and beside the softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quire.core.contracts.sampler import Sampler, SamplingBatch, SamplingTable
from quire.core.plugin.options import parse_options
from quire.core.testing.chi_square import ChiSquare, group_classes
from quire.server.plugin_bench.cases import BenchCase, KindBench, PreparedCase, count_copies
from quire.server.plugin_bench.timer import make_timer

__all__ = ["SamplerBench"]

_NUM_SAMPLES, _NUM_CLASSES, _ROWS_AT_ONCE = 8192, 32, 256


class SamplerBench(KindBench):
    """A sampler over whole vocabularies: greedy rows beside the argmax, others by chi-square beside the softmax."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._vocab = 151936 if device.type == "cuda" else 1024
        self._deviations: dict[Any, float] = {}  # they do not depend on the number of rows

    def list_cases(self, target: type[Sampler]) -> Sequence[BenchCase]:
        """Greedy rows, and rows with temperature, top-k and top-p."""
        kinds = {"greedy": (0.0, 0, 1.0), "T 0.8": (0.8, 0, 1.0), "T 0.6, top_k 20, top_p 0.95": (0.6, 20, 0.95)}
        rows = (1, 32, 256) if self.device.type == "cuda" else (4,)
        return [BenchCase(f"{n} rows, {name}", (n, kinds[name])) for n in rows for name in kinds]

    def prepare(self, target: type[Sampler], case: BenchCase) -> PreparedCase:
        """Into the request table where it can, else as it is called between graphs."""
        rows, (temperature, top_k, top_p) = case.parameters
        sampler = target(self._vocab, self.device, parse_options(target, {}))
        in_graph = sampler.prepare_graph_sampling(rows) and self.device.type == "cuda"
        copies = count_copies(rows * self._vocab * 2, self.device)
        dtype = torch.bfloat16 if in_graph else torch.float32
        sets = [(torch.randn(rows, self._vocab, device=self.device) * 3).to(dtype) for _ in range(copies)]
        table = _make_table(rows, temperature, top_k, top_p, self.device)
        index = torch.arange(rows, device=self.device)
        tokens = torch.zeros(rows, dtype=torch.int32, device=self.device)
        batch = SamplingBatch(
            table.temperature[:rows], table.top_k[:rows], table.top_p[:rows], table.min_p[:rows], table.seed[:rows],
            table.num_tokens[:rows].long(), temperature > 0, top_k > 0, top_p < 1, False,
        )  # fmt: skip

        def launch() -> None:
            for logits in sets:
                if in_graph:
                    sampler.sample_from_table(logits, index, table, tokens, greedy=temperature == 0)
                else:
                    tokens.copy_(sampler.sample(logits.clone(), batch))

        timer = make_timer(launch, self.device, capture=in_graph)
        error, figures = None, {}
        if temperature == 0:
            error = float((sampler.sample(sets[0].float(), batch).long() != sets[0].argmax(-1)).float().mean())
        else:
            key = (target, case.parameters[1])
            if key not in self._deviations:
                self._deviations[key] = self._measure_deviations(sampler, temperature, top_k, top_p)
            figures = {"chi_square": self._deviations[key]}
        notes = ["chi square: standard deviations from what the softmax gives; over 6 it is wrong"] if figures else []
        notes += [] if in_graph else ["launched eagerly, logits in float32 copied before"]
        num_bytes = rows * self._vocab * dtype.itemsize
        return PreparedCase(lambda: timer() / copies, error, num_bytes, figures=figures, note="; ".join(notes))

    def _measure_deviations(self, sampler: Sampler, temperature: float, top_k: int, top_p: float) -> float:
        """Of thousands of samples of one row, by seed and position, in classes of tokens; infinite where a token comes
        that may not."""
        logits = torch.randn(self._vocab, generator=torch.Generator().manual_seed(3)) * 3
        probability = _solve(logits, temperature, top_k, top_p)
        classes = group_classes(probability, _NUM_CLASSES)
        masses = torch.zeros(_NUM_CLASSES + 1, dtype=torch.float64).index_add_(0, classes, probability)
        counts = torch.zeros(_NUM_CLASSES + 1)
        for first in range(0, _NUM_SAMPLES, _ROWS_AT_ONCE):
            numbers = torch.arange(first, first + _ROWS_AT_ONCE, device=self.device)
            table = _make_table(_ROWS_AT_ONCE - 1, temperature, top_k, top_p, self.device)
            batch = SamplingBatch(
                table.temperature, table.top_k, table.top_p, table.min_p, numbers * 7919 + 5, numbers + 9, True,
                top_k > 0, top_p < 1, False,
            )  # fmt: skip
            tokens = sampler.sample(logits.repeat(_ROWS_AT_ONCE, 1).to(self.device), batch).long().cpu()
            counts += torch.bincount(classes[tokens], minlength=len(counts))
        result = ChiSquare.measure(counts, masses)
        return float("inf") if result.num_impossible else result.deviations


def _solve(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """The probability of each token, in float64."""
    scaled = logits.double() / temperature
    ordered, order = scaled.sort(descending=True)
    if top_k:
        ordered[top_k:] = float("-inf")
    probability = ordered.softmax(-1)
    before = probability.cumsum(-1) - probability
    kept = probability.masked_fill(before >= top_p, 0.0)
    return torch.zeros_like(kept).index_copy_(0, order, kept / kept.sum())


def _make_table(rows: int, temperature: float, top_k: int, top_p: float, device: torch.device) -> SamplingTable:
    def column(value: Any, dtype: torch.dtype) -> Tensor:
        return torch.full((rows + 1,), value, dtype=dtype, device=device)

    seeds = torch.arange(rows + 1, device=device) * 7919
    return SamplingTable(
        column(0, torch.int32)[:, None].repeat(1, 4096), column(100, torch.int32), column(temperature, torch.float32),
        column(top_k, torch.int32), column(top_p, torch.float32), column(0, torch.float32), seeds,
    )  # fmt: skip
