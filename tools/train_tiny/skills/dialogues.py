"""Several turns: a change of topic, a follow-up on the last answer, something said earlier, long conversations."""

from __future__ import annotations

from random import Random

from tools.train_tiny.examples import Example, Generator, Message, in_training, single_turn
from tools.train_tiny.pools import CITIES, FIRST_NAMES, JOBS, WORDS
from tools.train_tiny.skills.arithmetic import addition, multiplication, subtraction
from tools.train_tiny.skills.code import code
from tools.train_tiny.skills.extraction import extraction
from tools.train_tiny.skills.facts import facts, small_talk
from tools.train_tiny.skills.wordplay import counting, letter_case, reversing, sequence, sorting

PLAIN: tuple[Generator, ...] = (
    addition, subtraction, multiplication, sorting, reversing, counting, letter_case, sequence, extraction, facts,
    code, small_talk,
)  # fmt: skip


def _history(rng: Random, turns: int) -> list[Message]:
    """Earlier turns, all of them instances that may be trained on."""
    messages: list[Message] = []
    while turns:
        example = rng.choice(PLAIN)(rng)
        if in_training(example):
            messages += [*example.messages, {"role": "assistant", "content": example.reply}]
            turns -= 1
    return messages


def _after(history: list[Message], example: Example, skill: str) -> Example:
    keys = [f"{skill}:{key}" for key in example.keys]
    return Example(
        skill,
        [*keys, *example.keys],
        [*history, *example.messages],
        example.reply,
        example.grader,
        example.answer,
        example.tools,
    )


def change_of_topic(rng: Random) -> Example:
    """Ask one to three other things first."""
    return _after(_history(rng, rng.randint(1, 3)), rng.choice(PLAIN[:-1])(rng), "dialogue")


def follow_up(rng: Random) -> Example:
    """Ask for the last answer again, changed."""
    words = rng.sample(WORDS, rng.randint(3, 5))
    ordered = ", ".join(sorted(words))
    first = rng.choice(("Sort these words: {w}", "Sort alphabetically: {w}")).format(w=", ".join(words))
    asks, answer = rng.choice((
        (("Now reverse that.", "Now in reverse order.", "And in reverse?"), ", ".join(sorted(words, reverse=True))),
        (("Now in upper case.", "Now write that in upper case.", "And in capitals?"), ordered.upper()),
        (("How many words is that?", "How many words are there?"), f"{len(words)} words"),
        (("Say that again.", "Please repeat that.", "Can you repeat it?"), ordered),
    ))  # fmt: skip
    history = [{"role": "user", "content": first}, {"role": "assistant", "content": ordered}]
    second = rng.choice(asks)
    last = single_turn("dialogue", f"{ordered}|{second}", second, answer, "exact", answer)
    last.messages = [*history, *last.messages]
    return last


def _introduction(rng: Random) -> tuple[str, str, str, str]:
    """Draw something to remember: (said, acknowledged, asked later, answered)."""
    kind = rng.randrange(4)
    if kind == 0:
        name = rng.choice(FIRST_NAMES)
        said = rng.choice(("My name is {x}.", "Hi, I am {x}.", "Hello, my name is {x}.")).format(x=name)
        return (
            said,
            f"Nice to meet you, {name}!",
            rng.choice(("What is my name?", "Do you remember my name?", "Who am I?")),
            f"Your name is {name}.",
        )
    if kind == 1:
        city = rng.choice(CITIES)
        said = rng.choice(("I live in {x}.", "My home is in {x}.")).format(x=city)
        return (
            said,
            f"I will remember that you live in {city}.",
            rng.choice(("Where do I live?", "In which city do I live?")),
            f"You live in {city}.",
        )
    if kind == 2:
        job = rng.choice(JOBS)
        return (
            f"I work as a {job}.",
            f"I will remember that you work as a {job}.",
            rng.choice(("What is my job?", "What do I do for work?")),
            f"You work as a {job}.",
        )
    number = rng.randint(1000, 9999)
    said = rng.choice(("Remember the number {x}.", "Please remember the code {x}.", "My number is {x}.")).format(
        x=number
    )
    return (
        said,
        f"I will remember {number}.",
        rng.choice(("Which number did I tell you?", "What was the number?")),
        f"The number is {number}.",
    )


def remember(rng: Random, turns: int | None = None, skill: str = "dialogue") -> Example:
    """Say something, talk of other things, then ask for it."""
    said, noted, asked, answer = _introduction(rng)
    history = [{"role": "user", "content": said}, {"role": "assistant", "content": noted}]
    history += _history(rng, rng.randint(0, 2) if turns is None else turns)
    last = single_turn(skill, f"{said}|{asked}|{history[-2]['content']}", asked, answer, "exact", answer)
    last.messages = [*history, *last.messages]
    return last


def dialogue(rng: Random) -> Example:
    """Draw one of the short multi-turn kinds."""
    return rng.choice((change_of_topic, change_of_topic, follow_up, remember))(rng)


def _register(rng: Random) -> Example:
    """Look one entry up in a long list."""
    names = rng.sample(
        [f"{first} {word}" for first in FIRST_NAMES for word in rng.sample(WORDS, 3)], rng.randint(20, 130)
    )
    codes = {name: rng.randint(100, 999) for name in names}
    wanted = rng.choice(names)
    listing = "\n".join(f"{name}: {number}" for name, number in codes.items())
    question = rng.choice(("Which number belongs to {x}?", "What is the number of {x}?", "Look up {x}.")).format(
        x=wanted
    )
    text = f"Here is a list.\n{listing}\n\n{question}" if rng.random() < 0.7 else f"{question}\n\n{listing}"
    return single_turn(
        "long_context",
        f"{wanted}|{codes[wanted]}|{len(names)}",
        text,
        f"{wanted}: {codes[wanted]}",
        "number",
        codes[wanted],
    )


def long_context(rng: Random) -> Example:
    """Fill much of the context before the question."""
    kind = rng.random()
    if kind < 0.5:
        return _register(rng)
    if kind < 0.75:
        return remember(rng, rng.randint(8, 36), "long_context")
    return _after(_history(rng, rng.randint(8, 36)), rng.choice(PLAIN[:-1])(rng), "long_context")
