"""Which dialogues, how many of each, under which system prompt."""

from __future__ import annotations

from random import Random

from tools.train_tiny.examples import Example, Generator, in_training, is_held_out
from tools.train_tiny.pools import SYSTEM_PROMPTS
from tools.train_tiny.skills.arithmetic import addition, multiplication, subtraction
from tools.train_tiny.skills.code import code
from tools.train_tiny.skills.dialogues import PLAIN, dialogue, long_context
from tools.train_tiny.skills.extraction import extraction
from tools.train_tiny.skills.facts import facts, small_talk
from tools.train_tiny.skills.tool_use import some_tools, tool_call, tool_result
from tools.train_tiny.skills.wordplay import counting, echo, letter_case, reversing, sequence, sorting

#: The graded skills, in the order of the report.
SKILLS: dict[str, Generator] = {
    "addition": addition,
    "subtraction": subtraction,
    "multiplication": multiplication,
    "sorting": sorting,
    "reversing": reversing,
    "counting": counting,
    "letter_case": letter_case,
    "sequence": sequence,
    "extraction": extraction,
    "tool_call": tool_call,
    "tool_result": tool_result,
    "facts": facts,
    "code": code,
    "dialogue": dialogue,
    "long_context": long_context,
}


#: Characters of a held-out dialogue: about 1,700 tokens, so that prompt and answer fit a context of 2,048.
_LONGEST = 6000


def tools_not_needed(rng: Random) -> Example:
    """Offer tools that do not help: the answer is given directly."""
    example = rng.choice(PLAIN)(rng)
    example.tools = some_tools(rng, without=("calculator",))
    return example


_SHORT: tuple[tuple[Generator, float], ...] = (
    (addition, 9), (subtraction, 12), (multiplication, 9), (sorting, 15), (echo, 2), (reversing, 6), (counting, 7),
    (letter_case, 8), (sequence, 4),
    (extraction, 8), (tool_call, 10), (tool_result, 5), (facts, 5), (code, 6), (small_talk, 3), (dialogue, 10),
    (tools_not_needed, 2),
)  # fmt: skip


def with_system(rng: Random, example: Example) -> Example:
    """Put a system prompt before the dialogue, the usual one or another, or none."""
    draw = rng.random()
    if draw < 0.5:
        prompt = SYSTEM_PROMPTS[0] if draw < 0.3 else rng.choice(SYSTEM_PROMPTS)
        example.messages = [{"role": "system", "content": prompt}, *example.messages]
    return example


def training_example(rng: Random, *, long: bool = False) -> Example:
    """Draw one dialogue for training; none of its instances is held out."""
    generators, weights = zip(*_SHORT, strict=True)
    while True:
        example = long_context(rng) if long else rng.choices(generators, weights)[0](rng)
        if in_training(example):
            return with_system(rng, example)


def held_out_examples(skill: str, count: int, seed: int = 2026) -> list[Example]:
    """Draw the held-out set of one skill: different instances, all of them on the far side of the split."""
    rng, seen, found = Random(f"{seed}:{skill}"), set(), []
    while len(found) < count:
        example = SKILLS[skill](rng)
        if not example.keys:
            continue
        key = example.keys[0]
        length = sum(len(message["content"]) for message in example.messages)
        if key not in seen and is_held_out(key) and length <= _LONGEST:
            seen.add(key)
            found.append(with_system(rng, example))
    return found
