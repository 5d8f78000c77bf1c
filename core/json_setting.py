"""Settings whose value is a JSON object: on the command line its text, in Python a mapping."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from quire.core.errors import ConfigError

__all__ = ["parse_json_setting"]


def parse_json_setting(name: str, value: str | Mapping[str, Any] | None, example: str) -> dict[str, Any]:
    """The object; empty for None. Raises ``ConfigError``, on one line, for anything else; ``example`` shows one."""
    content: Any = value
    if isinstance(value, str):
        try:
            content = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{name} {value!r:.100} is not JSON: {error}; write it as {example}") from None
    if not isinstance(content, Mapping | None):
        raise ConfigError(f"{name} must be a JSON object, such as {example}, got {value!r:.100}")
    return dict(content or {})
