"""A model whose layers are divided between two processes; what goes wrong on a stage."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from quire import LLM, SamplingParams, StructuredOutputsParams
from quire.core.errors import RequestFailedError, WorkerDiedError

from .test_executor import GREEDY, PROMPTS, assert_served, open_on_two, pids, set_fault


@pytest.fixture(scope="module")
def two(tiny: Path) -> Iterator[LLM]:
    """On two stages."""
    with open_on_two(tiny, pipeline_parallel_size=2) as engine:
        yield engine


@pytest.fixture(scope="module")
def reference(tiny: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


def test_tokens_are_those_of_the_whole_model(two: LLM, reference: Any) -> None:
    before = two.get_stats()
    assert_served(two, reference)
    assert_served(two, reference)
    stats = two.get_stats()
    assert stats["num_preemptions_total"] > before["num_preemptions_total"], "some were preempted"
    assert stats["prefix_cache_hits_total"] > before["prefix_cache_hits_total"], "some found a prefix"
    call = two.engine_core.control.call_method
    workers = call("collective_rpc", {"method": "describe_worker", "arguments": {}})
    assert [(worker["rank"], worker["stage"]) for worker in workers] == [(0, 0), (1, 1)]


def test_each_step_in_flight_has_masks_of_its_own(tiny: Path, llm: LLM) -> None:
    """The last stage reads those of a step when the first one works on the next already."""
    params = [
        SamplingParams(temperature=1, seed=4, max_tokens=40, structured_outputs=StructuredOutputsParams(regex=pattern))
        for pattern in ("[a-c]{20}", "[d-f]{16}", "[0-4]{12}", "(xy|zw){8}", "[5-9]{14}")
    ]
    prompts = [f"{number} b c" for number in range(len(params))]
    expected = [output.outputs[0].text for output in llm.generate(prompts, params)]
    engine = LLM(str(tiny), device="cpu", cpu_threads=1, max_model_len=256, pipeline_parallel_size=2)
    try:
        assert [output.outputs[0].text for output in engine.generate(prompts, params)] == expected
    finally:
        engine.shutdown()


def test_rows_of_aborted_requests_are_used_again(two: LLM, reference: Any) -> None:
    """While their last tokens are still on the way back to the first stage, and a step runs on each stage."""
    engine, finished, num_in_flight = two.llm_engine, [], set()
    for number in range(24):
        engine.add_request(str(number), {"prompt_token_ids": PROMPTS[number % 8]}, GREEDY)
    while engine.has_unfinished_requests():
        outputs = engine.step()
        num_in_flight.add(len(two.engine_core.scheduler.in_flight))
        finished += [output for output in outputs if output.finished]
        for output in outputs:
            number = int(output.request_id)
            if number % 3 and len(output.outputs[0].token_ids) > number % 5:
                engine.abort_request(output.request_id)
    assert len(finished) == 8 and max(num_in_flight) == 3, "when the oldest of four was finished"
    reference_tokens = two.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], GREEDY)
    for output in finished:
        assert output.outputs[0].token_ids == reference_tokens[int(output.request_id) % 8].outputs[0].token_ids
    assert two.get_stats()["kv_cache_usage_perc"] == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_that_fails_on_one_stage_ends_its_requests_alone(two: LLM, reference: Any, rank: int) -> None:
    """The other stage waits for nothing that does not come."""
    set_fault(two, "raise in model", rank)
    with pytest.raises(RequestFailedError, match="a step of the engine failed"):
        two.generate([{"prompt_token_ids": [5, 6]}], GREEDY)
    set_fault(two, "")
    assert_served(two, reference, PROMPTS[:2])


def test_a_step_that_does_not_fit_on_one_stage_is_run_by_none(two: LLM, reference: Any) -> None:
    before = two.get_stats()["out_of_memory_total"]
    set_fault(two, "memory", 1)
    assert_served(two, reference, [[200 + i] * (40 + i) for i in range(3)])
    set_fault(two, "")
    assert two.get_stats()["out_of_memory_total"] > before
    assert two.get_stats()["kv_cache_usage_perc"] == 0


def test_a_rank_that_is_killed_ends_the_engine_by_name_and_stage(two: LLM) -> None:
    """The last of the tests that share the engine."""
    processes = pids(two)
    os.kill(processes[1], signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(WorkerDiedError, match=rf"^rank 1 \(stage 1, process {processes[1]}\) was killed by SIGKILL"):
        two.generate([{"prompt_token_ids": [5, 6]}], GREEDY)
    assert time.monotonic() - begin < 5
    assert not any(Path(f"/proc/{pid}").exists() for pid in processes)
