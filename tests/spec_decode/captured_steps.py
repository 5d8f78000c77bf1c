"""Captured steps without a GPU: a graph is replayed by calling its launch function again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quire.core.sample.sampler import GumbelSampler
from quire.core.worker.cuda_graphs.capture import CapturedGraph
from quire.core.worker.cuda_graphs.decode import DecodeGraphs

from .conftest import get_model_runner

if TYPE_CHECKING:
    from quire import LLM
    from quire.core.sample.vocab_parallel import VocabParallelSampler
    from quire.core.worker.model_runner import ModelRunner


class RepeatedLaunch:
    """What a CUDA graph does: the same work on the same buffers, into the same results."""

    def __init__(self, launch, output) -> None:
        self._launch, self._output = launch, output
        self.count = 0

    def replay(self) -> None:
        self.count += 1
        output = self._launch()
        if self._output is not None:
            self._output.copy_(output)


class RepeatingCapturer:
    """A ``GraphCapturer`` that captures nothing and launches again."""

    def __init__(self) -> None:
        self.graphs: list[RepeatedLaunch] = []

    def capture_graph(self, launch):
        output = launch()
        self.graphs.append(RepeatedLaunch(launch, output))
        return CapturedGraph(self.graphs[-1], output)


class TableSampler(GumbelSampler):
    """Samples from the table with kernels, as on a GPU."""

    def prepare_graph_sampling(self, max_rows: int) -> bool:
        self.allocate_workspace(max_rows)
        return True


def capture_steps(llm: LLM, vocab_sampler: VocabParallelSampler | None = None) -> RepeatingCapturer:
    """Let ``llm`` run its decodes and verifications in captured steps, and its proposer draft in them."""
    return capture_runner(get_model_runner(llm), llm.config.model.vocab_size, vocab_sampler)


def capture_runner(
    runner: ModelRunner, vocab_size: int, vocab_sampler: VocabParallelSampler | None = None
) -> RepeatingCapturer:
    """``capture_steps`` of one rank."""
    capturer = RepeatingCapturer()
    sampler = TableSampler(vocab_size, torch.device("cpu"))
    sampler.prepare_graph_sampling(64)
    runner.sampling_runner.device_sampler = sampler
    runner.sampling_runner.vocab_sampler = vocab_sampler
    for backend in runner.backends:
        backend.graph_support = frozenset({"decode", "verify"})
    draft_runner = runner.draft_runner
    observes_every_step = draft_runner is not None and draft_runner.proposer.observes_every_step
    with torch.inference_mode():
        runner.decode_graphs = DecodeGraphs(
            runner.model,
            runner.backends,
            runner.kv_cache,
            runner.table,
            runner.block_size,
            sampler,
            runner.max_draft_tokens,
            launch_draft_prefill=draft_runner.launch_draft_prefill if observes_every_step else None,
            token_masks=runner.sampling_runner.token_masks,
            vocab_sampler=vocab_sampler,
            pipeline=runner.pipeline,
        )
        runner.decode_graphs.capture_graphs(capturer)
        if draft_runner is not None:
            draft_runner.capture_graphs(capturer)
    return capturer
