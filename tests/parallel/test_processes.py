"""As in ``test_tokens``, with a process for each rank: what ranks are sent and send, and collectives between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.quant.test_fixtures import FIXTURES

from quire import LLM, SamplingParams

from .conftest import PROMPTS, PROPOSERS, ModelFolders, assert_same, make_params, make_two_layers, open_engine

pytestmark = pytest.mark.parallel

SAMPLE = [
    ("llama", "draft", 4, 1),
    ("mistral", "none", 2, 1),
    ("qwen2", "suffix", 2, 1),
    ("qwen3", "eagle3", 2, 1),
    ("qwen2", "draft", 1, 2),
    ("llama", "eagle3", 2, 2),
]
QUANTIZED = [
    ("awq-gemm-llama", "ngram", 2, 1),
    ("gptq-act-order-qwen2", "suffix", 2, 1),
    ("ct-w8a8-mistral", "none", 1, 2),
    ("ct-fp8-block-llama", "suffix", 2, 1),
    ("ct-w4a16-g32-qwen2", "ngram", 2, 2),
    ("awq-gemv-fast-qwen3", "none", 2, 1),
]
"""Each family, each quantization, each kind of proposer and all sizes (ranks of a stage, and stages), in few
engines."""


@pytest.mark.parametrize(("family", "proposer", "size", "stages"), SAMPLE)
def test_tokens_are_those_of_one_process(
    folders: ModelFolders, family: str, proposer: str, size: int, stages: int
) -> None:
    params = make_params()
    with open_engine(folders, family) as llm:
        expected = llm.generate(PROMPTS, params)
    limits = {"tensor_parallel_size": size, "pipeline_parallel_size": stages, "num_gpu_blocks_override": 60}
    with open_engine(folders, family, proposer, **limits) as llm:
        assert_same(llm, expected, params)
        stats = llm.get_stats()
        assert stats["num_preemptions_total"] > 0 and stats["prefix_cache_hits_total"] > 0
        assert proposer in ("none", "suffix") or stats["spec_decode_num_draft_tokens_total"] > 0


@pytest.mark.parametrize(("name", "proposer", "size", "stages"), QUANTIZED)
def test_quantized_checkpoints(
    folders: ModelFolders, tmp_path: Path, name: str, proposer: str, size: int, stages: int
) -> None:
    model = make_two_layers(FIXTURES / name, tmp_path / "model")
    prompts = [[token % 60 for token in prompt] for prompt in PROMPTS[:8]]
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=16, ignore_eos=True)
    answers = []
    ranks = {"tensor_parallel_size": size, "pipeline_parallel_size": stages}
    for arguments in ({}, {**ranks, **PROPOSERS[proposer]}):
        llm = open_quantized(model, folders.get("llama"), **arguments)
        try:
            outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
        finally:
            llm.shutdown()
        answers.append([output.outputs[0].token_ids for output in outputs])
    assert answers[0] == answers[1]


def open_quantized(model: Path, tokenizer: Path, **arguments: Any) -> LLM:
    sizes = {"max_model_len": 160, "max_num_seqs": 8, "max_num_batched_tokens": 48, "cpu_threads": 1}
    return LLM(str(model), tokenizer=str(tokenizer), device="cpu", **sizes, **arguments)
