"""What importing a module of another author has done to this process beside defining its own names."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

from quire.core.errors import PluginError
from quire.core.plugin.registry import PROJECT

__all__ = ["SLOW_IMPORT_S", "guard_import"]

_log = logging.getLogger("quire.plugin")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGABRT)
SLOW_IMPORT_S = 10.0
"""After so long the log says what the process waits for."""


@contextlib.contextmanager
def guard_import(target: str, is_given_up: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Import a plugin inside. Raises ``PluginError`` if that replaced functions or classes of Quire; puts back signal
    handlers, standard streams and torch's default dtype, gradient mode and number of threads, and says so in the log.
    One that takes long is named there too. After one that was given up on (``is_given_up``) nothing is put back: others
    may have changed it since."""
    timer = threading.Timer(SLOW_IMPORT_S, _say_what_is_waited_for, (target, threading.get_ident()))
    timer.daemon = True
    timer.start()
    names, settings = _list_names(), _ProcessSettings()
    try:
        yield
    finally:
        timer.cancel()
        changed = [] if is_given_up() else settings.restore()
    if changed:
        _log.warning("%s: its import changed %s of the process; changed back", target, ", ".join(changed))
    if patched := next((name for name, before in names.items() if _find_value(*name) is not before), None):
        where = ".".join(patched)
        raise PluginError(f"{target}: its import replaces {where}; leave Quire's own code as it is, or mend it there")


def _say_what_is_waited_for(target: str, thread_id: int) -> None:
    frame = sys._current_frames().get(thread_id)
    while frame is not None and frame.f_globals.get("__name__", "").startswith("importlib."):
        frame = frame.f_back
    module = "" if frame is None else f", and is in {frame.f_globals.get('__name__')}"
    _log.warning("%s: its import has not ended after %g s%s", target, SLOW_IMPORT_S, module)


class _ProcessSettings:
    """What plugins have been seen to change for all of a process."""

    def __init__(self) -> None:
        self._is_main = threading.current_thread() is threading.main_thread()
        self._handlers = {each: signal.getsignal(each) for each in _SIGNALS}
        self._streams = sys.stdout, sys.stderr, sys.excepthook
        self._folder = os.getcwd()
        self._torch = self._read_torch()

    def restore(self) -> list[str]:
        """Put everything back; what was changed, in words."""
        changed = []
        if self._is_main:
            for each, handler in self._handlers.items():
                if signal.getsignal(each) is not handler and handler is not None:
                    signal.signal(each, handler)
                    changed.append(f"the handler of {each.name}")
        if self._streams != (sys.stdout, sys.stderr, sys.excepthook):
            sys.stdout, sys.stderr, sys.excepthook = self._streams
            changed.append("standard streams")
        if os.getcwd() != self._folder:
            os.chdir(self._folder)
            changed.append("the working directory")
        now = self._read_torch()
        if self._torch is not None and now is not None and now != self._torch:
            import torch

            dtype, has_gradients, num_threads = self._torch
            torch.set_default_dtype(dtype)
            torch.set_grad_enabled(has_gradients)
            torch.set_num_threads(num_threads)
            changed.append("torch's default dtype, gradient mode or number of threads")
        return changed

    def _read_torch(self) -> tuple[Any, bool, int] | None:
        torch = sys.modules.get("torch")
        if torch is None:
            return None
        return torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()


def _list_names() -> dict[tuple[str, str], Any]:
    """Functions and classes of the modules of Quire that are loaded, and methods of these classes."""
    names: dict[tuple[str, str], Any] = {}
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] != PROJECT or module is None:
            continue
        for name, value in list(vars(module).items()):
            if getattr(value, "__module__", None) != module_name:
                continue
            if isinstance(value, type):
                methods = (n for n, m in list(vars(value).items()) if isinstance(m, FunctionType))
                names |= {(module_name, f"{name}.{method}"): vars(value)[method] for method in methods}
            if isinstance(value, type | FunctionType):
                names[module_name, name] = value
    return names


def _find_value(module: str, path: str) -> Any:
    value: Any = sys.modules.get(module)
    for part in path.split("."):
        value = None if value is None else vars(value).get(part)
    return value
