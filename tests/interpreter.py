"""Triton's interpreter, made quicker: no tracing of kernels for coverage, no preparation at each call in a kernel."""

from __future__ import annotations

import inspect
import sys
from typing import Any


def leave_kernels_untraced() -> None:
    """Pause the function that traces lines, if there is one, in each launch of a kernel in this process."""
    interpreter: Any = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None or sys.gettrace() is None:
        return
    launch = interpreter.GridExecutor.__call__

    def launch_untraced(self: Any, *arguments: Any, **named: Any) -> None:
        tracer = sys.gettrace()
        sys.settrace(None)
        try:
            launch(self, *arguments, **named)
        finally:
            sys.settrace(tracer)
            _call()

    interpreter.GridExecutor.__call__ = launch_untraced


def prepare_language_once() -> None:
    """Let a function that a kernel calls find ``triton.language`` as the kernel's launch has left it, whose members the
    interpreter would look through again for those that it replaces."""
    interpreter: Any = sys.modules.get("triton.runtime.interpreter")
    function = getattr(interpreter, "InterpretedFunction", None)
    if function is None or not hasattr(function, "rewrite"):
        return
    language, call = interpreter.tl, function.__call__
    modules: dict[int, list[Any]] = {}

    def call_prepared(self: Any, *arguments: Any, **named: Any) -> Any:
        names = self.fn.__globals__
        if id(names) not in modules:
            used = [each for each in names.values() if inspect.ismodule(each) and each in (language, language.core)]
            modules[id(names)] = [language, *used]
        if any(language.core.is_builtin(module.load) for module in modules[id(names)]):
            return call(self, *arguments, **named)
        try:
            return self.rewrite()(*arguments, **named)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    function.__call__ = call_prepared


def _call() -> None:
    """The first call that is traced again: with it coverage takes its place before a frame that it knows returns."""
