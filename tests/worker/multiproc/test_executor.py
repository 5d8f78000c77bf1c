"""A model on two processes serves as one does; what goes wrong on a rank is agreed on, or ends the engine."""

from __future__ import annotations

import contextlib
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
from quire.core.errors import (
    CheckpointError,
    ConfigError,
    ControlCallError,
    InvalidRequestError,
    RequestFailedError,
    WorkerDiedError,
)
from quire.core.testing.oracle import assert_matches_reference

GREEDY = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.8, seed=7, max_tokens=30, ignore_eos=True)
SHARED = list(range(40, 72))
PROMPTS = [[*SHARED, 5 + i] if i % 2 else [90 + i, 6, 7] * (1 + 4 * i) for i in range(8)]


@contextlib.contextmanager
def open_on_two(model: Path, **parallel_size: Any) -> Iterator[LLM]:
    """An engine on two ranks that have faults when they are told to. Too few blocks for all requests at once, and steps
    that hold parts of prompts."""
    limits: dict[str, Any] = {"max_num_seqs": 6, "num_gpu_blocks_override": 18, "max_num_batched_tokens": 48}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        engine = LLM(
            model=str(model),
            device="cpu",
            max_model_len=256,
            cpu_threads=1,
            executor="rank_faults:FaultyExecutor",
            **parallel_size,
            **limits,
        )
        yield engine
        engine.shutdown()


@pytest.fixture(scope="module")
def two(tiny: Path) -> Iterator[LLM]:
    """On two ranks."""
    with open_on_two(tiny, tensor_parallel_size=2) as engine:
        yield engine


@pytest.fixture(scope="module")
def reference(tiny: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


def set_fault(engine: LLM, fault: str, rank: int | None = None) -> None:
    arguments = {"method": "set_fault", "arguments": {"fault": fault, "rank": rank}}
    engine.engine_core.control.call_method("collective_rpc", arguments)


def assert_served(engine: LLM, reference: Any, prompts: list[list[int]] = PROMPTS) -> None:
    params = [GREEDY if i % 2 else SEEDED for i in range(len(prompts))]
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    for prompt, sampling, output in zip(prompts, params, outputs, strict=True):
        assert len(output.outputs[0].token_ids) == 30
        assert_matches_reference(reference, prompt, output.outputs[0].token_ids, sampling, sampling.seed or 0)


def test_tokens_are_those_of_the_whole_model(two: LLM, reference: Any) -> None:
    before = two.get_stats()
    assert_served(two, reference)
    assert_served(two, reference)
    forked = SamplingParams(temperature=0.9, n=3, seed=3, max_tokens=9, ignore_eos=True)
    [output] = two.generate([{"prompt_token_ids": PROMPTS[1]}], forked)
    assert len({tuple(each.token_ids) for each in output.outputs}) > 1
    stats = two.get_stats()
    assert stats["num_preemptions_total"] > before["num_preemptions_total"], "some were preempted"
    assert stats["prefix_cache_hits_total"] > before["prefix_cache_hits_total"], "some found a prefix"
    assert "on 2 x cpu): on each weights" in two.ready_line


def test_an_abort_harms_nobody_else(two: LLM, reference: Any) -> None:
    engine = two.llm_engine
    for number, prompt in enumerate(PROMPTS[:4]):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, GREEDY)
    finished = []
    while engine.has_unfinished_requests():
        finished += [output for output in engine.step() if output.finished]
        engine.abort_request("1")
    assert [output.request_id for output in finished] and "1" not in {o.request_id for o in finished}
    for output in finished:
        tokens = output.outputs[0].token_ids
        assert_matches_reference(reference, PROMPTS[int(output.request_id)], tokens, GREEDY)


def test_masks_reach_every_rank(two: LLM, llm: LLM) -> None:
    """Were they another rank's alone, the ranks would compute different texts."""
    constraint = StructuredOutputsParams(regex="(abc|xyz){4}[0-9]{5}")
    params = SamplingParams(temperature=1, seed=4, max_tokens=40, structured_outputs=constraint)
    texts = [[o.outputs[0].text for o in engine.generate(["a", "b c"], params)] for engine in (two, llm)]
    assert texts[0] == texts[1] and all(len(text) == 17 for text in texts[0])


