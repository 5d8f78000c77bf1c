"""Loads and unloads adapters of an engine in another process, while it serves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from weakref import WeakValueDictionary

import msgspec

from quire.core.adapters import AdapterRef, LoRARequest
from quire.core.engine.adapter_registry import AdapterRegistry
from quire.core.errors import ControlCallError, QuireError

__all__ = ["AdapterManager"]

_POLL_S, _MAX_POLL_S = 0.005, 0.1
_LOAD_TIMEOUT_S = 300.0


class AdapterManager:
    """The adapters of ``AsyncLLM``. The engine core loads them one after another; requests go on meanwhile, and so do
    unloads, and what others fetch from the hub."""

    def __init__(
        self, registry: AdapterRegistry, call_control: Callable[[str, Mapping[str, Any]], Awaitable[Any]]
    ) -> None:
        self._registry, self._call_control = registry, call_control
        self._lock: asyncio.Lock | None = None
        self._lock_of_name: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @property
    def is_on(self) -> bool:
        """Whether there may be adapters."""
        return self._registry.is_on

    def list_adapters(self) -> list[AdapterRef]:
        """All that requests may call, in order of their loading."""
        return self._registry.adapters

    def find_adapter(self, name: str) -> AdapterRef | None:
        """What a name stands for; None: no adapter."""
        return self._registry.find_adapter(name)

    async def find_or_load(self, request: LoRARequest | AdapterRef | None) -> AdapterRef | None:
        """The adapter of a request, loaded if it is not yet. Raises what ``load_adapter`` does."""
        if request is None or isinstance(request, AdapterRef):
            return request
        if (ref := self._registry.find_loaded(request)) is not None:
            return ref
        # Of requests for one adapter the first loads it, and the others wait: none takes a thread for that.
        lock = self._lock_of_name.setdefault(request.lora_name, asyncio.Lock())
        async with lock:
            ref = self._registry.find_loaded(request) or await asyncio.to_thread(self._registry.find_requested, request)
            if ref is not None:
                return ref
            inplace, parent = request.load_inplace, request.base_model_name
            try:
                return await self.load_adapter(
                    request.lora_name, request.lora_path, load_inplace=inplace, base_model_name=parent
                )
            except ValueError:
                # A call of ``load_adapter`` may have loaded it meanwhile.
                ref = await asyncio.to_thread(self._registry.find_requested, request)
                if ref is None:
                    raise
                return ref

    async def load_adapter(
        self, name: str, path: str, *, load_inplace: bool = False, base_model_name: str | None = None
    ) -> AdapterRef:
        """Load a LoRA adapter from a folder that PEFT wrote, or from the hub. ``load_inplace`` replaces the one that
        has the name; requests that have begun keep that. ``base_model_name`` is what ``/v1/models`` calls its base.
        Returns once requests can use it; cancelled, it leaves nothing behind. Raises ``InvalidRequestError`` and
        ``CheckpointError``, one line each, and what ``AsyncLLM.call_control`` does."""
        options: dict[str, Any] = {"load_inplace": load_inplace, "base_model_name": base_model_name}
        ref = await asyncio.to_thread(self._registry.read_adapter, name, path, **options)
        self._lock = self._lock or asyncio.Lock()
        async with self._lock:
            self._registry.check_name(name, load_inplace=load_inplace)
            arguments, pause = {"adapter": msgspec.to_builtins(ref)}, _POLL_S
            try:
                async with asyncio.timeout(_LOAD_TIMEOUT_S):
                    while not await self._call_control("add_adapter", arguments):
                        await asyncio.sleep(pause)
                        pause = min(2 * pause, _MAX_POLL_S)
            except BaseException as error:
                with contextlib.suppress(QuireError):
                    await self._remove(ref)
                if not isinstance(error, TimeoutError):
                    raise
                raise ControlCallError(f"the adapter {name!r} was not read in {_LOAD_TIMEOUT_S:.0f} s") from None
            replaced = self._registry.add_adapter(ref)
            if replaced is not None:
                await self._remove(replaced)
            return ref

    async def unload_adapter(self, name: str) -> None:
        """Drop a LoRA adapter, once the requests that use it have ended. Raises ``InvalidRequestError``."""
        await self._remove(self._registry.remove_adapter(name))

    async def _remove(self, ref: AdapterRef) -> None:
        await self._call_control("remove_adapter", {"adapter_id": ref.adapter_id})
