"""The shapes of steps that an engine ran, counted: on them kernels are measured as one's own traffic needs them."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quire.core.messages import SchedulerOutput

__all__ = ["ShapeRecorder", "StepShape", "StepShapes"]

_log = logging.getLogger("quire.traces")
_FORMAT = "quire-step-shapes-1"
_MAX_SHAPES = 4096
"""Different ones that are kept; further ones are counted as left out."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """Steps that are alike, and one of them."""

    share: float
    """Of all steps."""
    requests: tuple[tuple[int, int], ...]
    """(queries, context length with them) of each request."""


@dataclass(frozen=True)
class StepShapes:
    """What a file of shapes holds."""

    num_steps: int
    counts: list[tuple[int, tuple[tuple[int, int], ...]]]
    """How many steps were like this one."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StepShapes:
        """Raises ``ValueError`` for another format."""
        if values.get("format") != _FORMAT:
            raise ValueError(f"not of the format {_FORMAT}")
        counts = [(int(n), tuple((int(q), int(k)) for q, k in requests)) for n, requests in values["shapes"]]
        return cls(int(values["num_steps"]), counts)

    def list_most_common(self, limit: int) -> Iterator[StepShape]:
        """By how many steps were alike."""
        for count, requests in sorted(self.counts, key=lambda each: -each[0])[:limit]:
            yield StepShape(count / max(1, self.num_steps), requests)


class ShapeRecorder:
    """Counts the steps of an engine core. Steps are alike that have the same number of decodes, of prompts, of their
    tokens, and of tokens in all contexts, each rounded to two binary digits."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._counts: Counter[tuple[int, ...]] = Counter()
        self._examples: dict[tuple[int, ...], tuple[tuple[int, int], ...]] = {}
        self._num_steps = 0

    def record_step(self, step: SchedulerOutput) -> None:
        """Count a step that will run."""
        queries, lengths = step.num_scheduled_tokens, step.max_seq_lens
        is_prompt = queries > 1
        num_prompts, num_prompt_tokens = int(is_prompt.sum()), int(queries[is_prompt].sum())
        figures = (len(queries) - num_prompts, num_prompts, num_prompt_tokens, int(lengths.sum()))
        key = tuple(map(_round, figures))
        self._num_steps += 1
        if key not in self._examples:
            if len(self._examples) == _MAX_SHAPES:
                return
            self._examples[key] = tuple(zip(queries.tolist(), np.maximum(lengths, queries).tolist(), strict=True))
        self._counts[key] += 1

    def close(self) -> None:
        """Write the file."""
        shapes = [[count, self._examples[key]] for key, count in self._counts.most_common()]
        document = {"format": _FORMAT, "num_steps": self._num_steps, "shapes": shapes}
        try:
            self._path.write_text(json.dumps(document) + "\n", "utf-8")
        except OSError as error:
            _log.error("--capture-shapes %s: cannot be written: %s", self._path, error)


def _round(number: int) -> int:
    shift = max(0, number.bit_length() - 2)
    return number >> shift << shift
