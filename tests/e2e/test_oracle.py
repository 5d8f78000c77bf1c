"""Greedy and seeded tokens equal transformers', however the engine batches, chunks, shares, preempts and forks."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from quire import LLM, SamplingParams
from quire.core.testing.oracle import assert_matches_reference
from quire.core.testing.tiny_models import make_tiny_model

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
ENGINES = {
    "roomy": {},
    "tight pool, chunks of 16": {"num_gpu_blocks_override": 20, "max_num_batched_tokens": 16, "max_num_seqs": 8},
    "chunks of 1, blocks of 4": {"max_num_batched_tokens": 1, "max_num_seqs": 1, "block_size": 4},
    "no prefix cache": {"enable_prefix_caching": False, "max_num_batched_tokens": 64, "max_num_seqs": 32},
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("model") / request.param
    make_tiny_model(request.param, path)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    engines: dict[str, LLM] = {}
    yield path, reference, engines
    for llm in engines.values():
        llm.shutdown()


def engine(engines: dict[str, LLM], path: Path, name: str) -> LLM:
    if name not in engines:
        engines[name] = LLM(model=str(path), max_model_len=192, device="cpu", **ENGINES[name])
    return engines[name]


def prompts_for(seed: int, count: int, vocab: int) -> list[list[int]]:
    """Mixed lengths, some sharing prefixes."""
    rng = random.Random(seed)
    shared = [rng.randrange(3, vocab) for _ in range(70)]
    processed = []
    for _ in range(count):
        own = [rng.randrange(3, vocab) for _ in range(rng.randrange(1, 60))]
        processed.append(shared[: rng.choice([0, 0, 16, 33, 70])] + own)
    return processed


@pytest.mark.parametrize("name", ENGINES)
def test_greedy_equals_transformers(family, name: str) -> None:
    path, reference, engines = family
    llm = engine(engines, path, name)
    prompts = prompts_for(1, 8, llm.config.model.vocab_size)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    for prompt, output in zip(prompts, llm.generate(prompts, params), strict=True):
        assert len(output.outputs[0].token_ids) == 20
        assert_matches_reference(reference, prompt, output.outputs[0].token_ids, params)


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), name=st.sampled_from(list(ENGINES)), seed=st.integers(0, 10**6))
def test_random_arrivals(family, data: st.DataObject, name: str, seed: int) -> None:
    """32 requests at random times, greedy and sampled mixed, some aborted: each gets what it would get alone."""
    path, reference, engines = family
    llm = engine(engines, path, name)
    rng = random.Random(seed)
    prompts = prompts_for(seed, 12 if "chunks of 1" in name else 32, llm.config.model.vocab_size)
    expected: dict[str, tuple[list[int], SamplingParams]] = {}
    got: dict[str, list[int]] = {}
    waiting = list(enumerate(prompts))
    free_before = llm.engine_core.scheduler.debug_state().allocator.num_free_blocks()
    while waiting or len(llm.output_processor):
        for _ in range(rng.choice([0, 0, 1, 3])):
            if waiting:
                i, prompt = waiting.pop()
                params = SamplingParams(
                    temperature=rng.choice([0, 0.7, 1.3]),
                    top_p=rng.choice([1.0, 0.8]),
                    top_k=rng.choice([0, 7]),
                    seed=i,
                    n=rng.choice([1, 1, 3]),
                    max_tokens=rng.randrange(1, 24),
                    ignore_eos=True,
                )
                name_i = f"{seed}/{i}"
                requests = llm.input_processor.process_inputs(name_i, prompt, params)
                llm.output_processor.add_request(name_i, None, requests, "final")
                for request in requests:
                    llm.engine_core.add_request(request)
                expected[name_i] = (prompt, params)
        processed = llm.output_processor.process_outputs(llm.engine_core.step())
        assert not processed.failed_requests
        for output in processed.request_outputs:
            prompt, params = expected.pop(output.request_id)
            for child in output.outputs:
                got[f"{output.request_id}#{child.index}"] = child.token_ids
                assert len(child.token_ids) == params.max_tokens
                assert_matches_reference(reference, prompt, child.token_ids, params, seed=params.seed + child.index)
        if expected and rng.random() < 0.03:
            victim = rng.choice(list(expected))
            llm.engine_core.abort_requests(llm.output_processor.remove_request(victim))
            expected.pop(victim)
    while llm.engine_core.has_work:
        llm.engine_core.step()
    llm.engine_core.scheduler.debug_state().allocator.check_integrity()
    assert llm.engine_core.scheduler.debug_state().allocator.num_free_blocks() == free_before
