"""Loading while an engine in another process serves: what callers of ``AsyncLLM`` notice."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from typing import Any

import pytest

from quire import EngineArgs, LoRARequest
from quire.core.engine.adapter_manager import AdapterManager
from quire.core.engine.adapter_registry import AdapterRegistry
from quire.core.engine.config_builder import build_config
from quire.core.errors import EngineDeadError, InvalidRequestError


class Core:
    """An engine core that holds what it is told, and is done with reading when ``is_read`` is set."""

    def __init__(self) -> None:
        self.held: set[int] = set()
        self.is_read = asyncio.Event()
        self.is_dead = False

    async def call(self, method: str, arguments: Mapping[str, Any]) -> bool:
        if self.is_dead:
            raise EngineDeadError("the engine stopped")
        if method == "remove_adapter":
            self.held.discard(arguments["adapter_id"])
            return True
        self.held.add(arguments["adapter"][0])
        return self.is_read.is_set()


@pytest.fixture
def core() -> Core:
    return Core()


@pytest.fixture
def manager(core: Core) -> AdapterManager:
    config = build_config(EngineArgs.from_kwargs(model="quire-tiny", enable_lora=True)).config
    return AdapterManager(AdapterRegistry(config), core.call)


def test_a_load_that_is_cancelled_leaves_nothing_and_holds_up_no_other(manager: AdapterManager, core: Core) -> None:
    async def run() -> None:
        task = asyncio.create_task(manager.load_adapter("a", "quire-tiny-upper"))
        while not core.held and not task.done():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not core.held and manager.find_adapter("a") is None
        core.is_read.set()
        ref = await manager.load_adapter("a", "quire-tiny-upper")
        assert core.held == {ref.adapter_id}

    asyncio.run(run())


def test_of_two_loads_of_a_name_at_once_one_is_taken_and_requests_get_it(manager: AdapterManager, core: Core) -> None:
    core.is_read.set()

    async def run() -> None:
        loads = [manager.load_adapter("a", path) for path in ("quire-tiny-upper", "quire-tiny-json")]
        taken, refused = await asyncio.gather(*loads, return_exceptions=True)
        assert manager.find_adapter("a") == taken and "stands for the adapter of" in str(refused)
        requests = [manager.find_or_load(LoRARequest("b", 1, "quire-tiny-json")) for _ in range(4)]
        assert len({ref.adapter_id for ref in await asyncio.gather(*requests) if ref is not None}) == 1
        assert len(core.held) == 2

    asyncio.run(run())


def test_an_engine_that_dies_while_it_loads_is_told_as_that(manager: AdapterManager, core: Core) -> None:
    async def run() -> None:
        task = asyncio.create_task(manager.load_adapter("a", "quire-tiny-upper"))
        while not core.held and not task.done():
            await asyncio.sleep(0.001)
        core.is_dead = True
        with pytest.raises(EngineDeadError, match="the engine stopped"):
            await task
        assert manager.find_adapter("a") is None

    asyncio.run(run())


def test_the_hub_is_never_asked_in_the_event_loop(
    manager: AdapterManager, core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    core.is_read.set()
    threads: list[int] = []

    def download(name: str, **options: object) -> str:
        threads.append(threading.get_ident())
        return "core/assets/quire-tiny-json"

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)

    async def run() -> None:
        for name in ("acme/json", "acme/json", "acme/again"):  # the third is the same folder under another name
            ref = await manager.find_or_load(LoRARequest("a", 1, name))
            assert ref is not None and ref.path == "core/assets/quire-tiny-json"

    asyncio.run(run())
    assert len(threads) == 2 and threading.get_ident() not in threads


def test_what_is_fetched_from_the_hub_holds_up_no_other_adapter(
    manager: AdapterManager, core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    core.is_read.set()
    begun, may_end = threading.Event(), threading.Event()

    def download(name: str, **options: object) -> str:
        begun.set()
        may_end.wait(20)
        return "core/assets/quire-tiny-json"

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)

    async def run() -> None:
        task = asyncio.create_task(manager.load_adapter("slow", "acme/json"))
        await asyncio.to_thread(begun.wait, 20)
        await manager.load_adapter("other", "quire-tiny-upper")
        await manager.unload_adapter("other")
        await manager.load_adapter("slow", "quire-tiny-upper")
        assert not task.done()
        may_end.set()
        with pytest.raises(InvalidRequestError, match="'slow' stands for the adapter of"):
            await task
        assert len(core.held) == 1

    asyncio.run(run())
