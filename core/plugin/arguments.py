"""Arguments of requests: what a caller says to a plugin, as the frozen dataclass ``Arguments`` that its class carries.

They arrive as ``SamplingParams.extra_args``: by name, each for the plugin that declares it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from quire.core.errors import InvalidRequestError, PluginError
from quire.core.plugin.registry import suggest_names

__all__ = ["ArgumentChecker", "find_arguments_class", "parse_arguments"]


def find_arguments_class(cls: type) -> type | None:
    """The ``Arguments`` of a plugin class, None if it takes none. PluginError if it is no frozen dataclass whose fields
    all have defaults: most requests give none."""
    arguments = getattr(cls, "Arguments", None)
    if arguments is None:
        return None
    name = f"{cls.__qualname__}.Arguments"
    if not (isinstance(arguments, type) and dataclasses.is_dataclass(arguments)):
        raise PluginError(f"{name} is not a dataclass; decorate it with @dataclass(frozen=True)")
    if not arguments.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise PluginError(f"{name} is not frozen; decorate it with @dataclass(frozen=True)")
    for field in dataclasses.fields(arguments):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise PluginError(f"{name}.{field.name} has no default; most requests say nothing of it")
    return arguments


def parse_arguments(cls: type, given: Mapping[str, Any] | None, plugin: str = "") -> Any:
    """``cls.Arguments`` of those of ``given`` that it declares; None if it declares none.

    Fields may be str, int, float, bool, an enum (by name), ``Literal[...]``, ``X | None``, ``tuple[X, ...]`` (a JSON
    array), ``dict[str, Any]`` (a JSON object) and ``Any``. Raises ``InvalidRequestError`` naming the argument and
    ``plugin`` for a value of another type, and for what the dataclass itself refuses with ValueError.
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
                values[field.name] = _convert(value, hints[field.name])
            except ValueError:
                expected = _describe(hints[field.name])
                raise InvalidRequestError(
                    f"extra_args: {field.name} of {owner} must be {expected}, got {value!r:.60}", "extra_args"
                ) from None
    try:
        return arguments(**values)
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise InvalidRequestError(f"extra_args: {owner} refuses them: {reason}", "extra_args") from None


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


def _convert(value: Any, hint: Any) -> Any:
    """``value``, as JSON gives it, as one of type ``hint``; ValueError if it is of another."""
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for member in members:
            with contextlib.suppress(ValueError):
                return _convert(value, member)
    elif hint is type(None):
        if value is None:
            return None
    elif origin is typing.Literal:
        for choice in members:
            if type(value) is type(choice) and value == choice:
                return value
    elif origin is tuple and len(members) == 2 and isinstance(value, list | tuple):
        return tuple(_convert(each, members[0]) for each in value)
    elif (origin is dict or hint is dict) and isinstance(value, dict):
        return value
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(hint, type) and issubclass(hint, enum.Enum):
        by_name = {member.name.lower(): member for member in hint}
        if isinstance(value, str) and value.lower() in by_name:
            return by_name[value.lower()]
    elif hint in (bool, int, str) and type(value) is hint:
        return value
    raise ValueError


def _describe(hint: Any) -> str:
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if member is type(None) else _describe(member) for member in members)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, members))
    if origin is tuple:
        return f"a list, each {_describe(members[0])}"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(repr(member.name.lower()) for member in hint)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "an object"}
    return words.get(origin or hint, getattr(hint, "__name__", str(hint)))
