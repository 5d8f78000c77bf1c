"""``--default-chat-template-kwargs``: variables of the chat template that requests leave out."""

from __future__ import annotations

import json
from typing import Any

from quire.core.engine.chat import template_variables
from quire.core.errors import ConfigError, InvalidRequestError

__all__ = ["parse_template_defaults"]


def parse_template_defaults(text: str | None) -> dict[str, Any]:
    """The variables of ``--default-chat-template-kwargs``. Raises ConfigError."""
    if text is None:
        return {}
    flag = "--default-chat-template-kwargs"
    try:
        variables = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{flag} {text}: no JSON: {error}") from None
    if not isinstance(variables, dict):
        raise ConfigError(f'{flag} {text}: not a JSON object; write it as {{"enable_thinking": false}}')
    try:
        template_variables([], chat_template_kwargs=variables)
    except InvalidRequestError as error:
        reason = str(error).partition(";")[0].removeprefix("chat_template_kwargs.")
        raise ConfigError(f"{flag}: {reason}; leave it out") from None
    return variables
