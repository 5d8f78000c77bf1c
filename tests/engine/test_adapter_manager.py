"""Requests that name adapters which are not loaded yet, and adapters that fail one after another."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from quire import LLM, LoRARequest, SamplingParams
from quire.core.engine.adapter_manager import AdapterManager
from quire.core.engine.adapter_registry import AdapterRegistry
from quire.core.engine.args import EngineArgs
from quire.core.engine.config_builder import build_config
from quire.core.engine.step_health import StepHealth
from quire.core.testing.tiny_adapters import make_tiny_adapter


def test_many_requests_for_one_adapter_download_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what else needs a thread meanwhile gets one."""
    folder, downloads = make_tiny_adapter("core/assets/quire-tiny", tmp_path / "a"), []

    def download(name: str, **options: object) -> str:
        downloads.append(name)
        time.sleep(0.5)
        return str(folder)

    async def accept(*args: object) -> bool:
        return True

    async def ask_all() -> tuple[list[object], float]:
        registry = AdapterRegistry(build_config(EngineArgs(model="quire-tiny", enable_lora=True)).config)
        manager = AdapterManager(registry, accept)
        loads = [manager.find_or_load(LoRARequest("a", 1, "acme/json")) for _ in range(40)]
        tasks = [asyncio.create_task(load) for load in loads]
        await asyncio.sleep(0.05)
        started = time.monotonic()
        await asyncio.to_thread(int)
        waited = time.monotonic() - started
        return await asyncio.gather(*tasks), waited

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    refs, waited = asyncio.run(ask_all())
    assert downloads == ["acme/json"] and all(ref == refs[0] for ref in refs)
    assert waited < 0.4, "tokenizers would wait for the download"


def test_adapters_that_fail_one_after_another_are_a_sign_of_health(tmp_path: Path) -> None:
    """As where the base or the GPU is broken; one adapter, however often it fails, is none."""
    folders = [
        make_tiny_adapter("core/assets/quire-tiny", tmp_path / f"{seed}", seed=seed, scale=1e30) for seed in (0, 1)
    ]
    llm = LLM(
        "quire-tiny", enable_lora=True, max_loras=2, max_model_len=256, num_gpu_blocks_override=64,
        lora_modules={"a": str(folders[0]), "b": str(folders[1])},
    )  # fmt: skip
    health, params = StepHealth(llm.config), SamplingParams(temperature=0, max_tokens=2)
    sick = []
    for index, name in enumerate("aaaaabab"):
        adapter = llm.adapters.find_requested(LoRARequest(name))
        requests = llm.input_processor.process_inputs(f"{index}", [5, 6], params, adapter=adapter)
        llm.engine_core.add_request(requests[0])
        while llm.engine_core.has_work:
            health.note_outputs(llm.engine_core.step())
        sick.append(health.describe_failures() is not None)
    llm.shutdown()
    assert sick == [False] * 7 + [True]
