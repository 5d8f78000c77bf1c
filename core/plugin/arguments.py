"""Arguments of requests: what a caller says to a plugin, as the frozen dataclass ``Arguments`` that its class carries.

They arrive as ``SamplingParams.extra_args``: by name, each for the plugin that declares it.
"""

from __future__ import annotations

import dataclasses
import logging
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from quire.core.errors import InvalidRequestError, PluginError, RequestFailedError
from quire.core.plugin.annotations import convert_value, describe_type, find_fields_class
from quire.core.plugin.quarantine import NEVER_CONTAINED, read_error_text
from quire.core.plugin.registry import suggest_names

__all__ = ["ArgumentChecker", "find_arguments_class", "parse_arguments"]

_log = logging.getLogger("quire.plugin")


def find_arguments_class(cls: type) -> type | None:
    """The ``Arguments`` of a plugin class, None if it takes none. PluginError if it is no frozen dataclass whose fields
    all have defaults: most requests give none."""
    arguments = find_fields_class(cls, "Arguments")
    if arguments is None:
        return None
    for field in dataclasses.fields(arguments):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            name = f"{cls.__qualname__}.Arguments.{field.name}"
            raise PluginError(f"{name} has no default; most requests say nothing of it")
    return arguments


def parse_arguments(cls: type, given: Mapping[str, Any] | None, plugin: str = "") -> Any:
    """``cls.Arguments`` of those of ``given`` that it declares; None if it declares none.

    Fields may be str, int, float, bool, an enum (by name), ``Literal[...]``, ``X | None``, ``tuple[X, ...]`` (a JSON
    array), ``dict[str, Any]`` (a JSON object) and ``Any``. Raises ``InvalidRequestError`` naming the argument and
    ``plugin`` for a value of another type, and for what the dataclass itself refuses with ValueError, and
    ``RequestFailedError`` if it raises anything else.
    """
    arguments = find_arguments_class(cls)
    if arguments is None:
        return None
    if not given:
        return arguments()
    owner = plugin or cls.__qualname__
    hints = typing.get_type_hints(arguments)
    values = {}
    for field in dataclasses.fields(arguments):
        if field.name in given:
            value = given[field.name]
            try:
                values[field.name] = convert_value(value, hints[field.name])
            except ValueError:
                expected = describe_type(hints[field.name], as_json=True)
                raise InvalidRequestError(
                    f"extra_args: {field.name} of {owner} must be {expected}, got {value!r:.60}", "extra_args"
                ) from None
    try:
        return arguments(**values)
    except (ValueError, TypeError) as error:
        raise InvalidRequestError(f"extra_args: {owner} refuses them: {read_error_text(error)}", "extra_args") from None
    except NEVER_CONTAINED:
        raise
    except BaseException as error:  # of a plugin's own code: what it says is for the log
        _log.error("%s raised %s for extra_args", owner, type(error).__name__, exc_info=error)
        raise RequestFailedError(f"extra_args: {owner} failed; the server's log says why") from error


class ArgumentChecker:
    """Checks the arguments of a request against what the plugins that are on declare."""

    def __init__(self, plugins: Sequence[tuple[str, type]]) -> None:
        """``plugins``: name and class of each. PluginError if an ``Arguments`` is not as it must be."""
        self._plugins = [(name, cls) for name, cls in plugins if find_arguments_class(cls) is not None]
        self._owners: dict[str, str] = {}
        for name, cls in self._plugins:
            for field in dataclasses.fields(cls.Arguments):  # type: ignore[attr-defined]
                self._owners.setdefault(field.name, name)

    def check(self, extra_args: Mapping[str, Any] | None) -> None:
        """Raise ``InvalidRequestError`` for a name that no plugin declares, and for a value that one refuses."""
        if not extra_args:
            return
        for name in extra_args:
            if name not in self._owners:
                raise InvalidRequestError(
                    f"extra_args: no plugin takes {name!r:.60}; {self._suggest(name)}", "extra_args"
                )
        for owner, cls in self._plugins:
            parse_arguments(cls, extra_args, owner)

    def _suggest(self, name: str) -> str:
        if not self._owners:
            return "none that is on takes arguments: leave it out, or turn on the plugin that it is for"
        spelled = suggest_names(name[:60], self._owners)
        owners = {owner for known, owner in self._owners.items() if known in spelled}
        return f"{spelled.rstrip('?')} of {', '.join(sorted(owners))}" + ("?" if spelled.endswith("?") else "")
