"""The flags of engine and server, derived from the fields of ``EngineArgs`` and ``ServerSettings``."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quire.core.engine.args import EngineArgs
from quire.core.engine.setting import Setting, settings_of
from quire.core.errors import ConfigError
from quire.core.plugin.options import split_key_values
from quire.core.plugin.registry import KINDS
from quire.server.http.api_keys import parse_named_key
from quire.server.http.settings import ServerSettings

__all__ = [
    "ENGINE_FLAGS",
    "SERVER_FLAGS",
    "add_flags",
    "add_model",
    "make_engine_args",
    "make_server_settings",
    "option_flags",
    "parse_float",
    "parse_int",
]


ENGINE_FLAGS: tuple[Setting, ...] = settings_of(EngineArgs)
SERVER_FLAGS: tuple[Setting, ...] = settings_of(ServerSettings)


def option_flags() -> dict[str, str]:
    """The ``--<kind>-option`` flags, each with the kind of plugin that it configures."""
    chosen_by_flag = {setting.plugin_kind for setting in ENGINE_FLAGS}
    return {kind.option_flag: kind.key for kind in KINDS.values() if kind.option_flag and kind.key in chosen_by_flag}


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the positional MODEL."""
    parser.add_argument(
        "model_argument",
        metavar="MODEL",
        nargs="?",
        help="folder or Hugging Face name; default: the embedded quire-tiny",
    )


def add_flags(parser: argparse.ArgumentParser, flags: Iterable[Setting]) -> None:
    """Add flags to a parser, in groups. What is not given stays None, so that the dataclasses keep the defaults."""
    groups: dict[str, Any] = {}
    for flag in flags:
        if flag.group not in groups:
            groups[flag.group] = parser.add_argument_group(flag.group)
        _add_flag(groups[flag.group], flag)
    if "plugins" in groups:
        for name, kind in option_flags().items():
            groups["plugins"].add_argument(
                name,
                dest=f"option_{kind}",
                action="append",
                metavar="NAME.KEY=VALUE" if KINDS[kind].several else "KEY=VALUE",
                help=f"option of the {KINDS[kind].title}"
                + ("; NAME. may be left out where one is named" if KINDS[kind].several else ""),
            )


def make_engine_args(args: argparse.Namespace) -> EngineArgs:
    """The engine arguments of a command line. Raises ConfigError if MODEL is given twice and differs."""
    values = _values_given(args, ENGINE_FLAGS)
    if before := getattr(args, "plugins_before", None):  # quire --plugin DIST serve ...
        values["plugins"] = [*before, *values.get("plugins", ())]
    positional = getattr(args, "model_argument", None)
    if positional and values.get("model", positional) != positional:
        raise ConfigError(
            f"the model is given twice, as {positional!r} and as --model {values['model']!r}; give it once"
        )
    if positional:
        values["model"] = positional
    if "model" not in values and len(values.get("served_model_name", ())) > 1:
        raise ConfigError("--served-model-name took several names and there is no MODEL; write MODEL before it")
    options = {
        kind: split_key_values(pairs, name)
        for name, kind in option_flags().items()
        if (pairs := _option_pairs(args, kind))
    }
    return EngineArgs(**values, plugin_options=options)


