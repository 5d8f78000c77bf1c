"""Engines whose requests have the adapter that their first token names: what the scheduler chooses otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from quire import LLM
from quire.core.config import AdapterConfig, EngineConfig
from quire.core.contracts.executor import KVCapacity
from quire.core.loading.peft_adapter import read_adapter
from quire.core.messages import SchedulerOutput
from quire.core.testing.tiny_adapters import make_tiny_adapter
from quire.core.testing.tiny_models import make_tiny_model
from quire.core.worker.uniproc_executor import UniprocExecutor

FIRST_ADAPTER_TOKEN = 100
"""A prompt that begins with it has the adapter in slot 0; with the next token that in slot 1, and so on."""
NUM_SLOTS = 4


class SlotByToken(UniprocExecutor):
    """Gives a request the slot that its first token names."""

    adapter_config = AdapterConfig(max_loras=NUM_SLOTS, max_lora_rank=64, max_cpu_loras=8)

    def __init__(self, config: EngineConfig, options: object = None) -> None:
        super().__init__(replace(config, adapters=self.adapter_config), options)

    def start(self) -> KVCapacity:
        capacity = super().start()
        runner = self.worker.model_runner
        execute_model = runner.execute_model

        def execute_with_slots(step: SchedulerOutput) -> None:
            name_slots(step)
            execute_model(step)

        runner.execute_model = execute_with_slots  # type: ignore[method-assign]
        return capacity


def name_slots(step: SchedulerOutput) -> None:
    """Give new requests the slots that their first tokens name."""
    for request in step.new_requests:
        slot = request.token_ids[0] - FIRST_ADAPTER_TOKEN
        request.adapter_slot = slot if 0 <= slot < NUM_SLOTS else -1


def load_adapters(llm: LLM, folders: dict[int, Path]) -> None:
    """Load a folder into each slot."""
    for slot, folder in folders.items():
        adapter_id = slot + 1
        while not call_worker(llm, "stage_adapter", adapter_id=adapter_id, path=str(folder)):
            pass
        assert call_worker(llm, "load_adapter", slot=slot, adapter_id=adapter_id)


def call_worker(llm: LLM, method: str, **arguments: Any) -> Any:
    """What the one worker returns."""
    [result] = llm.collective_rpc(method, arguments)
    return result


def merge_adapter(model: Any, folder: Path) -> Any:
    """transformers' ``model`` with the adapter in its weights."""
    adapter = read_adapter(folder, max_rank=1024)
    with torch.no_grad():
        for name, weights in adapter.modules.items():
            weight = model.get_submodule(name).weight
            weight += (weights.scaling * weights.b.double() @ weights.a.double()).to(weight.dtype)
    return model


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("adapters") / "base")


@pytest.fixture(scope="session")
def folders(base: Path) -> dict[int, Path]:
    """Four adapters: every rank from 1 to 64, all linear layers or some, several scalings."""
    where = base.parent
    return {
        0: make_tiny_adapter(base, where / "all", rank=8, seed=1),
        1: make_tiny_adapter(base, where / "qv", rank=1, alpha=3, target_modules=["q_proj", "v_proj"], seed=2),
        2: make_tiny_adapter(base, where / "mlp", rank=64, alpha=16, target_modules=["up_proj", "down_proj"], seed=3),
        3: make_tiny_adapter(base, where / "rank17", rank=17, seed=4, use_rslora=True, alpha=4,
                             target_modules=["k_proj", "o_proj", "gate_proj"]),
    }  # fmt: skip


@pytest.fixture(scope="session")
def references(base: Path, folders: dict[int, Path]) -> dict[int, Any]:
    """transformers' model with each adapter merged into it, by slot; -1: without any."""
    models = {slot: merge_adapter(load_reference(base), folder) for slot, folder in folders.items()}
    return {-1: load_reference(base), **models}


def load_reference(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def make_llm(base: Path) -> Iterator[Callable[..., LLM]]:
    """Makes engines of the base whose requests have adapters, and ends them."""
    engines = []

    def make(model: Path = base, executor: type[SlotByToken] = SlotByToken, **settings: Any) -> LLM:
        settings = {"device": "cpu", "max_model_len": 128, "max_num_seqs": 8} | settings
        engines.append(LLM(str(model), executor=f"{executor.__module__}:{executor.__qualname__}", **settings))
        return engines[-1]

    yield make
    for engine in engines:
        engine.shutdown()
