"""Another engine core in place of one that hangs or died: how often, and built from what."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections import deque
from collections.abc import Coroutine
from typing import Any

from quire.core.config import EngineConfig, PluginChoice
from quire.core.engine.client import EngineCoreClient, EngineFault
from quire.core.engine.process import EngineProcess
from quire.core.errors import EngineDeadError
from quire.core.stats import QuarantinedPlugin

__all__ = ["EngineRestarter", "read_until_fault"]

_log = logging.getLogger("quire.engine")
_WINDOW_S = 3600.0
_MIN_START_LIMIT_S = 120.0


class EngineRestarter:
    """Starts engine processes after the first, as often as ``WatchdogConfig`` allows.

    A plugin that hung or keeps failing, and that the engine can do without, is left out of the next: requests that run
    again would bring it to the same place. That is one with a fallback in the configuration, which are policies, KV
    allocators, attention, quantization and samplers of other authors, what runs operations, and a draft proposer. Where
    one keeps failing that has no fallback there is no next engine.
    """

    def __init__(self, config: EngineConfig, log_level: str) -> None:
        self._config = config
        self._log_level = log_level
        self._restarted_at: deque[float] = deque()
        self.num_restarts = 0
        self.replaced_plugins: list[QuarantinedPlugin] = []
        """Those that are left out."""
        self.start_limit_s = _MIN_START_LIMIT_S
        """How long a start may take before it counts as a hang."""

    def note_first_start(self, seconds: float) -> None:
        """How long the engine took to start, when nothing was wrong."""
        self.start_limit_s = max(_MIN_START_LIMIT_S, 3 * seconds)

    def note_policy(self, choice: PluginChoice) -> None:
        """Another scheduling policy took over: the next engine starts with it too."""
        self._config = dataclasses.replace(self._config, plugins={**self._config.plugins, "policy": choice})

    def find_refusal(self, fault: EngineFault) -> str | None:
        """Why no other engine core is to be started; None: one is."""
        limits = self._config.watchdog
        if limits.on_hang == "exit":
            return fault.reason
        if fault.plugin is not None and fault.plugin.reason != "hung" and not self._can_leave_out(fault.plugin):
            return f"{fault.reason}, and nothing can take its place; mend it or choose another"
        oldest = time.monotonic() - _WINDOW_S
        while self._restarted_at and self._restarted_at[0] < oldest:
            self._restarted_at.popleft()
        if len(self._restarted_at) < limits.max_engine_restarts:
            return None
        return f"{fault.reason}; no other is started: --max-engine-restarts {limits.max_engine_restarts} (in an hour)"

    def start_engine(self, fault: EngineFault) -> EngineCoreClient:
        """Begin to start another engine core."""
        self._restarted_at.append(time.monotonic())
        self.num_restarts += 1
        if fault.plugin is not None:
            self._leave_out(fault.plugin)
        config = self._config
        if config.recording is not None:  # its file is there already, and ends with the engine that wrote it
            recording = dataclasses.replace(config.recording, path=f"{config.recording.path}.{self.num_restarts}")
            config = dataclasses.replace(config, recording=recording)
        executor = config.plugin("executor").name
        process = EngineProcess(config.model.device, config.parallel.num_workers, executor)
        client = EngineCoreClient(process)
        client.start_engine(config, self._log_level)
        return client

    def _can_leave_out(self, plugin: QuarantinedPlugin) -> bool:
        if plugin.kind == "op":
            return bool(self._list_operations(plugin.name))
        fallback = self._config.plugins.get(f"{plugin.kind}_fallback")
        chosen = self._config.plugins.get(plugin.kind)
        return fallback is not None and chosen is not None and plugin.name == chosen.name != fallback.name

    def _list_operations(self, name: str) -> list[str]:
        """The keys of the configuration under which another author's plugin of that name runs operations. Without them
        bundled ones run."""
        choices = self._config.plugins.items()
        return [key for key, choice in choices if choice.kind == "op" and choice.name == name and not choice.is_bundled]

    def _leave_out(self, plugin: QuarantinedPlugin) -> None:
        config = self._config
        if self._can_leave_out(plugin):
            plugins, replacement = dict(config.plugins), "the bundled one"
            for key in self._list_operations(plugin.name) if plugin.kind == "op" else ():
                del plugins[key]
            if plugin.kind != "op":
                fallback = plugins[plugin.kind] = plugins[f"{plugin.kind}_fallback"]
                replacement = fallback.name
            _log.error("%s/%s is left out; %s takes its place", plugin.kind, plugin.name, replacement)
            self._config = dataclasses.replace(config, plugins=plugins)
        elif plugin.kind == "spec_decode" and config.speculation is not None:
            self._config = dataclasses.replace(config, speculation=None)
        else:
            return
        self.replaced_plugins.append(plugin)


async def read_until_fault(client: EngineCoreClient, reading: Coroutine[Any, Any, EngineFault]) -> EngineFault:
    """Run ``reading``, which awaits the outputs of ``client`` until it finds a fault, until its engine core cannot
    serve any more. Raises what ``reading`` raises, but for the end of the engine core."""
    tasks = asyncio.ensure_future(reading), asyncio.ensure_future(client.wait_fault())
    reader, watcher = tasks
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return reader.result() if reader.done() else watcher.result()
    except EngineDeadError as error:
        return EngineFault(str(error))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
