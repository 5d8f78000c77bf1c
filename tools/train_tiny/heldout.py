"""Writes the held-out set: one JSON-lines file a skill, the same for every seed of training."""

from __future__ import annotations

import json
from pathlib import Path

from tools.train_tiny.mixture import SKILLS, held_out_examples

PER_SKILL = 64


def write_held_out(folder: Path, per_skill: int = PER_SKILL) -> None:
    """Write ``<skill>.jsonl`` for every graded skill."""
    folder.mkdir(parents=True, exist_ok=True)
    for skill in SKILLS:
        lines = []
        for number, example in enumerate(held_out_examples(skill, per_skill)):
            record = {
                "id": f"{skill}-{number:03}",
                "messages": example.messages,
                **({"tools": example.tools} if example.tools else {}),
                "grader": example.grader,
                "answer": example.answer,
                "keys": example.keys,
            }
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        (folder / f"{skill}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write_held_out(Path("core/assets/eval"))
