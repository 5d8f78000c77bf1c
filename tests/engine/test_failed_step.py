"""A step that fails or does not fit costs its own requests at most: no answer after it is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quire import LLM, SamplingParams
from quire.core.contracts.executor import StepFuture
from quire.core.errors import RequestFailedError
from quire.core.messages import EngineCoreRequest, SchedulerOutput
from quire.core.worker.uniproc_executor import UniprocExecutor

PROMPT = list(range(20, 100))  # five blocks
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


class OutOfMemoryOnce(UniprocExecutor):
    """The first step that names rows as freed and admits no request does not fit."""

    lost_rows: list[int] | None = None

    def execute_step(self, step: SchedulerOutput) -> StepFuture:
        if self.lost_rows is None and step.freed_rows and not step.new_requests:
            self.lost_rows = step.freed_rows
            raise torch.OutOfMemoryError("CUDA out of memory (forced)")
        return super().execute_step(step)


def test_the_prefix_cache_holds_nothing_of_a_failed_step(tiny: Path, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel fails under a prompt that two continuations share."""
    [expected] = llm.generate([PROMPT], GREEDY)
    engine = LLM(model=str(tiny), device="cpu", max_model_len=256)
    model_class = type(engine.engine_core.executor.worker.model_runner.model)  # type: ignore[attr-defined]
    forward = model_class.forward

    def fail_once(self: Any, *args: Any) -> Any:
        monkeypatch.setattr(model_class, "forward", forward)
        raise RuntimeError("a kernel refused its launch")

    try:
        monkeypatch.setattr(model_class, "forward", fail_once)
        with pytest.raises(RequestFailedError, match="failed in model/LlamaForCausalLM; the engine's log") as failure:
            engine.generate([PROMPT], SamplingParams(temperature=0, max_tokens=12, n=2, ignore_eos=True))
        assert "refused" not in str(failure.value) and engine.get_stats()["step_failures_total"] == 1
        [output] = engine.generate([PROMPT], GREEDY)
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids
        assert output.num_cached_tokens == 0
        assert engine.get_stats()["kv_cache_usage_perc"] == 0
    finally:
        engine.shutdown()


def test_a_logit_bias_does_not_outlive_its_request(tiny: Path) -> None:
    """The step that would have told the worker of the request's end does not fit into memory."""
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 40, "enable_prefix_caching": False, "max_model_len": 256}
    engine = LLM(model=str(tiny), device="cpu", executor=f"{__name__}:OutOfMemoryOnce", **limits)
    core, executor = engine.engine_core, engine.engine_core.executor
    first, biased, other, later = range(1000, 1004)  # numbers of core requests
    tokens: dict[int, list[int]] = {number: [] for number in (first, biased, other, later)}

    def add_request(number: int, prompt: list[int], max_tokens: int, **params: Any) -> None:
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **params)
        core.add_request(EngineCoreRequest(number, prompt, sampling, 0))

    def step() -> None:
        for output in core.step().expand_outputs():
            tokens[output.request_id] += output.new_token_ids

    try:
        add_request(biased, [30, 31], 1, logit_bias={150: 100.0})
        add_request(first, [50] * 160, 60)
        while executor.lost_rows is None:  # type: ignore[attr-defined]
            step()
        add_request(other, [40, 41, 42], 6)
        add_request(later, [70, 71], 40, logit_bias={7: -1.0})
        while core.has_work:
            step()
        [expected] = engine.generate([[40, 41, 42]], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
        assert tokens[biased] == [150] and tokens[other] == expected.outputs[0].token_ids
    finally:
        engine.shutdown()
