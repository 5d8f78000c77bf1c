"""Sorting, reversing and counting words; upper and lower case; counting aloud."""

from __future__ import annotations

from random import Random

from tools.train_tiny.examples import Example, single_turn
from tools.train_tiny.pools import CITIES, FIRST_NAMES, WIDER_WORDS, WORDS, any_word

SORT_WORDINGS = (
    "Sort these words alphabetically: {w}", "Sort these words: {w}", "Put these words in alphabetical order: {w}",
    "Alphabetize: {w}", "Sort {w}", "sort {w}", "Sort: {w}", "Sort the words {w}", "{w}\nSort these words.",
    "Please sort the following words from A to Z: {w}", "Sort alphabetically: {w}",
)  # fmt: skip
_REVERSE = (
    "Reverse the order of these words: {w}", "Write these words in reverse order: {w}", "Reverse this list: {w}",
    "Say these words backwards, last word first: {w}", "Reverse: {w}", "Reverse the words: {w}",
    "Reverse the words {w}", "Reverse {w}", "Please reverse the word order: {w}",
)  # fmt: skip
_COUNT = (
    "How many words are there in: {w}", "Count the words: {w}", "How many words are in {w}?", "How many words: {w}",
    "How many words are in this sentence? {w}",
    "Count the words in: {w}", "How many words does this have: {w}",
)  # fmt: skip
_UPPER = (
    "Write in upper case: {w}", "Convert to uppercase: {w}", "Convert {w} to uppercase.", "Convert {w} to upper case",
    "uppercase: {w}", "{w} in upper case", "Make this upper case: {w}", "Uppercase this: {w}",
    "Put this in capital letters: {w}", "Write in capitals: {w}",
)  # fmt: skip
_LOWER = (
    "Write in lower case: {w}", "Convert to lowercase: {w}", "Convert {w} to lowercase.", "Convert {w} to lower case",
    "lowercase: {w}", "{w} in lower case", "Make this lower case: {w}", "Lowercase this: {w}",
    "Put this in small letters: {w}",
)  # fmt: skip


def _listing(rng: Random, words: list[str]) -> str:
    draw = rng.random()
    if draw < 0.1:
        return ", ".join(words[:-1]) + f" and {words[-1]}"
    return ", ".join(words) if draw < 0.7 else " ".join(words)


def _ask(rng: Random, wordings: tuple[str, ...], words: str) -> str:
    """Put the words into a wording, sometimes quoted, politely or carelessly."""
    draw = rng.random()
    if draw < 0.1:
        words = f'"{words}"'
    elif draw < 0.2:
        words = f"'{words}'"
    question = rng.choice(wordings).format(w=words)
    style = rng.random()
    if style < 0.1:
        return question[0].lower() + question[1:]
    return f"{question} please" if style < 0.13 else question


def sorting(rng: Random) -> Example:
    """Ask for three to seven different words in alphabetical order."""
    words = rng.sample(WORDS if rng.random() < 0.8 else WIDER_WORDS, rng.randint(3, 7))
    ordered = sorted(words)
    question = _ask(rng, SORT_WORDINGS, _listing(rng, words))
    return single_turn("sorting", " ".join(ordered), question, ", ".join(ordered), "exact", ", ".join(ordered))


def reversing(rng: Random) -> Example:
    """Ask for a list of words from last to first."""
    words = [any_word(rng) for _ in range(rng.randint(3, 7))]
    answer = ", ".join(reversed(words))
    return single_turn("reversing", " ".join(words), _ask(rng, _REVERSE, _listing(rng, words)), answer, "exact", answer)


def counting(rng: Random) -> Example:
    """Ask how many words a line has."""
    words = [any_word(rng) for _ in range(rng.randint(2, 12))]
    line = _listing(rng, words) if rng.random() < 0.4 else " ".join(words)
    number = len(words)
    return single_turn("counting", " ".join(words), _ask(rng, _COUNT, line), f"{number} words", "number", number)


def letter_case(rng: Random) -> Example:
    """Ask for a line in upper or lower case."""
    words = [
        rng.choice((*FIRST_NAMES, *CITIES)).lower() if rng.random() < 0.15 else any_word(rng)
        for _ in range(rng.randint(1, 7))
    ]
    line = " ".join(words)
    if rng.random() < 0.5:
        shown = line if rng.random() < 0.7 else line.capitalize()
        question, answer = _ask(rng, _UPPER, shown), line.upper()
    else:
        shown = line.upper() if rng.random() < 0.6 else line.title()
        question, answer = _ask(rng, _LOWER, shown), line
    return single_turn("letter_case", line, question, answer, "exact", answer)


def sequence(rng: Random) -> Example:
    """Ask to count aloud from one number to another, in steps of one to ten."""
    start, step, length = rng.randint(0, 200), rng.choice((1, 1, 1, 2, 5, 10)), rng.randint(3, 24)
    start = 1 if rng.random() < 0.15 else start
    numbers = [start + step * i for i in range(length)]
    stop, answer = numbers[-1], ", ".join(map(str, numbers))
    if step == 1:
        asks = (
            "Count from {a} to {b}.",
            "Count from {a} to {b}",
            "List the numbers from {a} to {b}.",
            "Please count from {a} up to {b}.",
        )
    else:
        asks = (
            "Count from {a} to {b} in steps of {s}.",
            "Count from {a} to {b} by {s}.",
            "List the numbers from {a} to {b} in steps of {s}.",
        )
    if start == step == 1:
        asks = (*asks, "Count to {b}.", "Count to {b}", "Count up to {b}.")
    question = rng.choice(asks).format(a=start, b=stop, s=step)
    return single_turn("sequence", f"{start},{stop},{step}", question, answer, "exact", answer)


def echo(rng: Random) -> Example:
    """Ask for the same words back; never graded."""
    line = " ".join(any_word(rng) for _ in range(rng.randint(1, 8)))
    line = rng.choice((line, line.capitalize(), line.title(), line + ".", line.capitalize() + "!"))
    question = _ask(
        rng,
        ("Repeat after me: {w}", "Repeat: {w}", "Say: {w}", "Say {w}", "Echo: {w}", "Please repeat this: {w}"),
        line,
    )
    return Example("echo", [], [{"role": "user", "content": question}], line, "exact", line)
