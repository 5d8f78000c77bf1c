"""Two GPUs and NCCL: what only they show of ranks. Run with NCCL_NVLS_ENABLE=0 where multicast is off."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quire import LLM, SamplingParams, StructuredOutputsParams
from quire.core.errors import WorkerDiedError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

MODEL = Path(__file__).resolve().parents[3] / "core" / "assets" / "quire-tiny"
PROMPTS = [{"prompt_token_ids": [300 + i] * (5 + 90 * i)} for i in range(12)]
PARAMS = [SamplingParams(temperature=0.7 * (i % 2), seed=5, max_tokens=24, ignore_eos=True) for i in range(12)]
LIMITS: dict[str, Any] = {"dtype": "float32", "gpu_memory_utilization": 0.2, "max_num_seqs": 32}


def answer(engine: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in engine.generate(PROMPTS, PARAMS)]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    engine = LLM(str(MODEL), **LIMITS)
    try:
        return answer(engine)
    finally:
        engine.shutdown()


@pytest.fixture
def two() -> Iterator[LLM]:
    engine = LLM(str(MODEL), tensor_parallel_size=2, **LIMITS)
    yield engine
    engine.shutdown()


def count_equal(answers: list[list[int]], expected: list[list[int]]) -> int:
    return sum(one == other for one, other in zip(answers, expected, strict=True))


@pytest.mark.parametrize("arguments", [{}, {"enforce_eager": True}, {"spec_method": "ngram"}], ids=str)
@pytest.mark.parametrize(
    ("size", "stages"),
    [
        (2, 1),
        (1, 2),
        pytest.param(2, 2, marks=pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four GPUs")),
    ],
)
def test_tokens_are_those_of_one_gpu(
    expected: list[list[int]], size: int, stages: int, arguments: dict[str, Any]
) -> None:
    engine = LLM(str(MODEL), tensor_parallel_size=size, pipeline_parallel_size=stages, **LIMITS, **arguments)
    try:
        assert count_equal(answer(engine), expected) >= 11, "near ties may flip"
        assert count_equal(answer(engine), expected) >= 11, "with cached prefixes"
        call = engine.engine_core.control.call_method
        workers = call("collective_rpc", {"method": "describe_worker", "arguments": {}})
        assert [worker["device"] for worker in workers] == [f"cuda:{rank}" for rank in range(size * stages)]
        [alone] = engine.generate(PROMPTS[1:2], PARAMS[1:2])
        assert count_equal([alone.outputs[0].token_ids], expected[1:2]) == 1, "each step waits for the one before"
        assert engine.get_stats()["kernels_compiled_total"] == 0
    finally:
        engine.shutdown()


def test_masks_are_copied_from_shared_memory(two: LLM) -> None:
    constraint = StructuredOutputsParams(regex="(abc|xyz){4}[0-9]{5}")
    params = SamplingParams(temperature=1, seed=4, max_tokens=40, structured_outputs=constraint)
    assert all(len(output.outputs[0].text) == 17 for output in two.generate(["a", "b c"], params))


def test_a_gpu_that_is_full_is_seen_by_both_ranks(two: LLM, expected: list[list[int]]) -> None:
    """Another process takes the rest of the second GPU: no rank begins what does not fit there."""
    torch.cuda.set_device(1)
    hog = torch.empty(torch.cuda.mem_get_info(1)[0] - 16 * 2**20, dtype=torch.uint8, device="cuda:1")
    try:
        assert count_equal(answer(two), expected) >= 10
        assert two.get_stats()["step_failures_total"] == 0
    finally:
        del hog
        torch.cuda.empty_cache()
        torch.cuda.set_device(0)


CHAOS = [
    ({"tensor_parallel_size": 2}, signal.SIGKILL, 0, r"rank 0 \(process {pid}\) was killed by SIGKILL"),
    ({"tensor_parallel_size": 2}, signal.SIGKILL, 1, r"rank 1 \(process {pid}\) was killed by SIGKILL"),
    ({"tensor_parallel_size": 2}, signal.SIGSTOP, 0, r"rank 0 \(process {pid}\) is stopped \(SIGSTOP, .* for 3 s$"),
    (
        {"pipeline_parallel_size": 2},
        signal.SIGSTOP,
        1,
        r"rank 1 \(stage 1, process {pid}\) is stopped \(SIGSTOP, .* 3 s$",
    ),
    ({"pipeline_parallel_size": 2}, signal.SIGKILL, 0, r"rank 0 \(stage 0, process {pid}\) was killed by SIGKILL"),
]


@pytest.mark.parametrize(("ranks", "number", "rank", "reason"), CHAOS)
def test_a_rank_that_a_signal_ends_or_stops_leaves_no_memory_behind(
    ranks: dict[str, int], number: signal.Signals, rank: int, reason: str
) -> None:
    """Under load: the other one is inside a collective operation, which does not end by itself."""
    llm = LLM(str(MODEL), step_timeout=3, **ranks, **LIMITS)
    pids = llm.engine_core.executor.pids  # type: ignore[attr-defined]
    engine = llm.llm_engine
    free_with_engine = [torch.cuda.mem_get_info(gpu)[0] for gpu in range(2)]
    for request, prompt in enumerate(PROMPTS):
        engine.add_request(str(request), prompt, SamplingParams(max_tokens=500, ignore_eos=True))
    for _ in range(5):
        engine.step()
    os.kill(pids[rank], number)
    begin = time.monotonic()
    with pytest.raises(WorkerDiedError, match="^" + reason.format(pid=pids[rank])):
        while engine.has_unfinished_requests():
            engine.step()
    assert time.monotonic() - begin < (5 if number == signal.SIGKILL else 8)
    while min(torch.cuda.mem_get_info(gpu)[0] - free_with_engine[gpu] for gpu in range(2)) < 2**30:
        assert time.monotonic() - begin < 30, "the memory of a GPU is still taken"
        time.sleep(0.2)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    llm.shutdown()
