"""As in ``test_tokens``, with a process for each rank: what ranks are sent and send, and collectives between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.quant.test_fixtures import FIXTURES

from quire import LLM, SamplingParams

from .conftest import PROMPTS, PROPOSERS, ModelFolders, assert_same, make_params, open_engine

pytestmark = pytest.mark.parallel

SAMPLE = [("llama", "draft", 4), ("mistral", "none", 2), ("qwen2", "suffix", 2), ("qwen3", "eagle3", 2)]
QUANTIZED = [
    ("awq-gemm-llama", "ngram", 2),
    ("gptq-act-order-qwen2", "suffix", 2),
    ("ct-w8a8-mistral", "none", 2),
    ("ct-fp8-block-llama", "suffix", 2),
    ("ct-w4a16-g32-qwen2", "ngram", 4),
    ("awq-gemv-fast-qwen3", "none", 2),
]
"""Each family, each quantization, each kind of proposer and both sizes, in few engines."""


@pytest.mark.parametrize(("family", "proposer", "size"), SAMPLE)
def test_tokens_are_those_of_one_process(folders: ModelFolders, family: str, proposer: str, size: int) -> None:
    params = make_params()
    with open_engine(folders, family) as llm:
        expected = llm.generate(PROMPTS, params)
    limits = {"tensor_parallel_size": size, "num_gpu_blocks_override": 60}
    with open_engine(folders, family, proposer, **limits) as llm:
        assert_same(llm, expected, params)
        stats = llm.get_stats()
        assert stats["num_preemptions_total"] > 0 and stats["prefix_cache_hits_total"] > 0
        assert proposer in ("none", "suffix") or stats["spec_decode_num_draft_tokens_total"] > 0


@pytest.mark.parametrize(("name", "proposer", "size"), QUANTIZED)
def test_quantized_checkpoints(folders: ModelFolders, name: str, proposer: str, size: int) -> None:
    prompts = [[token % 60 for token in prompt] for prompt in PROMPTS[:8]]
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=16, ignore_eos=True)
    answers = []
    for arguments in ({}, {"tensor_parallel_size": size, **PROPOSERS[proposer]}):
        llm = open_quantized(FIXTURES / name, folders.get("llama"), **arguments)
        try:
            outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
        finally:
            llm.shutdown()
        answers.append([output.outputs[0].token_ids for output in outputs])
    assert answers[0] == answers[1]


def open_quantized(model: Path, tokenizer: Path, **arguments: Any) -> LLM:
    sizes = {"max_model_len": 160, "max_num_seqs": 8, "max_num_batched_tokens": 48, "cpu_threads": 1}
    return LLM(str(model), tokenizer=str(tokenizer), device="cpu", **sizes, **arguments)
