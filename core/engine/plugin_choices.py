"""Which plugins an engine runs, with the options of each: from names, classes and ``key=value`` pairs of its user."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from types import MappingProxyType
from typing import Any

from quire.core.config import PluginChoice
from quire.core.engine.args import EngineArgs
from quire.core.engine.setting import Setting, settings_of
from quire.core.errors import ConfigError
from quire.core.plugin.manager import PluginManager
from quire.core.plugin.options import list_option_values
from quire.core.plugin.quarantine import class_path
from quire.core.plugin.registry import KINDS, OPERATIONS, PROJECT, Kind, normalize_name, suggest_names
from quire.core.plugin.target import Resolution

__all__ = ["NO_DEFAULT", "PluginChooser", "make_choice", "replace_classes_by_names"]

ALL_OPERATIONS = "all"
"""In place of an operation's name: every one that the plugin has."""
NO_DEFAULT = "none"
"""Among the names of a kind of which several may be on: without what is on by default."""


def replace_classes_by_names(args: EngineArgs) -> EngineArgs:
    """``args`` with ``module:Class`` where a caller in Python gave the class itself. Raises ``ConfigError``."""
    changes: dict[str, Any] = {}
    for setting in settings_of(EngineArgs):
        value = getattr(args, setting.name)
        if setting.plugin_kind is None or isinstance(value, str):
            continue
        if setting.plugin_kind == "op" and isinstance(value, Mapping):
            changes[setting.name] = [f"{operation}={_name_of(setting, each)}" for operation, each in value.items()]
            continue
        one = isinstance(value, type) or not isinstance(value, Sequence)
        names = [_name_of(setting, each) for each in ([value] if one else value)]
        changes[setting.name] = names[0] if one and setting.value_type == "text" else names
    return replace(args, **changes) if changes else args


def _name_of(setting: Setting, value: Any) -> str:
    if isinstance(value, str):
        return value
    if not inspect.isclass(value):
        raise ConfigError(
            f"{setting.name}: an object of type {type(value).__name__} cannot be used; give a name or a class, and its "
            f"options in plugin_options={{{setting.plugin_kind!r}: ...}}"
        )
    if "<locals>" in value.__qualname__:
        raise ConfigError(f"{setting.name}: {value.__qualname__} is defined inside a function; define it in a module")
    return class_path(value)


class PluginChooser:
    """Resolves names, and gives each plugin the options that are meant for it."""

    def __init__(self, manager: PluginManager, options: Mapping[str, Any]) -> None:
        """``options``: by kind, a mapping of option to value, or an ``Options`` object; for kinds of which several may
        be on, options are called ``NAME.option``, or stand in a mapping of plugin name to those."""
        self._manager = manager
        self._options = options
        for kind in sorted(set(options) - set(KINDS)):
            raise ConfigError(
                f"plugin_options names {kind!r}, which is no kind of plugin; {suggest_names(kind, KINDS)}"
            )

    def choose(self, kind: str, name: str, context: Mapping[str, Any]) -> PluginChoice:
        """The one plugin of ``kind`` that ``name`` stands for."""
        return make_choice(self._manager.resolve_plugin(kind, name, context), self._options.get(kind, {}))

    def choose_several(
        self, kind: str, names: Sequence[str], context: Mapping[str, Any], default: str | None = None
    ) -> list[PluginChoice]:
        """Those that are always on, ``default`` unless one of the names is ``none``, and those named, in this order."""
        named = [name for name in names if name.lower() != NO_DEFAULT]
        defaults = [default] if default is not None and len(named) == len(names) else []
        by_default = self._manager.resolve_plugins(kind, defaults, context)
        by_target = {resolution.target: resolution for resolution in by_default}
        name_by_target: dict[str, str] = {}
        for name in named:
            resolution = self._manager.resolve_plugin(kind, name, context)
            by_target.setdefault(resolution.target, resolution)
            name_by_target[resolution.target] = name
        addressed = _AddressedOptions.parse(KINDS[kind], self._options.get(kind, {}))
        # Options without a name are meant for what the user has named, else for what ``auto`` has chosen.
        meant = list(name_by_target) or [resolution.target for resolution in by_default[-1:] if defaults]
        choices = [
            make_choice(resolution, addressed.take(resolution, name_by_target.get(target), [target] == meant))
            for target, resolution in by_target.items()
        ]
        addressed.check_all_taken([by_target[target].name for target in meant], list(by_target.values()))
        return choices

    def choose_operations(self, entries: Sequence[str], context: Mapping[str, Any]) -> dict[str, PluginChoice]:
        """By operation, the plugin that runs it, from ``entries`` such as ``rms_norm=my_norm``: the last of each."""
        name_by_operation: dict[str, str] = {}
        for entry in entries:
            operation, equals, name = entry.partition("=")
            if not equals or not name:
                raise ConfigError(f"--op {entry}: write NAME=PLUGIN, such as rms_norm=torch, or all={entry or 'torch'}")
            if operation not in (*OPERATIONS, ALL_OPERATIONS):
                known = [*OPERATIONS, ALL_OPERATIONS]
                raise ConfigError(f"--op {entry}: {operation!r} is no operation; {suggest_names(operation, known)}")
            name_by_operation[operation] = name
        names = list(dict.fromkeys(name_by_operation.values()))
        by_target = {choice.target: choice for choice in self.choose_several("op", names, context)}
        return {
            operation: by_target[self._manager.resolve_plugin("op", name, context, announce=False).target]
            for operation, name in name_by_operation.items()
        }


