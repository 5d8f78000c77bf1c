"""LoRA adapters as callers name them, and as the engine core knows them."""

from __future__ import annotations

import msgspec

__all__ = ["AdapterActivity", "AdapterRef", "LoRARequest"]


class AdapterRef(msgspec.Struct, frozen=True, array_like=True):
    """One registered adapter. Every request that uses it carries this, so that no table of names is asked later: what
    the name stands for may have changed by then."""

    adapter_id: int
    """From 1; never used again, also not for the same adapter registered anew."""
    name: str
    """What requests call it."""
    path: str
    """The folder that its name resolved to."""
    content_hash: str
    """Of its weights and configuration: what the prefix cache is keyed by, and by which changed files are found."""


class LoRARequest(msgspec.Struct, frozen=True):
    """An adapter as a caller of ``LLM.generate`` gives it, in vLLM's form.

    >>> LoRARequest("json", 1, "quire-tiny-json")
    """

    lora_name: str
    lora_int_id: int = 0
    """The caller's number. Not used: a name stands for one adapter at a time."""
    lora_path: str = ""
    """A folder that PEFT wrote, a name on the hub, or a bundled adapter; empty: it was loaded under the name before."""
    load_inplace: bool = False
    """Whether a name that stands for another folder takes this one from now on."""

    @property
    def name(self) -> str:
        """As ``lora_name``."""
        return self.lora_name


class AdapterActivity(msgspec.Struct, frozen=True, array_like=True):
    """How many requests an adapter has in the engine core."""

    name: str
    num_running: int
    """That have begun."""
    num_waiting: int
