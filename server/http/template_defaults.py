"""``--default-chat-template-kwargs``: variables of the chat template that requests leave out."""

from __future__ import annotations

from typing import Any

from quire.core.engine.chat import template_variables
from quire.core.errors import ConfigError, InvalidRequestError
from quire.core.json_setting import parse_json_setting

__all__ = ["parse_template_defaults"]


def parse_template_defaults(text: str | None) -> dict[str, Any]:
    """The variables of ``--default-chat-template-kwargs``. Raises ConfigError."""
    flag = "--default-chat-template-kwargs"
    variables = parse_json_setting(flag, text, '{"enable_thinking": false}')
    try:
        template_variables([], chat_template_kwargs=variables)
    except InvalidRequestError as error:
        reason = str(error).partition(";")[0].removeprefix("chat_template_kwargs.")
        raise ConfigError(f"{flag}: {reason}; leave it out") from None
    return variables
