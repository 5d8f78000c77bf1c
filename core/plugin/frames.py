"""Which plugin a thread is in, read from its stack: nothing has to be noted while plugins are called."""

from __future__ import annotations

import bdb
import sys
import threading
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import NamedTuple

from quire.core.config import EngineConfig
from quire.core.errors import QuireError, WorkerError
from quire.core.plugin.quarantine import Quarantine, class_path, read_error_text, run_outside_of_plugin

__all__ = ["PluginCall", "PluginFrames", "ThreadStack", "describe_error", "find_plugin_calls", "is_debugged"]


class PluginCall(NamedTuple):
    """A guarded call of a plugin that is running in a thread."""

    quarantine: Quarantine
    call: int
    """Its number, among those of the plugin."""
    thread_id: int


class ThreadStack(NamedTuple):
    """What a thread of the engine is doing."""

    thread_name: str
    plugin: tuple[str, str] | None
    """Kind and name of the plugin that is innermost."""
    text: str
    """As in a traceback."""


class PluginFrames:
    """Finds the chosen plugins of a configuration in the stacks of this process's threads."""

    def __init__(self, config: EngineConfig) -> None:
        choices = list(config.plugins.values())
        self._foreign = frozenset((choice.kind, choice.name) for choice in choices if not choice.is_bundled)
        self._by_class = {choice.target: (choice.kind, choice.name) for choice in choices}
        self._by_module = {choice.target.partition(":")[0]: (choice.kind, choice.name) for choice in choices}
        # A module beside that of the class: of a package of another author, which registers few plugins.
        self._by_package = {module.partition(".")[0]: plugin for module, plugin in self._by_module.items()}
        self._by_package.pop("quire", None)

    def read_stacks(self, main_thread_id: int) -> list[ThreadStack]:
        """The main thread's stack, then those of other threads that are in a plugin."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        stacks = []
        for thread_id, frame in sys._current_frames().items():
            plugin = self._find_plugin(frame)
            if thread_id == main_thread_id or plugin is not None:
                text = "".join(traceback.format_stack(frame))
                stacks.append((thread_id != main_thread_id, ThreadStack(names.get(thread_id, "?"), plugin, text)))
        return [stack for _, stack in sorted(stacks, key=lambda each: each[0])]

    def find_raiser(self, error: BaseException) -> tuple[str, str] | None:
        """Kind and name of the plugin that was innermost when ``error`` was raised; None if it was none. An executor
        only runs what others raise: it must have raised the error itself. A worker in another process says it."""
        if isinstance(error, WorkerError):
            return error.plugin
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        for frame in reversed(frames):
            plugin = self._match_frame(frame)
            if plugin is not None and (plugin[0] != "executor" or frame is frames[-1]):
                return plugin
        return None

    def is_bundled(self, plugin: tuple[str, str]) -> bool:
        """Of kind and name: whether it comes with Quire."""
        return plugin not in self._foreign

    def _find_plugin(self, frame: FrameType) -> tuple[str, str] | None:
        return next(filter(None, map(self._match_frame, _walk_outwards(frame))), None)

    def _match_frame(self, frame: FrameType) -> tuple[str, str] | None:
        if frame.f_code is Quarantine.call.__code__:
            quarantine = frame.f_locals["self"]
            return quarantine.kind, quarantine.name
        for cls in type(frame.f_locals.get("self")).__mro__:
            if plugin := self._by_class.get(class_path(cls)):
                return plugin
        module = str(frame.f_globals.get("__name__"))
        return self._by_module.get(module) or self._by_package.get(module.partition(".")[0])


def describe_error(error: BaseException, frames: PluginFrames | None = None) -> str:
    """On one line, with the plugin of another author that raised it; a ``QuireError`` says what it says."""
    text = read_error_text(error) or type(error).__name__
    if isinstance(error, QuireError):
        return text
    plugin = None if frames is None else frames.find_raiser(error)
    raiser = "" if frames is None or plugin is None or frames.is_bundled(plugin) else f"{'/'.join(plugin)} raised "
    return f"{raiser}{type(error).__name__}: {text}"


def find_plugin_calls() -> list[PluginCall]:
    """The guarded calls that run now, the innermost of each thread of this process."""
    calls = []
    for thread_id, frame in sys._current_frames().items():
        for each in _walk_outwards(frame):
            if each.f_code is run_outside_of_plugin.__code__:
                break
            if each.f_code is Quarantine.call.__code__:
                quarantine = each.f_locals["self"]
                if quarantine.running_call:
                    calls.append(PluginCall(quarantine, quarantine.running_call, thread_id))
                break
    return calls


def is_debugged(thread_id: int) -> bool:
    """Whether a debugger follows the thread, in which a human may wait for as long as he likes."""
    frame = sys._current_frames().get(thread_id)
    return frame is not None and any(_is_traced(each) for each in _walk_outwards(frame))


def _walk_outwards(frame: FrameType) -> Iterator[FrameType]:
    current: FrameType | None = frame
    while current is not None:
        yield current
        current = current.f_back


def _is_traced(frame: FrameType) -> bool:
    debugger = getattr(frame.f_trace, "__self__", None)
    return isinstance(debugger, bdb.Bdb) or type(debugger).__module__.startswith("_pydev")
