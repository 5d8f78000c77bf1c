"""A model over two ranks or stages, each with its share of every adapter: tokens are those of the merged model."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.adapters.conftest import SlotByToken, name_slots
from tests.adapters.test_engine import LENGTHS, SLOTS, assert_right, make_prompts

from quire import LLM, SamplingParams
from quire.core.config import EngineConfig
from quire.core.worker.multiproc.executor import MultiprocExecutor


class RanksBySlot(MultiprocExecutor):
    """As ``SlotByToken``, for every rank."""

    def __init__(self, config: EngineConfig, options: object = None) -> None:
        super().__init__(replace(config, adapters=SlotByToken.adapter_config), options)

    def execute_step(self, step):
        name_slots(step)
        return super().execute_step(step)

    def execute_model(self, step):
        name_slots(step)
        super().execute_model(step)


@pytest.mark.parallel
@pytest.mark.parametrize(("size", "stages"), [(2, 1), (1, 2)])
def test_two_ranks_follow_the_merged_model(base, folders, references, size: int, stages: int) -> None:
    name = f"{RanksBySlot.__module__}:{RanksBySlot.__qualname__}"
    ranks = {"tensor_parallel_size": size, "pipeline_parallel_size": stages}
    llm = LLM(str(base), device="cpu", max_model_len=128, max_num_seqs=8, executor=name, **ranks)
    try:
        for slot, folder in folders.items():
            arguments = {"adapter_id": slot + 1, "path": str(folder)}
            while not all(llm.collective_rpc("stage_adapter", arguments)):
                pass
            assert llm.collective_rpc("load_adapter", {"slot": slot, "adapter_id": slot + 1}) == [True, True]
        greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        assert_right(llm.generate(make_prompts(SLOTS, LENGTHS), greedy), SLOTS, references, greedy)
    finally:
        llm.shutdown()
