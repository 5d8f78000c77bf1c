"""Steps of one's own traffic, as ``--capture-shapes FILE`` wrote them, as cases of attention."""

from __future__ import annotations

import json
from pathlib import Path

from quire.core.errors import ConfigError
from quire.core.traces.step_shapes import StepShapes
from quire.server.plugin_bench.attention_bench import StepShape
from quire.server.plugin_bench.cases import BenchCase

__all__ = ["read_shape_cases"]

MAX_CASES = 8


def read_shape_cases(file: str) -> list[BenchCase]:
    """The steps that came most often, with their share of the steps. Raises ``ConfigError`` for another file."""
    try:
        shapes = StepShapes.from_dict(json.loads(Path(file).read_text("utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--shapes {file} is no file of shapes ({error!r}); write one: quire serve --capture-shapes FILE"
        ) from None
    cases = []
    for step in shapes.list_most_common(MAX_CASES):
        pairs = sorted(step.requests, key=lambda pair: pair[0] != 1)
        shape = StepShape(tuple(query for query, _ in pairs), tuple(length for _, length in pairs))
        decodes = sum(query == 1 for query in shape.query_lens)
        prompts = [query for query in shape.query_lens if query > 1]
        mean = sum(shape.seq_lens) // len(shape.seq_lens)
        name = f"{decodes} decodes" + (f" + {sum(prompts)} tokens of {len(prompts)} prompts" if prompts else "")
        cases.append(BenchCase(f"{name}, {mean} tokens each, {step.share:.0%} of steps", shape, step.share))
    if not cases:
        raise ConfigError(f"--shapes {file} has no steps; send requests to the server that captures them")
    return cases
