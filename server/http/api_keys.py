"""The keys that clients send: which are known, and what each is called."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import NamedTuple

from quire.core.errors import ConfigError
from quire.core.scheduling_params import MAX_GROUP_CHARS

__all__ = ["ApiKey", "ApiKeys", "parse_named_key"]


class ApiKey(NamedTuple):
    """A key of a client."""

    key: str
    name: str | None = None
    """What the operator calls it: the group of its requests, for the scheduling policy."""


class ApiKeys:
    """The keys of a server. None known: all requests are let in."""

    def __init__(self, keys: Sequence[str], named_keys: Sequence[str] = ()) -> None:
        self._keys = [*(ApiKey(key) for key in keys), *map(parse_named_key, named_keys)]
        self.names = frozenset(key.name for key in self._keys if key.name is not None)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def find_key(self, authorization: str) -> ApiKey | None:
        """The key of an ``Authorization`` header; None if it holds none that is known. Takes as long for any key."""
        scheme, _, text = authorization.partition(" ")
        presented = text.strip().encode(errors="replace")
        found = None
        for key in self._keys:
            if hmac.compare_digest(presented, key.key.encode()):
                found = key
        return found if scheme.lower() == "bearer" else None


def parse_named_key(text: str) -> ApiKey:
    """``NAME=KEY``. Raises ``ConfigError`` without showing the key."""
    name, equals, key = text.partition("=")
    name = name.strip()
    if not equals or not name or not key.strip():
        raise ConfigError("--named-api-key must be NAME=KEY; to ask for a key without a name, use --api-key")
    if len(name) > MAX_GROUP_CHARS:
        raise ConfigError(f"--named-api-key: the name {name[:40]!r}... is longer than {MAX_GROUP_CHARS} characters")
    return ApiKey(key, name)
