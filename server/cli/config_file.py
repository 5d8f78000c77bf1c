"""``quire serve --config FILE``: flags from a YAML file, as vLLM reads them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from quire.core.errors import ConfigError

__all__ = ["fill_in", "read_flags"]


def read_flags(file: str, parser: argparse.ArgumentParser) -> list[str]:
    """The file as words for ``parser``: ``max-model-len: 4096`` is ``--max-model-len 4096``. Raises ``ConfigError`` on
    one line."""
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"--config {file}: {reason}; give a YAML file of flags") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {file} is not valid YAML: {error}") from None
    if content is None:
        return []
    if not isinstance(content, dict):
        raise ConfigError(f"--config {file}: give flags by their names, such as port: 9000")
    return [word for name, value in content.items() for word in _write_flag(str(name), value, parser)]


def _write_flag(name: str, value: Any, parser: argparse.ArgumentParser) -> list[str]:
    flag = "--" + name.removeprefix("--").replace("_", "-")
    action = parser._option_string_actions.get(flag)
    if value is None:
        return []
    if isinstance(value, bool):
        off = [f"--no-{flag[2:]}"] if isinstance(action, argparse.BooleanOptionalAction) else []
        return [flag] if value else off
    if not isinstance(value, list):
        return [flag, _write_value(value)]
    if isinstance(action, argparse._AppendAction):
        return [word for each in value for word in (flag, _write_value(each))]
    return [flag, *map(_write_value, value)]


def _write_value(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def fill_in(args: argparse.Namespace, from_file: argparse.Namespace) -> None:
    """Take from the file what the command line does not say."""
    if args.model_argument:
        from_file.model = None
    for name, value in vars(from_file).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
