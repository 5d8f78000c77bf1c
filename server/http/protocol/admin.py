"""The bodies of routes that ask for the admin key."""

from __future__ import annotations

from pydantic import Field

from quire.server.http.protocol.common import Body

__all__ = ["LoadAdapterBody", "PolicyBody", "UnloadAdapterBody"]


class PolicyBody(Body):
    """The scheduling policy to switch to."""

    name: str = Field(min_length=1, max_length=256)
    options: dict[str, str | int | float | bool] = Field({}, max_length=64)


class LoadAdapterBody(Body):
    """An adapter to load."""

    lora_name: str = Field(min_length=1, max_length=256)
    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: bool | None = None
    """Whether it takes the place of the adapter that has the name."""


class UnloadAdapterBody(Body):
    """An adapter to unload."""

    lora_name: str = Field(min_length=1, max_length=256)
    lora_int_id: int | None = None
    """Of vLLM's; not used."""
