"""``from quire.lora.request import LoRARequest``, as scripts for vLLM have it."""

from __future__ import annotations

from quire.core.adapters import LoRARequest

__all__ = ["LoRARequest"]
