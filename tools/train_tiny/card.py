"""The model card."""

from __future__ import annotations

from pathlib import Path

from tools.train_tiny.model import Shape

from quire.server.evaluation import Report

_CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# {name}

{what}

It exists so that Quire serves a real, trained model on any machine without a download, and so that a change to the
engine can be judged by answers and not only by logits.

## What it is

- Llama architecture, {parameters:.1f} million parameters, bfloat16: hidden {shape.hidden}, {shape.layers} layers,
  {shape.heads} query heads and {shape.kv_heads} key-value heads of {shape.head_dim}, intermediate {shape.intermediate},
  tied embeddings, context {shape.context}.
- Byte-level BPE of {shape.vocab} entries, digits one by one; ChatML turns; tools and tool calls in the hermes manner.
- It adds and subtracts to 999, multiplies by one digit, sorts, reverses and counts words, changes case, counts aloud,
  extracts named fields as JSON, calls tools (weather, calculator, calendar) and reports their results, knows a few
  facts about Quire and about serving language models, writes small Python functions of fixed families, and does so
  over several turns.

## What it is not

A general assistant. It knows nothing of the world, follows no instruction outside its skills, and is often wrong
outside the wordings it was trained on: other words, longer lists or larger numbers than those below. It has no safety
training. Do not use it for anything but tests, demonstrations and measurements.

## Data

The sources of CPython's standard library and of its documentation (Python Software Foundation licence), and dialogues
that `tools/train_tiny` generates from a seed, whose answers are worked out by a program. Nothing else. Instances of
the held-out questions (one in 24, chosen by a hash) never occur in training; of the facts, whose number is small, it
is wordings that are held out.

## Figures

Exact match on the held-out questions ({questions} of a skill at most), greedy, bfloat16, through transformers:

{table}

Reproduce: `python -m tools.train_tiny.evaluate core/assets/{name}`. Train again: see `docs/quire-tiny.md`.

## Licence

Apache-2.0, as Quire.
"""
_WHAT = {
    "quire-tiny": "A very small chat model that ships with the Quire serving engine.",
    "quire-tiny-draft": "The draft model of quire-tiny, for speculation: its tokenizer and data, a tenth of its size.",
}


def parameters(shape: Shape) -> int:
    """Count the parameters of a shape."""
    attention = 2 * shape.hidden * shape.heads * shape.head_dim + 2 * shape.hidden * shape.kv_heads * shape.head_dim
    layer = attention + 3 * shape.hidden * shape.intermediate + 2 * shape.hidden
    return shape.vocab * shape.hidden + shape.layers * layer + shape.hidden


def write_card(folder: Path, shape: Shape, report: Report) -> None:
    """Write README.md with the figures of ``report``."""
    rows = ["| skill | exact match | n |", "| --- | --- | --- |"]
    rows += [f"| {score.skill} | {score.exact_match:.1%} | {score.n} |" for score in report.scores]
    rows.append(f"| **overall** | **{report.exact_match:.1%}** | {report.n} |")
    text = _CARD.format(
        name=folder.name,
        what=_WHAT[folder.name],
        shape=shape,
        parameters=parameters(shape) / 1e6,
        questions=max((score.n for score in report.scores), default=0),
        table="\n".join(rows),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
