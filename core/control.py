"""Control calls: what a caller may ask of the engine core or of its workers between two steps, by name."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

import msgspec

from quire.core.errors import ControlCallError, InvalidRequestError, QuireError
from quire.core.plugin.quarantine import NEVER_CONTAINED, read_error_text
from quire.core.plugin.registry import suggest_names

__all__ = ["ControlMethods"]

_log = logging.getLogger("quire.engine")


class ControlMethods:
    """The methods that can be called by name, of one owner: the engine core, or a worker.

    Names and arguments come from elsewhere. So a name that was not added is refused, arguments are converted strictly
    to the annotations of the method, and whatever a method raises is an error of the call alone.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._methods: dict[str, _ControlMethod] = {}

    @property
    def names(self) -> list[str]:
        """What can be called."""
        return sorted(self._methods)

    def add_method(self, name: str, function: Callable[..., Any]) -> None:
        """Let ``function`` be called as ``name``. All its parameters are annotated, with types that msgspec converts
        to: numbers, strings, lists, mappings, structs. It returns None or such values, arrays and tensors excepted."""
        assert name not in self._methods, f"{self._owner} has a control method {name} already"
        self._methods[name] = _ControlMethod(name, function)

    def call_method(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """What the method returns, as plain values: structs and dataclasses become dictionaries.

        Raises ``InvalidRequestError`` for an unknown name and for arguments that do not fit. Another ``QuireError`` of
        the method is raised as it is, whatever else it raises as ``ControlCallError``.
        """
        method = self._methods.get(name)
        if method is None:
            hint = suggest_names(name, self.names)
            raise InvalidRequestError(f"{name!r:.80} is not a control method of the {self._owner}; {hint}", "method")
        try:
            converted = msgspec.convert(dict(arguments), method.arguments_type)
        except (msgspec.ValidationError, TypeError, ValueError) as error:
            raise InvalidRequestError(f"{name}: {error}", "arguments") from error
        try:
            return msgspec.to_builtins(method.function(**msgspec.structs.asdict(converted)))
        except QuireError:
            raise
        except NEVER_CONTAINED:
            raise
        except BaseException as error:
            _log.error("the control method %s of the %s failed", name, self._owner, exc_info=error)
            raise ControlCallError(f"{name}: {type(error).__name__}: {read_error_text(error)}") from error


class _ControlMethod:
    """A function, and the struct of its arguments."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.function = function
        hints = get_type_hints(function)
        arguments: list[Any] = []
        for parameter in inspect.signature(function).parameters.values():
            required = (parameter.name, hints[parameter.name])
            has_default = parameter.default is not inspect.Parameter.empty
            arguments.append((*required, parameter.default) if has_default else required)
        self.arguments_type = msgspec.defstruct(name, arguments, forbid_unknown_fields=True, kw_only=True)
