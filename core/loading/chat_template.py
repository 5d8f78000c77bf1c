"""The chat templates of a model folder as text: what says how the model writes calls and reasoning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quire.core.errors import ConfigError

__all__ = ["make_missing_template_error", "read_chat_templates"]


def read_chat_templates(folder: Path, chosen: str | None = None) -> str:
    """Every chat template of ``folder``, joined; empty if it has none. ``chosen`` is what ``--chat-template`` says: a
    file, or a template, which is then the only one, or the name of one of the folder's. Loads no tokenizer; a file of
    the folder that cannot be read is passed over, as the tokenizer says what is wrong with it. Raises ``ConfigError``
    for what is neither a template, a file nor a name."""
    if chosen and "{" in chosen:
        return chosen
    if chosen and Path(chosen).is_file():
        return Path(chosen).read_text(encoding="utf-8", errors="replace")
    files = [folder / "chat_template.jinja", *sorted(folder.glob("additional_chat_templates/*.jinja"))]
    texts = [(file.stem, file.read_text(encoding="utf-8", errors="replace")) for file in files if file.is_file()]
    for name in ("chat_template.json", "tokenizer_config.json"):
        texts += _list_templates(_read_json(folder / name).get("chat_template"))
    if chosen and chosen not in ("default", *(name for name, _ in texts)):
        raise make_missing_template_error(chosen)
    return "\n".join(text for _, text in texts)


def make_missing_template_error(chosen: str) -> ConfigError:
    """What is said of a ``--chat-template`` that is none."""
    return ConfigError(f"--chat-template {chosen}: no such file; give a Jinja file or the template itself")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _list_templates(value: Any) -> list[tuple[str, str]]:
    """The name and the text of one template, or of several."""
    if isinstance(value, str):
        return [("default", value)]
    named = value if isinstance(value, list) else []
    return [
        (str(each.get("name")), each["template"])
        for each in named
        if isinstance(each, dict) and isinstance(each.get("template"), str)
    ]
