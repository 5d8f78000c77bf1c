"""The chat templates of a model folder as text: what says how the model writes calls and reasoning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["read_chat_templates"]


def read_chat_templates(folder: Path, chosen: str | None = None) -> str:
    """Every chat template of ``folder``, joined; empty if it has none. ``chosen`` is what ``--chat-template`` says: a
    file, or a template, which is then the only one. Loads no tokenizer; a file that cannot be read is passed over,
    as the tokenizer says what is wrong with it."""
    if chosen and "{" in chosen:
        return chosen
    if chosen and Path(chosen).is_file():
        return Path(chosen).read_text(encoding="utf-8", errors="replace")
    files = [folder / "chat_template.jinja", *sorted(folder.glob("additional_chat_templates/*.jinja"))]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file()]
    for name in ("chat_template.json", "tokenizer_config.json"):
        texts += _list_templates(_read_json(folder / name).get("chat_template"))
    return "\n".join(texts)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _list_templates(value: Any) -> list[str]:
    """One template, or several with their names."""
    if isinstance(value, str):
        return [value]
    named = value if isinstance(value, list) else []
    return [each["template"] for each in named if isinstance(each, dict) and isinstance(each.get("template"), str)]
