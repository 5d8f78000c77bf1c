"""Fields of the frozen dataclasses that plugin classes carry, ``Options`` and ``Arguments``: how a value of JSON or
Python, or a text of the command line, becomes what a field's annotation says."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import types
import typing
from pathlib import Path
from typing import Any

from quire.core.errors import PluginError

__all__ = ["UnreadableTypeError", "convert_value", "describe_type", "find_fields_class", "parse_text"]

_BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


class UnreadableTypeError(ValueError):
    """An annotation that no text of a command line can become."""


def find_fields_class(cls: type, attribute: str) -> type | None:
    """The dataclass that ``cls`` carries as ``attribute``, None without one. PluginError if it is no frozen one."""
    fields_class = getattr(cls, attribute, None)
    if fields_class is None:
        return None
    name = f"{cls.__qualname__}.{attribute}"
    if not (isinstance(fields_class, type) and dataclasses.is_dataclass(fields_class)):
        raise PluginError(f"{name} is not a dataclass; decorate it with @dataclass(frozen=True)")
    if not fields_class.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise PluginError(f"{name} is not frozen; decorate it with @dataclass(frozen=True)")
    return fields_class


def convert_value(value: Any, hint: Any, parses_text: bool = False) -> Any:
    """``value``, of JSON or Python, as one of type ``hint``; ValueError if it is of another. ``parses_text``: strings
    are read as ``parse_text`` does, at any depth."""
    if parses_text and isinstance(value, str):
        return parse_text(value, hint)
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for member in members:
            with contextlib.suppress(ValueError):
                return convert_value(value, member, parses_text)
    elif hint is type(None):
        if value is None:
            return None
    elif origin is typing.Literal:
        for choice in members:
            if type(value) is type(choice) and value == choice:
                return value
    elif _is_list(hint) and isinstance(value, list | tuple):
        return tuple(convert_value(each, members[0], parses_text) for each in value)
    elif (origin is dict or hint is dict) and isinstance(value, dict):
        return value
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif _is_enum(hint):
        if isinstance(value, str) and value.lower() in (by_name := _members_by_name(hint)):
            return by_name[value.lower()]
    elif hint in (bool, int, str) and type(value) is hint:
        return value
    raise ValueError


def parse_text(text: str, hint: Any) -> Any:
    """``text``, of a command line, as a value of type ``hint``; ValueError if it is none, ``UnreadableTypeError`` if no
    text is."""
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _parse_union(text, members)
    if origin is typing.Literal:
        return _look_up(text, {str(choice): choice for choice in members})
    if _is_list(hint):
        return tuple(parse_text(part.strip(), members[0]) for part in text.split(",") if part.strip())
    if hint is bool:
        return _look_up(text.lower(), _BOOLEANS)
    if hint in (int, float, str, Path):
        return hint(text)
    if _is_enum(hint):
        by_name = _members_by_name(hint)
        return by_name[text.lower()] if text.lower() in by_name else hint(text)
    raise UnreadableTypeError("its type cannot be written on a command line")


def describe_type(hint: Any, as_json: bool = False) -> str:
    """What a value is to be, in words: one written on a command line, or in JSON."""
    spell = repr if as_json else str
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        none = "null" if as_json else "none"
        return " or ".join(none if member is type(None) else describe_type(member, as_json) for member in members)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(spell, members))
    if origin is tuple:
        return f"a {'' if as_json else 'comma-separated '}list, each {describe_type(members[0], as_json)}"
    if _is_enum(hint):
        return "one of " + ", ".join(map(spell, _members_by_name(hint)))
    words = {int: "a whole number", float: "a number", bool: "true or false", Path: "a path", dict: "an object"}
    words[str] = "a text" if as_json else "text"
    return words.get(origin or hint, getattr(hint, "__name__", str(hint)))


def _parse_union(text: str, members: tuple[Any, ...]) -> Any:
    if type(None) in members and text.lower() == "none":
        return None
    for member in members:
        if member is not type(None):
            try:
                return parse_text(text, member)
            except UnreadableTypeError:
                raise
            except ValueError:
                continue
    raise ValueError


def _look_up(text: str, values: dict[str, Any]) -> Any:
    if text not in values:
        raise ValueError
    return values[text]


def _is_list(hint: Any) -> bool:
    members = typing.get_args(hint)
    return typing.get_origin(hint) is tuple and len(members) == 2 and members[1] is Ellipsis


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, enum.Enum)


def _members_by_name(hint: Any) -> dict[str, Any]:
    return {member.name.lower(): member for member in hint}
