"""vLLM's flags and spellings that Quire does not have: mapped to its own, ignored with a line, or refused with the
reason."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from quire.core.engine.vllm_names import VLLM_FLAGS, VLLM_VARIABLES, VllmFlag
from quire.core.errors import ConfigError

__all__ = [
    "VLLM_FLAGS",
    "add_vllm_flags",
    "apply_vllm_flags",
    "apply_vllm_variables",
    "find_boolean_flags",
    "normalize_spelling",
]

_NOT_NEEDED = "no longer needed: "


def add_vllm_flags(parser: argparse.ArgumentParser) -> None:
    """Let the parser understand them, without showing them in ``--help``."""
    for flag in VLLM_FLAGS:
        if flag.takes_value:
            count: int | str = "+" if flag.refused and not flag.accepted_values else 1
            parser.add_argument(flag.name, dest=_dest(flag), nargs=count, help=argparse.SUPPRESS)
        else:
            parser.add_argument(flag.name, dest=_dest(flag), action="store_true", default=None, help=argparse.SUPPRESS)


def apply_vllm_flags(args: argparse.Namespace) -> list[str]:
    """Set in ``args`` what vLLM's flags mean here; returns the lines to log. ConfigError for a refused one."""
    messages = []
    for flag in VLLM_FLAGS:
        value = getattr(args, _dest(flag), None)
        if value is None:
            continue
        shown = flag.name if value is True else f"{flag.name} {' '.join(value)}"
        if flag.accepted_values and value is not True and set(value) <= set(flag.accepted_values):
            messages.append(f"{shown}: {_NOT_NEEDED}it is the default")
            continue
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
    """Rewrite ``--some_flag`` as ``--some-flag``, and ``--flag=False`` of a boolean flag as ``--no-flag``.

    Returns the new command line and the lines to log.
    """
    result: list[str] = []
    messages: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*result, word, *rest], messages
        if not word.startswith("--"):
            result.append(word)
            continue
        name, equals, value = word.partition("=")
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
    return result, messages


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
