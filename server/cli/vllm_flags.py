"""vLLM's flags and spellings that Quire does not have: mapped to its own, ignored with a line, or refused with the
reason."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from quire.core.engine.vllm_flag_table import ABSENT_FLAGS, SHORT_FLAGS, VLLM_FLAGS, VllmFlag
from quire.core.engine.vllm_names import VLLM_VARIABLES
from quire.core.errors import ConfigError

__all__ = [
    "add_vllm_flags",
    "apply_vllm_flags",
    "apply_vllm_variables",
    "explain_absent_flag",
    "find_boolean_flags",
    "normalize_spelling",
]

_NOT_NEEDED = "no longer needed: "


def add_vllm_flags(parser: argparse.ArgumentParser) -> None:
    """Let the parser understand them, without showing them in ``--help``."""
    for flag in VLLM_FLAGS:
        names = [flag.name, *(short for short, name in SHORT_FLAGS.items() if name == flag.name)]
        if flag.takes_value:
            parser.add_argument(*names, dest=_dest(flag), help=argparse.SUPPRESS)
        else:
            action = argparse.BooleanOptionalAction
            parser.add_argument(*names, dest=_dest(flag), action=action, default=None, help=argparse.SUPPRESS)


def explain_absent_flag(word: str) -> str | None:
    """What became of a flag of vLLM's that no parser knows, or ``""`` where it asks for nothing (``--no-...``). None:
    it is none of vLLM's."""
    flag = SHORT_FLAGS.get(word, word)
    if flag in ABSENT_FLAGS:
        return f"{word}: {ABSENT_FLAGS[flag]}"
    return "" if flag.startswith("--no-") and f"--{flag[5:]}" in ABSENT_FLAGS else None


def apply_vllm_flags(args: argparse.Namespace) -> list[str]:
    """Set in ``args`` what vLLM's flags mean here; returns the lines to log. ConfigError for a refused one."""
    messages = []
    for flag in VLLM_FLAGS:
        value = getattr(args, _dest(flag), None)
        if value is None:
            continue
        shown = f"--no-{flag.name[2:]}" if value is False else flag.name if value is True else f"{flag.name} {value}"
        is_default = value is False or (flag.refused and flag.is_accepted(value))
        if is_default and not (value is False and flag.off_is_refused):
            messages.append(f"{shown}: {_NOT_NEEDED}it is the default")
            continue
        if flag.off_is_refused and value is False:
            raise ConfigError(f"{shown}: {flag.off_reason}")
        if flag.refused:
            raise ConfigError(f"{shown}: {flag.message}")
        if flag.sets is not None and getattr(args, flag.sets[0], None) is None:
            setattr(args, *flag.sets)
        messages.append(f"{shown}: {flag.message}")
    return messages


def apply_vllm_variables(args: argparse.Namespace, variables: Mapping[str, str]) -> list[str]:
    """Set in ``args`` what vLLM's environment variables mean here, where no flag says otherwise; returns the lines to
    log, which never hold a value: one is a key."""
    messages = []
    for name, value in sorted(variables.items()):
        if not value:
            continue
        setting, message = VLLM_VARIABLES.get(name, (None, "not used: Quire has no such variable"))
        if setting is not None:
            if getattr(args, setting, None) is not None:
                message = "not used: the flag wins over it"
            elif setting == "api_key":
                args.api_key = [value]
            elif value.lower() in ("debug", "info", "warning", "error"):
                setattr(args, setting, value.lower())
            else:
                message = "not used: --log-level takes debug, info, warning or error"
        messages.append(f"{name}: {message}")
    return messages


def normalize_spelling(argv: Sequence[str], booleans: frozenset[str]) -> tuple[list[str], list[str]]:
    """Rewrite ``--some_flag`` as ``--some-flag``, ``--flag=False`` of a boolean flag as ``--no-flag``, and
    ``--flag.key value`` as ``--flag '{"key": value}'``.

    Returns the new command line and the lines to log.
    """
    result: list[str] = []
    messages: list[str] = []
    objects: dict[str, dict[str, Any]] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--":
            rest = [word, *rest]
            break
        if not word.startswith(("--", "-O.", "-cc.")):
            result.append(word)
            continue
        name, equals, value = word.partition("=")
        name, *keys = name.split(".")
        if keys:
            if not equals and rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            flag = "--compilation-config" if name in ("-O", "-cc") else name.replace("_", "-")
            _set_key(objects.setdefault(flag, {}), flag, keys, value)
            continue
        dashed = name.replace("_", "-")
        if dashed != name:
            messages.append(f"{name}: now written {dashed}")
        if dashed in booleans and not equals and rest and rest[0].lower() in ("true", "false"):
            equals, value = "=", rest.pop(0)
        if dashed in booleans and equals:
            plain = _boolean_flag(dashed, value)
            messages.append(f"{name} {value}: now written {plain}")
            result.append(plain)
        else:
            result.append(dashed + equals + value)
    for flag, content in objects.items():
        if any(word.partition("=")[0] == flag for word in result):
            raise ConfigError(f"{flag} is given whole and by its keys ({flag}.{next(iter(content))}); give it once")
        result += [flag, json.dumps(content)]
    return [*result, *rest], messages


def _set_key(content: dict[str, Any], flag: str, keys: Sequence[str], text: str) -> None:
    """Set a value, which is JSON or else a text, at a path of keys. ConfigError where a key has a value and keys."""
    try:
        value = json.loads(text)
    except ValueError:
        value = text or True
    path = flag
    for key in keys[:-1]:
        path = f"{path}.{key}"
        content = content.setdefault(key, {})
        if not isinstance(content, dict):
            raise ConfigError(f"{path} is given whole and by its keys ({'.'.join((flag, *keys))}); give it once")
    if isinstance(previous := content.get(keys[-1]), dict) and previous:
        path = ".".join((flag, *keys))
        raise ConfigError(f"{path} is given whole and by its keys ({path}.{next(iter(previous))}); give it once")
    content[keys[-1]] = value


def find_boolean_flags(parser: argparse.ArgumentParser) -> frozenset[str]:
    """The flags of a parser that may be negated with ``--no-``."""
    actions = [action for action in parser._actions if isinstance(action, argparse.BooleanOptionalAction)]
    return frozenset(name for each in actions for name in each.option_strings if not name.startswith("--no-"))


def _boolean_flag(name: str, value: str) -> str:
    if value.lower() in ("true", "1"):
        return name
    if value.lower() in ("false", "0"):
        return f"--no-{name[2:]}"
    raise ConfigError(f"{name}: {value!r} is neither true nor false; write {name} or --no-{name[2:]}")


def _dest(flag: VllmFlag) -> str:
    return "vllm_" + flag.name[2:].replace("-", "_")
