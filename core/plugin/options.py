"""Options of one plugin: ``key=value`` pairs, or values in Python, become the frozen dataclass ``Options`` of its
class."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from quire.core.errors import PluginError
from quire.core.plugin.registry import suggest_names

__all__ = ["find_options_class", "list_option_values", "parse_options", "split_key_values"]


def split_key_values(pairs: Iterable[str], flag: str = "option") -> dict[str, str]:
    """``["a=1", "b=x=y"]`` -> ``{"a": "1", "b": "x=y"}``. PluginError for a pair without "=" or a key given twice."""
    values: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise PluginError(f"{flag} {pair!r}: there is no '='; write {flag} key=value")
        if key in values:
            raise PluginError(f"{flag} {pair!r}: {key} was given already as {values[key]!r}; give it once")
        values[key] = value
    return values


def find_options_class(cls: type) -> type | None:
    """The ``Options`` of a plugin class, None if it takes no options. PluginError if it is not a frozen dataclass."""
    options = getattr(cls, "Options", None)
    if options is None:
        return None
    if not (isinstance(options, type) and dataclasses.is_dataclass(options)):
        raise PluginError(f"{cls.__qualname__}.Options is not a dataclass; decorate it with @dataclass(frozen=True)")
    if not options.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise PluginError(f"{cls.__qualname__}.Options is not frozen; decorate it with @dataclass(frozen=True)")
    return options


def list_option_values(options: Any) -> dict[str, Any]:
    """``options``, a mapping or an ``Options`` object, as values that a configuration can hold: paths become text,
    members of an enum their names, tuples lists. ``parse_options`` makes an equal object of them."""
    if dataclasses.is_dataclass(options) and not isinstance(options, type):
        options = {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.init}
    if not isinstance(options, Mapping):
        raise PluginError(f"options are a mapping or an Options object, not {options!r:.80}")
    return {str(key): _to_plain(value) for key, value in options.items()}


def parse_options(cls: type, pairs: Mapping[str, Any]) -> Any:
    """An instance of ``cls.Options`` from ``pairs``; None if the class takes no options and none are given.

    Values are texts of a command line, or what ``list_option_values`` gives. Fields may be str, int, float, bool, Path,
    an enum, ``Literal[...]``, ``X | None`` ("none") and ``tuple[X, ...]`` (comma separated). Raises PluginError on one
    line: unknown or missing key, a value of the wrong type, or whatever ValueError the dataclass itself raises.
    """
    options = find_options_class(cls)
    if options is None:
        if pairs:
            raise PluginError(f"{cls.__qualname__} takes no options; leave out {', '.join(pairs)}")
        return None
    hints = typing.get_type_hints(options)
    fields = {f.name: f for f in dataclasses.fields(options) if f.init}
    values: dict[str, Any] = {}
    for key, value in pairs.items():
        name = key.replace("-", "_")
        if name not in fields:
            raise PluginError(f"{cls.__qualname__} has no option {key!r}; {suggest_names(name, fields)}")
        values[name] = _convert_option(cls, name, value, hints[name])
    for name, spec in fields.items():
        required = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise PluginError(f"{cls.__qualname__} needs the option {name!r}; give it as {name}=VALUE")
    try:
        return options(**values)
    except (ValueError, TypeError) as error:
        given = ", ".join(f"{k}={v}" for k, v in pairs.items()) or "the defaults"
        raise PluginError(f"{cls.__qualname__} refuses {given}: {' '.join(str(error).split())}") from error


_BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def _convert_option(cls: type, name: str, value: Any, hint: Any) -> Any:
    try:
        return _convert_any(value, hint)
    except ValueError as error:
        why = f": {error}" if isinstance(error, _UnknownTypeError) else ""
        raise PluginError(f"{cls.__qualname__} option {name}={value!r} is not {_describe_type(hint)}{why}") from None


def _to_plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Path):
        return str(value)
    return [_to_plain(each) for each in value] if isinstance(value, tuple | list) else value


def _check_value(value: Any, hint: Any) -> Any:
    """``value``, which is no text, if it is of the type ``hint``."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for each in arguments:
            with contextlib.suppress(ValueError):
                return None if value is None and each is type(None) else _convert_any(value, each)
        return _raise_value_error()
    if origin is typing.Literal:
        return value if value in arguments else _raise_value_error()
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis and isinstance(value, list | tuple):
        return tuple(_convert_any(each, arguments[0]) for each in value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    is_exact = hint in (bool, int) and type(value) is hint
    return value if is_exact else _raise_value_error()


def _convert_any(value: Any, hint: Any) -> Any:
    return _parse_value(value, hint) if isinstance(value, str) else _check_value(value, hint)


class _UnknownTypeError(ValueError):
    """A field whose type cannot be read from a command line."""


def _parse_value(text: str, hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _parse_union(text, arguments)
    if origin is typing.Literal:
        return (
            {str(choice): choice for choice in arguments}[text] if text in map(str, arguments) else _raise_value_error()
        )
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_parse_value(part.strip(), arguments[0]) for part in text.split(",") if part.strip())
    if hint is bool:
        return _BOOLEANS[text.lower()] if text.lower() in _BOOLEANS else _raise_value_error()
    if hint in (int, float):
        return hint(text)
    if hint in (str, Path):
        return hint(text)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        by_name = {member.name.lower(): member for member in hint}
        return by_name[text.lower()] if text.lower() in by_name else hint(text)
    raise _UnknownTypeError("its type cannot be written on a command line")


def _parse_union(text: str, arguments: tuple[Any, ...]) -> Any:
    if type(None) in arguments and text.lower() == "none":
        return None
    for each in arguments:
        if each is not type(None):
            try:
                return _parse_value(text, each)
            except _UnknownTypeError:
                raise
            except ValueError:
                continue
    return _raise_value_error()


def _raise_value_error() -> Any:
    raise ValueError


def _describe_type(hint: Any) -> str:
    """What a value must be, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if a is type(None) else _describe_type(a) for a in arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        return f"a comma-separated list, each {_describe_type(arguments[0])}"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(m.name.lower() for m in hint)
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}.get(
        hint, getattr(hint, "__name__", str(hint))
    )
