"""Quire: an LLM serving engine with an OpenAI-compatible API, in which every component is a plugin.

Plugins are written against ``quire.sdk`` and tested with ``quire.testing``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from quire.core.version import __version__

if TYPE_CHECKING:
    from quire.core.adapters import LoRARequest
    from quire.core.engine.args import EngineArgs
    from quire.core.engine.async_llm import AsyncLLM
    from quire.core.engine.llm import LLM
    from quire.core.engine.llm_engine import LLMEngine
    from quire.core.engine.tokenizer import get_tokenizer
    from quire.core.messages import CompletionOutput, Logprob, RequestMetrics, RequestOutput
    from quire.core.plugin.hookspecs import hookimpl
    from quire.core.sampling_params import SamplingParams
    from quire.core.scheduling_params import SchedulingParams
    from quire.core.structured_outputs import StructuredOutputsParams

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "EngineArgs",
    "LLMEngine",
    "LoRARequest",
    "Logprob",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "SchedulingParams",
    "StructuredOutputsParams",
    "__version__",
    "get_tokenizer",
    "hookimpl",
]

_HOMES = {
    "LLM": "quire.core.engine.llm",
    "LLMEngine": "quire.core.engine.llm_engine",
    "AsyncLLM": "quire.core.engine.async_llm",
    "CompletionOutput": "quire.core.messages",
    "LoRARequest": "quire.core.adapters",
    "Logprob": "quire.core.messages",
    "RequestMetrics": "quire.core.messages",
    "RequestOutput": "quire.core.messages",
    "SamplingParams": "quire.core.sampling_params",
    "StructuredOutputsParams": "quire.core.structured_outputs",
    "SchedulingParams": "quire.core.scheduling_params",
    "get_tokenizer": "quire.core.engine.tokenizer",
    "hookimpl": "quire.core.plugin.hookspecs",
    "EngineArgs": "quire.core.engine.args",
}
_NAMES_IN_VLLM = {
    "AsyncEngineArgs": "EngineArgs",
    "AsyncLLMEngine": "AsyncLLM",
    "GuidedDecodingParams": "StructuredOutputsParams",
}
"""Other names, as imported from vLLM, of what stands in ``__all__``."""


def __getattr__(name: str) -> Any:
    """Import on first use, so that ``quire plugins list`` never pays for torch."""
    name = _NAMES_IN_VLLM.get(name, name)
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'quire' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Also what is imported on first use."""
    return sorted({*globals(), *__all__, *_NAMES_IN_VLLM})
