"""What every executor must do: run the steps of an engine, in order, and give back what they sampled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from quire.core.contracts.executor import Executor, KVCapacity, StepFuture
from quire.core.contracts.kv import KVGroup
from quire.core.messages import ModelRunnerOutput, SchedulerOutput
from quire.core.plugin.quarantine import class_path
from quire.core.sampling_params import SamplingParams
from quire.core.testing.example_engine import ExampleEngine, example_engine, example_model

__all__ = [
    "check_drafts_are_verified",
    "check_log_probabilities_come_back",
    "check_outputs_are_those_of_their_steps",
    "check_shutdown_can_be_repeated",
    "check_start_tells_the_capacity",
    "check_tokens_are_those_of_transformers",
]


def check_start_tells_the_capacity(cls: type[Executor]) -> None:
    """``start`` returns a ``KVCapacity`` with the groups of the model and the blocks that were asked for."""
    with _engine(cls) as engine:
        capacity: object = engine.llm.engine_core.capacity
        assert isinstance(capacity, KVCapacity), f"start returned {capacity!r}"
        assert capacity.groups == (KVGroup(),), f"every layer sees the whole context, and groups are {capacity.groups}"
        assert capacity.num_blocks == 40, f"40 blocks were asked for, it tells of {capacity.num_blocks}"
        # Two layers of keys and values, two heads of 16 numbers of 4 bytes, 16 tokens a block.
        expected = 2 * 2 * 2 * 16 * 4 * 16
        assert capacity.bytes_per_block == expected, f"a block has {expected} bytes, not {capacity.bytes_per_block}"


def check_tokens_are_those_of_transformers(cls: type[Executor]) -> None:
    """An engine serves on it: chunks, shared prefixes, copied blocks, preemption, random and greedy requests."""
    with _engine(cls) as engine:
        engine.assert_traffic_is_served()


def check_outputs_are_those_of_their_steps(cls: type[Executor]) -> None:
    """Each step gets a future of its own, whose result has the step's number and an entry for each of its requests."""
    with _engine(cls) as engine:
        recorded = _RecordingExecutor(engine.llm.engine_core.executor)
        engine.llm.engine_core.executor = recorded  # type: ignore[assignment]
        engine.assert_traffic_is_served()
        for step, future in zip(recorded.steps, recorded.futures, strict=True):
            output: object = future.result()
            assert isinstance(output, ModelRunnerOutput), f"step {step.step}: result() gave {output!r}"
            assert output.step == step.step, f"step {step.step} has the result of step {output.step}"
            assert future.done() is True, f"step {step.step}: done() is {future.done()!r} after result()"
            counts = output.num_sampled_tokens
            assert len(counts) == len(step.rows) and output.sampled_token_ids.ndim == 2, f"step {step.step}: {output!r}"
            assert np.array_equal(counts > 0, step.sampling_mask), f"step {step.step}: others sampled than should"


def check_log_probabilities_come_back(cls: type[Executor]) -> None:
    """Requests that ask get log-probabilities of their tokens and prompts; others get none."""
    prompt = [5, 9, 200, 31, 7]
    asking = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    silent = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    with _engine(cls) as engine:
        first, second = engine.llm.generate([{"prompt_token_ids": prompt}] * 2, [asking, silent])
    logprobs = first.outputs[0].logprobs
    assert logprobs is not None and len(logprobs) == 4, f"four tokens were asked for, got {logprobs!r}"
    assert all(token in of for token, of in zip(first.outputs[0].token_ids, logprobs, strict=True)), "others' tokens"
    assert first.prompt_logprobs is not None and len(first.prompt_logprobs) == len(prompt), "not one for each token"
    assert second.outputs[0].logprobs is None, "log-probabilities for a request that asked for none"


def check_drafts_are_verified(cls: type[Executor]) -> None:
    """With a proposer on the host and with one on the device tokens are the same."""
    for method in ("ngram", "synthetic"):
        config = {"method": method, "num_speculative_tokens": 3, "adaptive": False}
        with _engine(cls, repetitive=True, speculative_config=config) as engine:
            engine.assert_traffic_is_served(num_tokens=39)
            stats = engine.llm.get_stats()
            assert stats["spec_decode_num_draft_tokens_total"] > 0, f"{method}: no draft was verified"


def check_shutdown_can_be_repeated(cls: type[Executor]) -> None:
    """``shutdown`` is called twice without harm, also after steps."""
    with _engine(cls) as engine:
        engine.llm.generate([{"prompt_token_ids": [5, 6]}], SamplingParams(max_tokens=2))
        engine.llm.engine_core.executor.shutdown()
        engine.llm.engine_core.executor.shutdown()


@contextmanager
def _engine(cls: type[Executor], *, repetitive: bool = False, **arguments: Any) -> Iterator[ExampleEngine]:
    with (
        example_model(repetitive=repetitive) as (folder, reference),
        example_engine(folder, reference, executor=class_path(cls), **arguments) as engine,
    ):
        yield engine


@dataclass
class _RecordingExecutor:
    """Passes everything on, and keeps the steps with their futures."""

    executor: Executor
    steps: list[SchedulerOutput] = field(default_factory=list)
    futures: list[StepFuture] = field(default_factory=list)

    def execute_step(self, step: SchedulerOutput) -> StepFuture:
        future = self.executor.execute_step(step)
        self.steps.append(step)
        self.futures.append(future)
        return future

    def __getattr__(self, name: str) -> Any:
        return getattr(self.executor, name)
