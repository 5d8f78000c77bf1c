"""One dialogue whose answer a program can check, and the rule that keeps held-out instances out of training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

Message = dict[str, Any]

#: One instance in this many is held out of training, whatever the seed.
HELD_OUT_ONE_IN = 24


@dataclass(slots=True)
class Example:
    """A dialogue that ends with the turn to answer.

    ``reply`` is the text the model should write. ``answer`` is what the grader named ``grader`` needs to judge any
    other reply. ``keys`` identify the instances asked about (one per answered turn): they decide on which side of the
    split it falls.
    """

    skill: str
    keys: list[str]
    messages: list[Message]
    reply: str
    grader: str
    answer: Any
    tools: list[dict[str, Any]] = field(default_factory=list)


Generator = Callable[[Random], Example]


def is_held_out(key: str) -> bool:
    """Say whether the instance named ``key`` belongs to the held-out set; a pure function of the key."""
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def in_training(example: Example) -> bool:
    """Say whether an example may be trained on: none of its instances is held out."""
    return not any(is_held_out(key) for key in example.keys)


def single_turn(skill: str, key: str, question: str, reply: str, grader: str, answer: Any) -> Example:
    """Build the common case: one user turn."""
    return Example(skill, [f"{skill}|{key}"], [{"role": "user", "content": question}], reply, grader, answer)
