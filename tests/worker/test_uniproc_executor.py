"""The executor and its worker, driven step by step without a scheduler."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from quire import LLM, SamplingParams
from quire.core.messages import BlockDiff, NewRequest, SchedulerOutput
from quire.core.worker.cuda_graphs.capture_sizes import choose_verify_query_lens
from quire.core.worker.uniproc_executor import UniprocExecutor
from quire.core.worker.warmup import make_largest_step, make_warmup_steps, run_warmup

PROMPT = [5, 80, 7, 99, 41, 12, 3, 8, 60]
GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture
def executor(llm: LLM) -> Iterator[UniprocExecutor]:
    executor = UniprocExecutor(llm.config)
    yield executor
    executor.shutdown()


def make_step(number: int, num_tokens: int, seq_len: int, samples: bool = True, **differences) -> SchedulerOutput:
    """Some tokens of the request in row 3."""
    return SchedulerOutput(
        step=number,
        rows=np.array([3], np.int32),
        num_scheduled_tokens=np.array([num_tokens], np.int32),
        sampling_mask=np.array([samples]),
        num_decodes=int(num_tokens == 1),
        total_num_scheduled_tokens=num_tokens,
        max_seq_len=seq_len,
        max_seq_lens=np.array([seq_len], np.int32),
        **differences,
    )


def test_capacity_is_what_the_configuration_gives(executor: UniprocExecutor, llm: LLM) -> None:
    capacity = executor.start()
    model, cache = executor.worker.model_runner.model, llm.config.cache
    assert [group.window for group in capacity.groups] == [None]
    assert capacity.weight_bytes == sum(p.numel() * p.itemsize for p in model.parameters())
    assert (
        capacity.bytes_per_block == 2 * 2 * cache.block_size * 2 * 16 * 4
    )  # layers, K and V, tokens, heads, dim, bytes
    assert (capacity.num_blocks - 1) * cache.block_size >= llm.config.model.max_model_len
    assert capacity == executor.worker.capacity


def test_steps_in_flight_feed_each_other_on_the_device(executor: UniprocExecutor, tiny: Path) -> None:
    """A prompt in two chunks, then decodes, each launched before the token of the one before is known."""
    capacity = executor.start()
    request = NewRequest(3, 0, PROMPT, len(PROMPT), 0, GREEDY, seed=0)
    blocks = [BlockDiff(0, 3, 0, [5, 2])]
    assert capacity.num_blocks > 5
    steps = [make_step(0, 4, 4, samples=False, new_requests=[request], block_diffs=blocks), make_step(1, 5, 9)]
    steps += [make_step(2 + i, 1, 10 + i) for i in range(5)]
    futures = [executor.execute_step(step) for step in steps]
    results = [future.result() for future in futures]
    assert all(future.done() for future in futures)
    assert [result.step for result in results] == list(range(7))
    assert results[0].num_sampled_tokens.tolist() == [0]
    tokens = [int(result.sampled_token_ids[0, 0]) for result in results[1:]]
    reference = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    known = list(PROMPT)
    for _ in tokens:
        with torch.inference_mode():
            known.append(int(reference(torch.tensor([known])).logits[0, -1].argmax()))
    assert tokens == known[len(PROMPT) :]


def test_sampling_may_be_launched_when_the_step_before_is_known(executor: UniprocExecutor) -> None:
    """The two halves of a step give the tokens of ``execute_step``, also where the host reads the step before between
    them."""
    executor.start()

    def make_steps(first: int) -> list[SchedulerOutput]:
        request = NewRequest(3, 0, PROMPT, len(PROMPT), 0, SamplingParams(seed=5, max_tokens=8), seed=5)
        entering = {"new_requests": [request], "block_diffs": [BlockDiff(0, 3, 0, [5, 2])]}
        steps = [make_step(first, 4, 4, samples=False, **entering), make_step(first + 1, 5, 9)]
        return steps + [make_step(first + 2 + i, 1, 10 + i) for i in range(5)]

    whole = [executor.execute_step(step).result().sampled_token_ids.tolist() for step in make_steps(0)]
    in_halves, future = [], None
    for step in make_steps(7):
        executor.execute_model(step)
        if future is not None:
            in_halves.append(future.result().sampled_token_ids.tolist())
        future = executor.sample_tokens()
    assert future is not None
    in_halves.append(future.result().sampled_token_ids.tolist())
    assert in_halves == whole


def test_a_step_that_fails_raises_from_its_result(executor: UniprocExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    executor.start()

    def fail(step: SchedulerOutput) -> None:
        raise torch.OutOfMemoryError("forced")

    monkeypatch.setattr(executor.worker.model_runner, "execute_model", fail)
    with pytest.raises(torch.OutOfMemoryError, match="forced"):
        executor.execute_step(make_step(0, 1, 1)).result()
    executor.execute_model(make_step(1, 1, 1))
    with pytest.raises(torch.OutOfMemoryError, match="forced"):
        executor.sample_tokens().result()


def test_shutdown_may_be_called_twice(llm: LLM) -> None:
    executor = UniprocExecutor(llm.config)
    executor.shutdown()
    executor.start()
    executor.shutdown()
    executor.shutdown()


def test_every_step_of_the_warm_up_runs_and_is_within_the_limits(executor: UniprocExecutor, llm: LLM) -> None:
    limits, max_model_len = llm.config.scheduler, llm.config.model.max_model_len
    executor.start()
    executor.worker.model_runner.allocate_kv_cache(1)  # as before the cache is sized: all write to the padding block
    steps = list(make_warmup_steps(limits, max_model_len, choose_verify_query_lens(0)))
    for step in (*steps, make_largest_step(limits, max_model_len)):
        assert len(step.rows) <= limits.max_num_seqs
        assert step.total_num_scheduled_tokens <= limits.max_num_batched_tokens
        assert step.max_seq_len < max_model_len
        result = executor.execute_step(step).result()
        assert (result.num_sampled_tokens == 1).all()


def test_the_warm_up_samples_with_masks_in_every_way(
    executor: UniprocExecutor, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor.start()
    runner = executor.worker.model_runner
    runner.allocate_kv_cache(1)
    masks, masked = runner.sampling_runner.token_masks, []
    assert masks is not None
    apply = masks.apply

    def apply_and_note(logits: torch.Tensor) -> None:
        apply(logits)
        masked.append((len(logits), logits.dtype, bool(logits.isfinite().all())))

    monkeypatch.setattr(masks, "apply", apply_and_note)
    limits, model = llm.config.scheduler, llm.config.model
    run_warmup(runner.execute_step, limits, model.max_model_len, masked_vocab_size=model.vocab_size)
    assert masked == [(count, torch.float32, True) for count in (1, 1, 1, limits.max_num_seqs)]
