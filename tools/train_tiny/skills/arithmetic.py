"""Addition and subtraction to 999, multiplication by one digit."""

from __future__ import annotations

from random import Random

from tools.train_tiny.examples import Example, single_turn
from tools.train_tiny.pools import FIRST_NAMES, ITEMS

_ASK = (
    "What is {e}?", "what is {e}?", "Calculate {e}.", "Compute {e}", "{e} = ?", "{e}", "How much is {e}?",
    "Please work out {e}.",
    "What's {e}?", "Can you tell me what {e} is?", "{e}=", "Work out {e}.", "Solve: {e}",
)  # fmt: skip
_SPELLINGS = {
    "+": ("{a} + {b}", "{a}+{b}", "{a} plus {b}", "{a} + {b}"),
    "-": ("{a} - {b}", "{a}-{b}", "{a} minus {b}", "{a} - {b}"),
    "*": ("{a} * {b}", "{a}*{b}", "{a} times {b}", "{a} x {b}", "{a} × {b}", "{a} multiplied by {b}"),
}
_STORIES = {
    "+": (
        "{name} has {a} {item} and buys {b} more. How many {item} does {name} have now?",
        "There are {a} {item} in one box and {b} in another. How many {item} are there in all?",
        "Add {a} and {b}.",
        "What is the sum of {a} and {b}?",
    ),
    "-": (
        "{name} has {a} {item} and gives away {b}. How many {item} are left?",
        "A shop had {a} {item} and sold {b}. How many {item} remain?",
        "Subtract {b} from {a}.",
        "What is the difference between {a} and {b}?",
    ),
    "*": (
        "{name} buys {b} boxes of {a} {item} each. How many {item} is that?",
        "Multiply {a} by {b}.",
        "What is the product of {a} and {b}?",
    ),
}


def _operand(rng: Random) -> int:
    return rng.randint(0, 999) if rng.random() < 0.7 else rng.randint(0, 99)


def _example(rng: Random, skill: str, sign: str, a: int, b: int, result: int) -> Example:
    if rng.random() < 0.7 or result < 0:
        question = rng.choice(_ASK).format(e=rng.choice(_SPELLINGS[sign]).format(a=a, b=b))
    else:
        question = rng.choice(_STORIES[sign]).format(a=a, b=b, name=rng.choice(FIRST_NAMES), item=rng.choice(ITEMS))
    reply = f"{a} {sign} {b} = {result}"
    if rng.random() < 0.08:
        question += rng.choice(
            (" Answer with just the number.", " Just the number, please.", " Answer with the number only.")
        )
        reply = str(result)
    key = f"{min(a, b)},{max(a, b)}"
    return single_turn(skill, key, question, reply, "number", result)


def addition(rng: Random) -> Example:
    """Ask for the sum of two numbers to 999."""
    a, b = _operand(rng), _operand(rng)
    return _example(rng, "addition", "+", a, b, a + b)


def subtraction(rng: Random) -> Example:
    """Ask for a difference, seldom a negative one."""
    a, b = _operand(rng), _operand(rng)
    if a < b and rng.random() < 0.85:
        a, b = b, a
    return _example(rng, "subtraction", "-", a, b, a - b)


def multiplication(rng: Random) -> Example:
    """Ask for a number to 999 times one digit."""
    a, b = _operand(rng), rng.randint(0, 9)
    return _example(rng, "multiplication", "*", a, b, a * b)
