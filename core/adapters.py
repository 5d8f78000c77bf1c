"""LoRA adapters as callers name them, and as the engine core knows them."""

from __future__ import annotations

import os

import msgspec

from quire.core.errors import UnsupportedError

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
    given_path: str = ""
    """What it was asked for as: a folder, or a name on the hub."""
    parent: str | None = None
    """What ``/v1/models`` calls its base; None: the model's name."""


class LoRARequest(msgspec.Struct, frozen=True):
    """An adapter as a caller of ``LLM.generate`` gives it, in vLLM's form.

    >>> LoRARequest("json", 1, "quire-tiny-json")
    """

    lora_name: str
    lora_int_id: int = 0
    """The caller's number. Not used: a name stands for one adapter at a time."""
    lora_path: str = ""
    """A folder that PEFT wrote, a name on the hub, or a bundled adapter; empty: it was loaded under the name before."""
    base_model_name: str | None = None
    """What ``/v1/models`` calls its base; None: the model's name."""
    tensorizer_config_dict: dict[str, object] | None = None
    """Of vLLM's; refused."""
    load_inplace: bool = False
    """Whether a name that stands for another folder takes this one from now on."""
    is_3d_lora_weight: bool = False
    """Of vLLM's, for models with experts; refused."""

    def __post_init__(self) -> None:
        if self.tensorizer_config_dict is not None:
            raise UnsupportedError("tensorizer_config_dict: give the folder that PEFT wrote", "lora_request")
        if self.is_3d_lora_weight:
            raise UnsupportedError("is_3d_lora_weight: models with experts are not supported", "lora_request")
        if isinstance(self.lora_path, os.PathLike):
            msgspec.structs.force_setattr(self, "lora_path", os.fspath(self.lora_path))

    @property
    def name(self) -> str:
        """As ``lora_name``."""
        return self.lora_name

    @property
    def adapter_id(self) -> int:
        """As ``lora_int_id``."""
        return self.lora_int_id

    @property
    def path(self) -> str:
        """As ``lora_path``."""
        return self.lora_path


class AdapterActivity(msgspec.Struct, frozen=True, array_like=True):
    """How many requests an adapter has in the engine core."""

    name: str
    num_running: int
    """That have begun."""
    num_waiting: int
