"""How a setting is declared: once, as a dataclass field that carries its help text and its flag.

The command line, ``--help``, the keyword arguments of ``LLM`` and ``AsyncLLM`` and the tables of docs/cli.md are all
derived from these declarations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, get_type_hints

from quire.core.plugin.registry import KINDS

__all__ = ["Setting", "ValueType", "section_default", "setting", "settings_of"]

ValueType = Literal["text", "int", "float", "bool", "append", "list"]
"""How a flag takes its value: ``append`` once per occurrence, ``list`` several words at once."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One declared setting: a field of ``EngineArgs`` or of ``ServerSettings``, and the flag that sets it."""

    name: str
    """Of the field; also the keyword argument of ``LLM``."""
    flag: str
    """Such as ``--max-model-len``."""
    value_type: ValueType
    default: Any
    group: str
    """The heading under which ``--help`` and docs/cli.md list it."""
    help: str
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    """Every value that is allowed; empty: any."""
    aliases: tuple[str, ...] = ()
    """Other spellings of the flag, such as vLLM's."""
    plugin_kind: str | None = None
    """The kind of plugin that the value names."""


def setting(
    default: Any,
    *,
    group: str,
    help: str,
    metavar: str | None = None,
    choices: Sequence[str] = (),
    flag: str | None = None,
    aliases: Sequence[str] = (),
    plugin_kind: str | None = None,
    several_words: bool = False,
) -> Any:
    """Declare a dataclass field as a setting.

    The flag is the field's name with dashes unless ``flag`` or ``plugin_kind`` says otherwise. A flag whose field is a
    sequence may be repeated; with ``several_words`` it takes several values at once instead.
    """
    declared = {
        "group": group,
        "help": help,
        "metavar": metavar,
        "choices": tuple(choices),
        "flag": flag,
        "aliases": tuple(aliases),
        "plugin_kind": plugin_kind,
        "several_words": several_words,
    }
    return field(default=default, metadata={"setting": declared})


def section_default(section: type, name: str) -> Any:
    """The default of a field of a configuration section, so that no default is written twice."""
    [declared_field] = [each for each in fields(section) if each.name == name]
    assert declared_field.default is not MISSING, f"{section.__name__}.{name} has no default"
    return declared_field.default


def settings_of(cls: type) -> tuple[Setting, ...]:
    """The settings that a dataclass declares, in order; fields without a declaration are not settings."""
    hints = get_type_hints(cls)
    return tuple(_setting_of(each, hints[each.name]) for each in fields(cls) if "setting" in each.metadata)


def _setting_of(declared_field: Field[Any], annotation: Any) -> Setting:
    declared = dict(declared_field.metadata["setting"])
    several_words, flag = declared.pop("several_words"), declared.pop("flag")
    if declared["plugin_kind"] is not None:
        kind = KINDS[declared["plugin_kind"]]
        flag = kind.flag
        declared["aliases"] += tuple(alias for alias in kind.aliases if alias.startswith("--"))
    return Setting(
        name=declared_field.name,
        flag=flag or "--" + declared_field.name.replace("_", "-"),
        value_type=_value_type(annotation, several_words),
        default=declared_field.default,
        **declared,
    )


def _value_type(annotation: Any, several_words: bool) -> ValueType:
    """From the annotation of the field, such as ``int | None`` or ``Sequence[str]``."""
    members = {annotation, *getattr(annotation, "__args__", ())}
    if any(getattr(member, "__origin__", None) in (tuple, Sequence) for member in members):
        return "list" if several_words else "append"
    if bool in members:
        return "bool"
    if int in members:
        return "int"
    return "float" if float in members else "text"
