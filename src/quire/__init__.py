"""Quire: an LLM serving engine with an OpenAI-compatible API, in which every component is a plugin.

Plugins are written against ``quire.sdk`` and tested with ``quire.testing``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from quire.core.version import __version__

if TYPE_CHECKING:
    from quire.core.engine.async_llm import AsyncLLM
    from quire.core.engine.llm import LLM
    from quire.core.messages import CompletionOutput, RequestOutput
    from quire.core.plugin.hookspecs import hookimpl
    from quire.core.sampling_params import SamplingParams

__all__ = ["LLM", "AsyncLLM", "CompletionOutput", "RequestOutput", "SamplingParams", "__version__", "hookimpl"]

_HOMES = {
    "LLM": "quire.core.engine.llm",
    "AsyncLLM": "quire.core.engine.async_llm",
    "CompletionOutput": "quire.core.messages",
    "RequestOutput": "quire.core.messages",
    "SamplingParams": "quire.core.sampling_params",
    "hookimpl": "quire.core.plugin.hookspecs",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that ``quire plugins list`` never pays for torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'quire' has no attribute {name!r}")
