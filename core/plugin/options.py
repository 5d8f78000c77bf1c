"""Options of one plugin: ``key=value`` pairs, or values in Python, become the frozen dataclass ``Options`` of its
class."""

from __future__ import annotations

import dataclasses
import enum
import typing
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from quire.core.errors import PluginError, PluginOptionError
from quire.core.plugin.annotations import UnreadableTypeError, convert_value, describe_type, find_fields_class
from quire.core.plugin.quarantine import NEVER_CONTAINED, read_error_text
from quire.core.plugin.registry import suggest_names
from quire.core.plugin.source import read_options

__all__ = [
    "check_options_by_source",
    "find_options_class",
    "list_option_values",
    "make_refusal",
    "parse_options",
    "split_key_values",
]


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
    return find_fields_class(cls, "Options")


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
    an enum, ``Literal[...]``, ``X | None`` ("none") and ``tuple[X, ...]`` (comma separated). Raises PluginOptionError
    on one line: unknown or missing key, a value of the wrong type, or whatever the dataclass itself raises.
    """
    options = find_options_class(cls)
    if options is None:
        _convert_options(cls.__qualname__, pairs, {}, set())
        return None
    hints = typing.get_type_hints(options)
    fields = [field for field in dataclasses.fields(options) if field.init]
    required = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING}
    values = _convert_options(cls.__qualname__, pairs, {f.name: hints[f.name] for f in fields}, required)
    try:
        return options(**values)
    except NEVER_CONTAINED:
        raise
    except BaseException as error:  # of a plugin's own code, SystemExit included
        raise make_refusal(cls, pairs, error) from error


def make_refusal(cls: type, pairs: Mapping[str, Any], error: BaseException) -> PluginOptionError:
    """The error of options that are each well-formed, and that the plugin does not take."""
    is_meant = isinstance(error, (ValueError, TypeError))
    reason = read_error_text(error) if is_meant else f"it raised {type(error).__name__}: {read_error_text(error)}"
    given = ", ".join(f"{k}={v}" for k, v in pairs.items()) or "the defaults"
    return PluginOptionError(f"{cls.__qualname__} refuses {given}: {reason}")


def check_options_by_source(target: str, pairs: Mapping[str, Any]) -> None:
    """Raise the ``PluginOptionError`` of ``parse_options`` for the class "module:Class", as far as its source tells,
    without importing it: what its dataclass refuses itself is not found, nor what is made while it is imported."""
    declared = read_options(target)
    if declared is not None:
        required = {option.name for option in declared if option.is_required}
        hints = {option.name: option.type_hint for option in declared}
        _convert_options(target.partition(":")[2], pairs, hints, required)


def _convert_options(
    owner: str, pairs: Mapping[str, Any], hints: Mapping[str, Any], required: Collection[str]
) -> dict[str, Any]:
    if pairs and not hints:
        raise PluginOptionError(f"{owner} takes no options; leave out {', '.join(pairs)}")
    values: dict[str, Any] = {}
    for key, value in pairs.items():
        name = key.replace("-", "_")
        if name not in hints:
            raise PluginOptionError(f"{owner} has no option {key!r}; {suggest_names(name, hints)}")
        values[name] = value if hints[name] is None else _convert_option(owner, name, value, hints[name])
    for name in hints:
        if name in required and name not in values:
            raise PluginOptionError(f"{owner} needs the option {name!r}; give it as {name}=VALUE")
    return values


def _convert_option(owner: str, name: str, value: Any, hint: Any) -> Any:
    try:
        return convert_value(value, hint, parses_text=True)
    except ValueError as error:
        why = f": {error}" if isinstance(error, UnreadableTypeError) else ""
        raise PluginOptionError(f"{owner} option {name}={value!r} is not {describe_type(hint)}{why}") from None


def _to_plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Path):
        return str(value)
    return [_to_plain(each) for each in value] if isinstance(value, tuple | list) else value
