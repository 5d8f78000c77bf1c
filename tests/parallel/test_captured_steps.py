"""Captured steps that sample from parts of the vocabulary, without a GPU: a graph is replayed by calling its launch
function again, and the kernels run in the interpreter. The one rank has the whole vocabulary as its part."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.spec_decode.captured_steps import capture_steps
from tests.spec_decode.conftest import get_model_runner

from quire import LLM, SamplingParams, StructuredOutputsParams
from quire.core.layers.parallel import TensorParallel
from quire.core.layers.vocab import VocabShard
from quire.core.sample.vocab_parallel import VocabParallelSampler
from quire.core.worker.cuda_graphs.decode import DecodeGraphs

from .conftest import PROMPTS, ModelFolders, assert_same, open_engine

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
    """Steps that verify a draft, and steps without: an n-gram is not always found."""
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
