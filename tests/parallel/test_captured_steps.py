"""Captured steps that sample from parts of the vocabulary, and those of stages, without a GPU: a graph is replayed by
calling its launch function again, and the kernels run in the interpreter."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
import triton.runtime.interpreter as interpreter
from tests.spec_decode.captured_steps import capture_runner, capture_steps
from tests.spec_decode.conftest import get_model_runner

from quire import LLM, SamplingParams, StructuredOutputsParams
from quire.core.layers.parallel import TensorParallel
from quire.core.layers.vocab import VocabShard
from quire.core.sample.vocab_parallel import VocabParallelSampler
from quire.core.worker.cuda_graphs.decode import DecodeGraphs
from quire.core.worker.cuda_graphs.prefill import PrefillGraphs, PrefillShapes

from .conftest import PROMPTS, ModelFolders, assert_same, make_params, open_engine

CPU = torch.device("cpu")
FIELDS: dict[str, list[dict]] = {
    "greedy": [{}, {"temperature": 0.0}],
    "local_random": [{"temperature": 0.8}, {}],
    "local_filters": [{"temperature": 1.2, "top_k": 9, "top_p": 0.8}, {"temperature": 0.7, "min_p": 0.05}],
    "random": [{"temperature": 0.8, "top_p": 0.7}, {"temperature": 0.8, "top_k": 5}],
    "masked_random": [{"temperature": 0.8, "structured_outputs": StructuredOutputsParams(regex="[a-z]{30}")}, {}],
}

LOCAL = ("greedy", "local_random", "local_filters")


@pytest.fixture(scope="module")
def captured(folders: ModelFolders) -> Iterator[tuple[LLM, DecodeGraphs]]:
    """Steps that verify a draft, and steps without: an n-gram is not always found. The one rank has the whole
    vocabulary as its part."""
    with open_engine(folders, "llama", "ngram", max_num_seqs=2, num_speculative_tokens=1) as llm:
        runner, vocab_size = get_model_runner(llm), llm.config.model.vocab_size
        vocab_sampler = VocabParallelSampler(VocabShard(vocab_size, TensorParallel()), CPU, 64, use_kernels=True)
        capture_steps(llm, vocab_sampler)
        yield llm, runner.decode_graphs


@pytest.mark.parametrize(
    "variant",
    [pytest.param(name, marks=[] if name in LOCAL else pytest.mark.parallel) for name in FIELDS],
)
def test_replays_sample_the_tokens_of_the_whole(folders, captured, monkeypatch, variant: str) -> None:
    llm, graphs = captured
    replayed, sample_tokens = [], graphs.sample_tokens

    def record(step, name, masks=None):
        replayed.append(name if masks is None else f"masked_{name}")
        return sample_tokens(step, name, masks)

    monkeypatch.setattr(graphs, "sample_tokens", record)
    shared = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True}
    params = [SamplingParams(**({**shared, "seed": i} | each)) for i, each in enumerate(FIELDS[variant])]
    with open_engine(folders, "llama") as plain:
        expected = plain.generate(PROMPTS[:2], params)
    assert_same(llm, expected, params)
    assert variant in replayed


@pytest.mark.parametrize(
    "proposer", ["eagle3", *(pytest.param(name, marks=pytest.mark.parallel) for name in ("none", "ngram", "draft"))]
)
def test_stages_exchange_around_replays(folders, monkeypatch, proposer: str) -> None:
    """Decodes and steps that verify, some requests with fewer drafts than others, and padded prompts beside them. A
    graph of a stage writes the same buffer in each step, while steps before are on their way."""
    launch, lock = interpreter.GridExecutor.__call__, threading.Lock()  # stages are threads, of which it serves one

    def launch_alone(*arguments, **options):
        with lock:
            return launch(*arguments, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_alone)
    params = make_params(6)[:5]
    with open_engine(folders, "qwen3") as plain:
        expected = plain.generate(PROMPTS[:5], params)
    limits = {"max_num_seqs": 4, "num_speculative_tokens": 2} if proposer != "none" else {"max_num_seqs": 4}
    with open_engine(folders, "qwen3", proposer, stages=2, **limits) as llm:
        capturers = []
        for worker in llm.engine_core.executor.workers:
            runner = worker.model_runner
            capturers.append(capture_runner(runner, llm.config.model.vocab_size))
            shapes = PrefillShapes(num_prompt_tokens=(16, 48), num_decodes=(0, 4))
            runner.prefill_graphs = PrefillGraphs(
                runner.model, runner.backends, runner.kv_cache, runner.table, 48, shapes, pipeline=runner.pipeline
            )
        assert_same(llm, expected, params)
        replays = [sum(graph.count for graph in capturer.graphs) for capturer in capturers]
        assert min(replays) > 8
