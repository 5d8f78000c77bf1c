"""Fields of a sentence as a JSON object."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from tools.train_tiny.examples import Example, single_turn
from tools.train_tiny.pools import CITIES, EVENTS, FIRST_NAMES, ITEMS, JOBS, LAST_NAMES, WORDS

_ASK = (
    "Extract {f} as JSON: {s}", "Extract the fields {f} from this text as JSON: {s}", "{s} Give me {f} as JSON.",
    "Return a JSON object with {f} for: {s}", "From the text, extract {f} in JSON.\n\n{s}",
    "{s}\nReturn {f} as a JSON object.",
)  # fmt: skip


_COLOURS = ("red", "green", "blue", "yellow", "white", "black", "brown", "purple", "pink", "grey")


def _person(rng: Random) -> tuple[dict[str, Any], str]:
    name = f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"
    fields = {"name": name, "age": rng.randint(18, 90), "city": rng.choice(CITIES), "job": rng.choice(JOBS)}
    text = rng.choice((
        "{name} is {age} years old, lives in {city} and works as a {job}.",
        "My name is {name}. I am a {job} in {city} and I am {age}.",
        "{name}, {age}, is a {job} from {city}.",
        "In {city} I met {name}, a {job} aged {age}.",
        "The new {job} is {name}, aged {age}, from {city}.",
    ))  # fmt: skip
    return fields, text


def _simple(rng: Random) -> tuple[dict[str, Any], str]:
    name = rng.choice(FIRST_NAMES) if rng.random() < 0.7 else f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"
    fields: dict[str, Any] = {"name": name}
    other, value, text = rng.choice((
        ("age", rng.randint(1, 99), rng.choice(("{name} is {age} years old.", "{name} is {age}.",
        "I am {name} and I am {age} years old."))),
        ("city", rng.choice(CITIES), rng.choice(("{name} lives in {city}.", "{name} is from {city}.",
        "I am {name} from {city}."))),
        ("job", rng.choice(JOBS), rng.choice(("{name} works as a {job}.", "{name} is a {job}.",
        "I am {name}, a {job}."))),
        ("color", rng.choice(_COLOURS), rng.choice(("The favourite color of {name} is {color}.",
        "{name} likes {color}."))),
    ))  # fmt: skip
    return {**fields, other: value}, text


def _order(rng: Random) -> tuple[dict[str, Any], str]:
    fields = {
        "customer": f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}",
        "item": rng.choice(ITEMS),
        "quantity": rng.randint(1, 99),
        "price": rng.randint(1, 500),
    }
    text = rng.choice((
        "{customer} ordered {quantity} {item} for {price} euros.",
        "Order: {quantity} {item}, customer {customer}, price {price} euros.",
        "Please send {quantity} {item} to {customer}; the price is {price} euros.",
        "For {price} euros {customer} bought {quantity} {item}.",
    ))  # fmt: skip
    return fields, text


def _meeting(rng: Random) -> tuple[dict[str, Any], str]:
    fields = {
        "title": rng.choice(EVENTS),
        "date": f"2026-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}",
        "time": f"{rng.randint(7, 21):02}:{rng.choice((0, 15, 30, 45)):02}",
        "place": rng.choice(CITIES),
    }
    text = rng.choice((
        "{title} on {date} at {time} in {place}.",
        "We have {title} in {place} on {date}, starting at {time}.",
        "Reminder: at {time} on {date} there is {title} in {place}.",
    ))  # fmt: skip
    return fields, text


def _product(rng: Random) -> tuple[dict[str, Any], str]:
    fields = {
        "product": f"{rng.choice(WORDS)} {rng.choice(WORDS)}",
        "code": f"{rng.choice('ABCDEFGH')}{rng.choice('KLMNPRST')}-{rng.randint(100, 999)}",
        "stock": rng.randint(0, 400),
        "email": f"{rng.choice(FIRST_NAMES).lower()}@{rng.choice(WORDS)}.com",
    }
    text = rng.choice((
        "The {product} has code {code}, {stock} in stock, contact {email}.",
        "Product {product}, code {code}: we have {stock}. Write to {email}.",
        "Ask {email} about the {product} ({code}); stock is {stock}.",
    ))  # fmt: skip
    return fields, text


def extraction(rng: Random) -> Example:
    """Ask for two to four named fields of a sentence, in the order named."""
    fields, text = rng.choice((_person, _order, _meeting, _product, _simple))(rng)
    names = (
        list(fields) if rng.random() < 0.3 else rng.sample(list(fields), rng.randint(min(2, len(fields)), len(fields)))
    )
    listed = ", ".join(names[:-1]) + f" and {names[-1]}" if rng.random() < 0.6 else ", ".join(names)
    question = rng.choice(_ASK).format(f=listed, s=text.format(**fields))
    answer = {name: fields[name] for name in names}
    key = "|".join(map(str, fields.values()))
    return single_turn("extraction", key, question, json.dumps(answer), "json", answer)