def make_choice(resolution: Resolution, options: Any = MappingProxyType({})) -> PluginChoice:
    """What a configuration keeps of ``resolution``, with ``options`` as a mapping or an ``Options`` object."""
    values, is_bundled = list_option_values(options), resolution.dist == PROJECT
    return PluginChoice(resolution.kind, resolution.name, resolution.target, values, is_bundled=is_bundled)


@dataclass
class _AddressedOptions:
    """Options of a kind of which several may be on."""

    kind: Kind
    by_name: dict[str, dict[str, Any]]
    """By the plugin that they name; ``""``: by none."""

    @classmethod
    def parse(cls, kind: Kind, options: Any) -> _AddressedOptions:
        by_name: dict[str, dict[str, Any]] = {}
        for key, value in ({"": options} if is_dataclass(options) else options).items():
            if is_dataclass(value) or isinstance(value, Mapping):
                by_name.setdefault(key, {}).update(list_option_values(value))
            else:
                name, _, option = key.rpartition(".")
                by_name.setdefault(name, {})[option] = value
        return cls(kind, by_name)

    def take(self, resolution: Resolution, written: str | None, takes_unnamed: bool) -> dict[str, Any]:
        """Those of one plugin: under any of its names, or the one ``written`` by the user, and perhaps under none."""
        spellings = (resolution.name, resolution.target, f"{resolution.dist}/{resolution.name}", written or "")
        known = {normalize_name(spelling) for spelling in spellings if spelling}
        taken: dict[str, Any] = {}
        for name in list(self.by_name):
            if normalize_name(name) in known or (takes_unnamed and not name):
                taken.update(self.by_name.pop(name))
        return taken

    def check_all_taken(self, meant: Sequence[str], on: Sequence[Resolution]) -> None:
        """Raise ``ConfigError`` for options that no plugin has taken; those without a name are ``meant`` for these."""
        flag, names = self.kind.option_flag, ", ".join(resolution.name for resolution in on)
        for name, options in self.by_name.items():
            option, value = next(iter(options.items()), ("KEY", "VALUE"))
            if name:
                suggested = suggest_names(name, [resolution.name for resolution in on])
                remedy = suggested if suggested.startswith("did") else f"on are {names or 'none'}"
                raise ConfigError(f"{flag} {name}.{option}: no {self.kind.title} {name!r} is on; {remedy}")
            which = f"{', '.join(meant)} are on" if meant else f"none was named with {self.kind.flag}"
            example = f"{(*meant, *(resolution.name for resolution in on), 'NAME')[0]}.{option}={value}"
            raise ConfigError(f"{flag} {option}: {which}; say whose it is: {flag} {example}")
