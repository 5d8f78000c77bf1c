"""A step that does not fit into memory costs a retry, not a request."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quire import LLM, SamplingParams
from quire.core.contracts.executor import StepFuture
from quire.core.messages import SchedulerOutput
from quire.core.worker.uniproc_executor import UniprocExecutor

PARAMS = SamplingParams(temperature=0.7, seed=5, max_tokens=10, ignore_eos=True)


class SmallMemory(UniprocExecutor):
    """Runs out of memory in steps of more than 24 tokens."""

    most = 24

    def execute_step(self, step: SchedulerOutput) -> StepFuture:
        if step.total_num_scheduled_tokens > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory (forced)")
        return super().execute_step(step)


class NoMemory(SmallMemory):
    """Always out of memory once a request of more than 40 tokens is there."""

    def execute_step(self, step: SchedulerOutput) -> StepFuture:
        if step.max_seq_len > 40:
            raise torch.OutOfMemoryError("CUDA out of memory (forced)")
        return super().execute_step(step)


def test_steps_shrink_and_all_requests_are_served(tiny: Path, llm: LLM) -> None:
    prompts = [[5 + i, 6, 7, 8] * (2 + i) for i in range(9)]
    expected = [o.outputs[0].token_ids for o in llm.generate(prompts, PARAMS)]
    small = LLM(model=str(tiny), device="cpu", max_model_len=256, executor=f"{__name__}:SmallMemory")
    try:
        assert [o.outputs[0].token_ids for o in small.generate(prompts, PARAMS)] == expected
        stats = small.get_stats()
        assert stats["out_of_memory_total"] >= 1
        assert stats["kv_cache_usage_perc"] == 0
    finally:
        small.shutdown()


def test_what_never_fits_ends_alone(tiny: Path) -> None:
    engine = LLM(model=str(tiny), device="cpu", max_model_len=256, executor=f"{__name__}:NoMemory")
    try:
        with pytest.raises(Exception, match="out of memory"):
            engine.generate([[5] * 60], PARAMS)
        [output] = engine.generate([[5, 6, 7]], PARAMS)
        assert len(output.outputs[0].token_ids) == 10
        assert engine.get_stats()["kv_cache_usage_perc"] == 0
    finally:
        engine.shutdown()


@pytest.mark.gpu
def test_a_full_gpu_serves_on() -> None:
    """The rest of the card is taken away while requests run."""
    model = Path(__file__).resolve().parents[2] / "core" / "assets" / "quire-tiny"
    limits = {"gpu_memory_utilization": 0.2, "max_num_batched_tokens": 16384, "max_num_seqs": 64}
    engine = LLM(model=str(model), dtype="float32", **limits)  # so that near ties are rare
    prompts = [[300 + i] * 1000 for i in range(64)]
    expected = [o.outputs[0].token_ids for o in engine.generate(prompts, PARAMS)]
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    hog = torch.empty(free - 24 * 2**20, dtype=torch.uint8, device="cuda")
    other = [[900 + i] * 1000 for i in range(64)]
    assert all(len(o.outputs[0].token_ids) == 10 for o in engine.generate(other, PARAMS))
    assert engine.get_stats()["out_of_memory_total"] >= 1
    del hog
    torch.cuda.empty_cache()
    again = [o.outputs[0].token_ids for o in engine.generate(prompts, PARAMS)]
    assert sum(a == b for a, b in zip(again, expected, strict=True)) >= 60  # near ties may flip in other batches
    engine.shutdown()
