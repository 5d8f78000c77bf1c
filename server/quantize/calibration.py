"""Calibration texts for quantization: a file of the user's, or Python's own documentation and library."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.core.errors import ConfigError, InvalidRequestError

if TYPE_CHECKING:
    from quire.core.engine.tokenizer import Tokenizer

__all__ = ["load_samples"]

_MODULES = (
    "argparse", "ast", "bisect", "calendar", "collections", "configparser", "contextlib", "csv", "dataclasses",
    "decimal", "difflib", "enum", "fractions", "functools", "heapq", "html", "inspect", "ipaddress", "json",
    "logging", "os", "pathlib", "random", "shlex", "shutil", "statistics", "string", "subprocess", "tempfile",
    "textwrap", "threading", "traceback", "typing", "urllib", "uuid", "zipfile",
)  # fmt: skip


def load_samples(tokenizer: Tokenizer, file: Path | None, count: int, length: int) -> list[list[int]]:
    """At most ``count`` samples of ``length`` tokens, spread evenly over the text.

    ``file`` is text, or JSON lines (``.jsonl``) of ``{"text": ...}`` or ``{"messages": [...], "tools": [...]}``, the
    latter written with the model's chat template. Without one: topics of Python's documentation, as chats where the
    model has a template, and source files of its library, by turns. ConfigError for what cannot be used.
    """
    tokens: list[int] = []
    for document in _read_python_docs(tokenizer) if file is None else _read_file(tokenizer, file):
        tokens += document
        if file is None and len(tokens) >= 2 * count * length:
            break
    num_samples = min(count, len(tokens) // length)
    if not num_samples:
        raise ConfigError(
            f"--calibration {file}: {len(tokens)} tokens are less than one sample of {length}; give more text, or a "
            f"smaller --sequence-length"
        )
    stride = len(tokens) // num_samples
    return [tokens[i * stride : i * stride + length] for i in range(num_samples)]


def _read_file(tokenizer: Tokenizer, file: Path) -> Iterator[list[int]]:
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--calibration {file} cannot be read ({error}); give a file of UTF-8 text") from None
    if file.suffix != ".jsonl":
        yield tokenizer.encode(text)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if "text" in record:
                yield tokenizer.encode(record["text"])
            else:
                yield tokenizer.apply_chat_template(
                    record["messages"], tools=record.get("tools"), add_generation_prompt=False
                )
        except (ValueError, TypeError, KeyError) as error:
            reason = str(error) if isinstance(error, InvalidRequestError) else "it has neither text nor messages"
            raise ConfigError(f"--calibration {file}, line {number}: {' '.join(reason.split())[:300]}") from None


def _read_python_docs(tokenizer: Tokenizer) -> Iterator[list[int]]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise ConfigError("this Python comes without its documentation; give a text with --calibration FILE") from None
    sources = _read_library_sources()
    for name, topic in sorted(topics.items()):
        chat: list[dict[str, Any]] = [
            {"role": "user", "content": f"What does the documentation of Python say about {name}?"},
            {"role": "assistant", "content": topic.strip()[:2000]},
        ]
        try:
            yield tokenizer.apply_chat_template(chat, add_generation_prompt=False)
        except InvalidRequestError:  # no chat model
            yield tokenizer.encode(topic)
        yield tokenizer.encode(next(sources, ""))


def _read_library_sources() -> Iterator[str]:
    for name in _MODULES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin and Path(spec.origin).suffix == ".py":
            yield Path(spec.origin).read_text("utf-8")[:4000]