def make_server_settings(args: argparse.Namespace) -> ServerSettings:
    """The server settings of a command line. Raises ConfigError for values out of range."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in _values_given(args, SERVER_FLAGS).items()
    }
    if "allowed_origins" in values:
        values["allowed_origins"] = _split_origins(values["allowed_origins"])
    settings = ServerSettings(**values)
    for name, port in (("--port", settings.port), ("--prometheus-port", settings.prometheus_port or 0)):
        if not 0 <= port <= 65535:
            raise ConfigError(f"{name} must be between 0 and 65535, got {port}")
    if settings.port and settings.port == settings.prometheus_port:
        raise ConfigError(f"--prometheus-port {settings.port} is also --port; give it a port of its own")
    if not (math.isfinite(settings.shutdown_timeout) and settings.shutdown_timeout >= 0):
        raise ConfigError(f"--shutdown-timeout must be 0 or more seconds, got {settings.shutdown_timeout}")
    for name, number in (
        ("--max-stored-responses", settings.max_stored_responses),
        ("--max-stored-response-bytes", settings.max_stored_response_bytes),
    ):
        if number < 0:
            raise ConfigError(f"{name} must be at least 0, got {number}")
    if settings.max_request_bytes < 1:
        raise ConfigError(f"--max-request-bytes must be at least 1, got {settings.max_request_bytes}")
    if not all(key.strip() for key in settings.api_key):
        raise ConfigError("--api-key is empty; give a key, or leave the flag out to ask for none")
    if settings.admin_api_key is not None and not settings.admin_api_key.strip():
        raise ConfigError("--admin-api-key is empty; give a key, or leave the flag out to have no routes below /admin")
    if settings.lora_root is not None:
        if settings.admin_api_key is None:
            raise ConfigError(
                "--lora-root is for /v1/load_lora_adapter, which exists with --admin-api-key alone; give one"
            )
        if not (getattr(args, "enable_lora", None) or getattr(args, "lora_modules", None)):
            raise ConfigError("--lora-root is for adapters, and there are none without --enable-lora; give it")
        if not Path(settings.lora_root).is_dir():
            raise ConfigError(f"--lora-root {settings.lora_root} is not a folder; make it, or name another")
    names = [parse_named_key(text).name for text in settings.named_api_key]
    if len(set(names)) < len(names):
        raise ConfigError(f"--named-api-key: {max(names, key=names.count)!r} names two keys; give each its own name")
    return settings


def parse_int(text: str) -> int:
    """A whole number, or an error that quotes the text."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def parse_count(text: str) -> int:
    """A whole number of tokens or requests, also as vLLM writes it: 8k is 8,000, 8K is 8,192."""
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([kKmM])", text):
        return round(float(match[1]) * {"k": 1000, "K": 1024, "m": 10**6, "M": 1024**2}[match[2]])
    return parse_int(text)


def parse_float(text: str) -> float:
    """A number, or an error that quotes the text."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _split_origins(words: tuple[str, ...]) -> tuple[str, ...]:
    """Origins given as words, or as one JSON list as in vLLM."""
    if len(words) == 1 and words[0].startswith("["):
        try:
            words = tuple(json.loads(words[0]))
        except ValueError:
            raise ConfigError(f"--allowed-origins {words[0]}: neither origins nor a JSON list of them") from None
    for origin in words:
        if not isinstance(origin, str) or "/" in origin.partition("://")[2]:
            raise ConfigError(f"--allowed-origins {origin}: not an origin; write it as http://localhost:3000, or *")
    return words


def _option_pairs(args: argparse.Namespace, kind: str) -> list[str]:
    return getattr(args, f"option_{kind}", None) or []


def _values_given(args: argparse.Namespace, settings: Iterable[Setting]) -> dict[str, Any]:
    values: dict[str, Any] = {setting.name: getattr(args, setting.name, None) for setting in settings}
    return {name: value for name, value in values.items() if value is not None}


def _add_flag(group: Any, setting: Setting) -> None:
    text, default = setting.help.replace("%", "%%"), setting.default
    if default not in (None, (), "", "auto", ("auto",)) and setting.name != "model":
        text += f" (default: {'on' if default is True else 'off' if default is False else default})"
    common: dict[str, Any] = {"dest": setting.name, "help": text}
    names = (setting.flag, *setting.aliases)
    if setting.value_type == "bool":
        group.add_argument(*names, action=argparse.BooleanOptionalAction, default=None, **common)
    elif setting.value_type == "append":
        group.add_argument(*names, action="append", metavar=setting.metavar, **common)
    elif setting.value_type == "list":
        group.add_argument(*names, nargs="+", metavar=setting.metavar, **common)
    else:
        parse_whole = parse_count if setting.group == "limits" else parse_int
        parse = {"text": str, "int": parse_whole, "float": parse_float}[setting.value_type]
        shown = setting.metavar or setting.value_type.upper()
        allowed = {"choices": setting.choices} if setting.choices else {"metavar": shown}
        group.add_argument(*names, type=parse, **allowed, **common)
