"""The bodies of routes below ``/admin``."""

from __future__ import annotations

from pydantic import Field

from quire.server.http.protocol.common import Body

__all__ = ["PolicyBody"]


class PolicyBody(Body):
    """The scheduling policy to switch to."""

    name: str = Field(min_length=1, max_length=256)
    options: dict[str, str | int | float | bool] = Field({}, max_length=64)