def test_methods_are_called_on_every_rank(two: LLM) -> None:
    call = two.engine_core.control.call_method
    workers = call("collective_rpc", {"method": "describe_worker", "arguments": {}})
    assert [worker["rank"] for worker in workers] == [0, 1]
    assert [worker["pid"] for worker in workers] == pids(two)
    for method, arguments, error, message in (
        ("describe_wurker", {}, InvalidRequestError, "not a control method"),
        ("read_file", {"path": "x"}, CheckpointError, "^x is no checkpoint$"),
        ("read_file", {"path": ""}, ControlCallError, "^rank 0: read_file: OSError: forced"),
    ):
        with pytest.raises(error, match=message):
            call("collective_rpc", {"method": method, "arguments": arguments})


def test_a_step_that_does_not_fit_on_one_rank_is_run_by_none(two: LLM, reference: Any) -> None:
    set_fault(two, "memory", 1)
    assert_served(two, reference, [[200 + i] * (40 + i) for i in range(3)])
    set_fault(two, "")
    assert two.get_stats()["out_of_memory_total"] >= 1
    assert two.get_stats()["kv_cache_usage_perc"] == 0


def test_a_step_that_fails_on_all_ranks_ends_its_requests_alone(two: LLM, reference: Any) -> None:
    set_fault(two, "raise")
    with pytest.raises(RequestFailedError, match="a step of the engine failed"):
        two.generate([{"prompt_token_ids": [5, 6]}], GREEDY)
    set_fault(two, "")
    assert_served(two, reference, PROMPTS[:2])


def test_a_rank_that_is_killed_ends_the_engine_by_name(two: LLM) -> None:
    """The last of the tests that share the engine."""
    processes = pids(two)
    os.kill(processes[1], signal.SIGKILL)
    begin = time.monotonic()
    for _ in range(2):  # and it stays so
        with pytest.raises(WorkerDiedError, match=rf"^rank 1 \(process {processes[1]}\) was killed by SIGKILL"):
            two.generate([{"prompt_token_ids": [5, 6]}], GREEDY)
    assert time.monotonic() - begin < 5
    assert not any(Path(f"/proc/{pid}").exists() for pid in processes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tensor_parallel_size": 3}, r"3 does not divide the 4 attention heads and 2 KV heads of .*; give 1, 2, 4$"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be at least 1, got 0"),
        ({"tensor_parallel_size": 2, "executor": "uniproc"}, "'uniproc' runs one worker.*use --executor multiproc"),
        ({"pipeline_parallel_size": 3}, r"^pipeline_parallel_size 3 is more than the 2 layers of .*; give 1 to 2$"),
        ({"pipeline_parallel_size": 0}, "pipeline_parallel_size must be at least 1, got 0"),
        ({"pipeline_parallel_size": 2, "executor": "uniproc"}, "'uniproc' runs one worker.*use --executor multiproc"),
    ],
)
def test_what_cannot_be_is_refused_at_once(tiny: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(model=str(tiny), device="cpu", **arguments)


def test_sizes_that_are_offered_divide_the_mlp_too() -> None:
    """Six ranks could share the heads, and not the 1,024 features between."""
    with pytest.raises(
        ConfigError, match=r"does not divide the 6 attention heads and 2 KV heads of quire-tiny; give 1, 2$"
    ):
        LLM(model="quire-tiny", device="cpu", tensor_parallel_size=5)


@pytest.mark.parametrize(
    ("sizes", "num_gpus", "message"),
    [
        ((4, 1), 2, r"4 needs as many GPUs, and 2 can be seen \(NVIDIA H200\); lower it"),
        ((2, 2), 3, r"size 2 x pipeline_parallel_size 2 need 4 GPUs, and 3 can be seen \(NVIDIA"),
    ],
)
def test_too_few_gpus_are_counted(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int], num_gpus: int, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: "NVIDIA H200")
    with pytest.raises(ConfigError, match=message):
        LLM(model=str(tiny), tensor_parallel_size=sizes[0], pipeline_parallel_size=sizes[1])


def pids(engine: LLM) -> list[int]:
    return engine.engine_core.executor.pids  # type: ignore[attr-defined]
