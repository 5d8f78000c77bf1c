"""What a caller tells the batching policy of one request."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from quire.core.errors import InvalidRequestError
from quire.core.sampling_params import check_text, to_integer

__all__ = ["MAX_GROUP_CHARS", "MAX_TAGS", "SchedulingParams"]

MAX_GROUP_CHARS = 256
"""The longest name of a group."""
MAX_TAGS, MAX_TAG_KEY_CHARS, MAX_TAG_CHARS = 16, 64, 512
"""The most tags of a request, and the longest key and value: the limits of OpenAI's ``metadata``."""
_MAX_MS = 1e9
_MAX_PREDICTED_TOKENS = 2**31 - 1


class SchedulingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a batching policy may use to rank a request. None of it changes a token, and ``fcfs`` reads none of it."""

    group: str | None = None
    """Whose request it is: a tenant, a user, a queue. Over HTTP the name of the API key, where it has one."""
    deadline_ms: float | None = None
    """Milliseconds from arrival by which the answer is of use."""
    ttft_target_ms: float | None = None
    """Milliseconds from arrival by which the first token should come."""
    tpot_target_ms: float | None = None
    """Milliseconds that each further token should take on average."""
    predicted_tokens: int | None = None
    """How many tokens the caller expects of the answer. ``max_tokens`` remains the limit."""
    tags: dict[str, str] = {}
    """Anything else that a policy understands: up to 16 short texts by name."""

    def __post_init__(self) -> None:
        """Converts numbers of numpy and the like, and refuses everything else by name."""
        if self.group is not None:
            check_text("group", self.group, MAX_GROUP_CHARS)
            if not self.group:
                raise InvalidRequestError("group must not be empty; leave it out", "group")
        for name in ("deadline_ms", "ttft_target_ms", "tpot_target_ms"):
            value = getattr(self, name)
            if value is not None:
                msgspec.structs.force_setattr(self, name, _to_milliseconds(name, value))
        if self.predicted_tokens is not None:
            predicted = to_integer("predicted_tokens", self.predicted_tokens)
            if not 1 <= predicted <= _MAX_PREDICTED_TOKENS:
                raise InvalidRequestError(f"predicted_tokens must be at least 1, got {predicted}", "predicted_tokens")
            msgspec.structs.force_setattr(self, "predicted_tokens", predicted)
        msgspec.structs.force_setattr(self, "tags", _check_tags(self.tags))


def _to_milliseconds(name: str, value: Any) -> float:
    try:
        number = float("nan") if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number <= _MAX_MS:
        raise InvalidRequestError(f"{name} must be a number of milliseconds above 0, got {value!r:.60}", name)
    return number


def _check_tags(tags: Any) -> dict[str, str]:
    if not isinstance(tags, Mapping):
        raise InvalidRequestError(f"tags must map names to texts, got {tags!r:.60}", "tags")
    if len(tags) > MAX_TAGS:
        raise InvalidRequestError(f"tags holds {len(tags)} entries, the limit is {MAX_TAGS}", "tags")
    for key, value in tags.items():
        check_text("tags", key, MAX_TAG_KEY_CHARS)
        check_text(f"tags.{key}", value, MAX_TAG_CHARS)
    return dict(tags)
