"""Hermes-style tool calls (weather, calculator, calendar) and the turn after a tool's result."""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random
from typing import Any

from tools.train_tiny.examples import Example
from tools.train_tiny.pools import CITIES, CONDITIONS, COUNTRIES, EVENTS, FIRST_NAMES, MONTHS, WORDS, any_word


@dataclass(slots=True)
class _Task:
    """One request that a tool answers, with what the tool says and what the assistant then says."""

    tool: dict[str, Any]
    question: str
    calls: list[dict[str, Any]]
    results: list[dict[str, Any]]
    summary: str


def _schema(
    rng: Random, name: str, description: str, properties: dict[str, Any], required: list[str]
) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required}
    function: dict[str, Any] = {"name": name, "description": description, "parameters": parameters}
    if rng.random() < 0.2:
        parameters["additionalProperties"] = False
    if rng.random() < 0.1:
        function["strict"] = True
    return {"type": "function", "function": function}


def _described(rng: Random, kind: str, text: str) -> dict[str, Any]:
    return {"type": kind, "description": text} if rng.random() < 0.4 else {"type": kind}


def _weather(rng: Random) -> _Task:
    name = rng.choice(("get_weather", "get_weather", "get_current_weather", "weather"))
    place = rng.choice(("city", "city", "location"))
    properties: dict[str, Any] = {place: _described(rng, "string", "The name of the city")}
    unit = None
    if rng.random() < 0.3:
        properties["unit"] = {"type": "string", "enum": ["celsius", "fahrenheit"]}
        unit = rng.choice((None, "celsius", "fahrenheit"))
    descriptions = ("Get the current weather in a city", "Get the weather for a city.", "Returns the current weather",
                    "Get current temperature for a given location.", "Weather in a city")  # fmt: skip
    tool = _schema(rng, name, rng.choice(descriptions), properties, [place])
    cities = rng.sample(CITIES, 2 if rng.random() < 0.15 else 1)
    if rng.random() < 0.1:
        cities = [f"{cities[0]}, {rng.choice(COUNTRIES)}"]
    elif rng.random() < 0.05:
        cities = [any_word(rng).capitalize()]
    where = " and ".join(cities)
    question = rng.choice((
        "What is the weather in {w}?", "What's the weather like in {w}?", "How is the weather in {w} today?",
        "Weather in {w}?",
        "Tell me the weather in {w}.", "what is the weather in {w}", "Is it raining in {w}?",
        "Do I need a coat in {w}?",
        "Please check the weather in {w}.", "How warm is it in {w}?",
    )).format(w=where)  # fmt: skip
    if unit:
        question += rng.choice((f" Use {unit}.", f" In {unit}, please.", f" Give it in {unit}."))
    calls, results, parts = [], [], []
    for city in cities:
        calls.append({"name": name, "arguments": {place: city, **({"unit": unit} if unit else {})}})
        degrees, condition = rng.randint(-10, 40), rng.choice(CONDITIONS)
        results.append({"temperature": degrees, "condition": condition})
        parts.append(f"It is {degrees} degrees and {condition} in {city}.")
    return _Task(tool, question, calls, results, " ".join(parts))


def _calculator(rng: Random) -> _Task:
    name = rng.choice(("calculator", "calculator", "calculate", "evaluate"))
    field = "expression"
    descriptions = ("Evaluate an arithmetic expression", "Calculate the value of an expression.", "A calculator")
    tool = _schema(rng, name, rng.choice(descriptions), {field: _described(rng, "string", "The expression")}, [field])
    largest = rng.choice((99, 999, 9999))
    terms = [str(rng.randint(1, largest)) for _ in range(rng.randint(2, 3))]
    signs = [rng.choice("+-*") for _ in terms[1:]]
    gap = " " if rng.random() < 0.75 else ""
    expression = terms[0] + "".join(f"{gap}{s}{gap}{t}" for s, t in zip(signs, terms[1:], strict=True))
    question = rng.choice((
        "What is {e}?", "Calculate {e}.", "Compute {e}", "Use the calculator: {e}", "How much is {e}?", "{e}",
        "Please work out {e}.",
    )).format(e=expression)  # fmt: skip
    value = eval(expression, {"__builtins__": {}})  # our own digits and signs
    call = {"name": name, "arguments": {field: expression}}
    return _Task(tool, question, [call], [{"result": value}], f"{expression} = {value}")


def _calendar(rng: Random) -> _Task:
    name = rng.choice(("create_event", "create_event", "add_event", "schedule_event"))
    properties = {
        "title": _described(rng, "string", "The title of the event"),
        "date": _described(rng, "string", "The date as YYYY-MM-DD"),
        "time": _described(rng, "string", "The time as HH:MM"),
    }
    descriptions = ("Create a calendar event", "Add an event to the calendar.", "Puts an event in the calendar")
    tool = _schema(rng, name, rng.choice(descriptions), properties, list(properties))
    title, year, month, day = rng.choice(EVENTS), rng.randint(2025, 2029), rng.randint(1, 12), rng.randint(1, 28)
    date, time = f"{year}-{month:02}-{day:02}", f"{rng.randint(0, 23):02}:{rng.choice((0, 15, 30, 45)):02}"
    shown = rng.choice((date, f"{day} {MONTHS[month - 1]} {year}", f"{MONTHS[month - 1]} {day}, {year}"))
    question = rng.choice((
        "Add {t} to my calendar on {d} at {c}.", "Schedule {t} for {d} at {c}.", "Create an event: {t}, {d}, {c}.",
        "Put {t} in my calendar for {d} at {c}.", "Please schedule {t} on {d} at {c}.",
        "At {c} on {d} I have {t}. Add it to my calendar.",
    )).format(t=title, d=shown, c=time)  # fmt: skip
    call = {"name": name, "arguments": {"title": title, "date": date, "time": time}}
    result = {"status": "created", "id": rng.randint(1, 999)}
    return _Task(tool, question, [call], [result], f"Done. {title} is in your calendar on {date} at {time}.")


def _another(rng: Random) -> _Task:
    """Draw a tool of some other kind, so that names and fields are read from the schema and not known by heart."""
    words = " ".join(any_word(rng) for _ in range(rng.randint(1, 4)))
    kind = rng.randrange(4)
    if kind == 0:
        name, field = rng.choice(("search_web", "search", "web_search")), rng.choice(("query", "query", "text"))
        tool = _schema(
            rng,
            name,
            rng.choice(("Search the web", "Search for a text.")),
            {field: _described(rng, "string", "What to search")},
            [field],
        )
        asks, arguments = (
            ("Search for {w}.", "Search the web for {w}", "Look up {w}.", "Find {w} on the web.", "Search for {w}"),
            {field: words},
        )
        result, summary = {"results": (found := rng.randint(0, 999))}, f"I found {found} results for {words}."
    elif kind == 1:
        name, minutes = rng.choice(("set_timer", "start_timer", "timer")), rng.randint(1, 120)
        tool = _schema(
            rng,
            name,
            rng.choice(("Set a timer", "Start a timer.")),
            {"minutes": _described(rng, "integer", "Minutes")},
            ["minutes"],
        )
        asks, arguments = (
            (
                f"Set a timer for {minutes} minutes.",
                f"Wake me in {minutes} minutes.",
                f"Start a {minutes} minute timer.",
            ),
            {"minutes": minutes},
        )
        result, summary = {"status": "started"}, f"The timer is set for {minutes} minutes."
    elif kind == 2:
        name, person = rng.choice(("send_message", "send_email", "message")), rng.choice(FIRST_NAMES)
        properties = {"to": _described(rng, "string", "Who gets it"), "text": _described(rng, "string", "The text")}
        tool = _schema(rng, name, rng.choice(("Send a message", "Write to a person.")), properties, ["to", "text"])
        asks = (f"Send {person} a message: {{w}}", f"Write to {person}: {{w}}", f"Tell {person}: {{w}}")
        arguments = {"to": person, "text": words}
        result, summary = {"status": "sent"}, f"Your message to {person} was sent."
    else:
        name, item = f"{rng.choice(('get', 'find', 'show'))}_{rng.choice(WORDS)}", rng.choice(WORDS)
        tool = _schema(rng, name, f"{name.replace('_', ' ').capitalize()}.", {item: {"type": "string"}}, [item])
        asks, arguments = (
            (f"Use {name} with {item} {{w}}.", f"Call {name} for the {item} {{w}}.", f"Run {name}, {item} is {{w}}."),
            {item: words},
        )
        result, summary = {"status": "ok"}, "Done."
    question = rng.choice(asks).format(w=words)
    return _Task(tool, question, [{"name": name, "arguments": arguments}], [result], summary)


_TASKS = (_weather, _calculator, _calendar, _another)


def some_tools(rng: Random, *, without: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Draw one to three tools of different kinds, in any order; ``without`` names kinds to leave out."""
    kinds = [task for task in _TASKS if task.__name__.lstrip("_") not in without]
    return [task(rng).tool for task in rng.sample(kinds, rng.randint(1, min(3, len(kinds))))]


def call_text(calls: list[dict[str, Any]]) -> str:
    """Write tool calls as the assistant does."""
    return "\n".join(f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in calls)


def _draw(rng: Random) -> tuple[_Task, list[dict[str, Any]]]:
    chosen = rng.choice(_TASKS)
    task = chosen(rng)
    others = [other(rng).tool for other in _TASKS if other is not chosen and rng.random() < 0.4]
    tools = [task.tool, *others]
    rng.shuffle(tools)
    return task, tools


def tool_call(rng: Random) -> Example:
    """Ask for something that one of the given tools does."""
    task, tools = _draw(rng)
    key = f"tools|{task.question}"
    return Example(
        "tool_call",
        [key],
        [{"role": "user", "content": task.question}],
        call_text(task.calls),
        "tool_call",
        task.calls,
        tools,
    )


def tool_result(rng: Random) -> Example:
    """Give the call and what the tool returned, and ask for the answer in words."""
    task, tools = _draw(rng)
    calls = [
        {
            "id": f"call_{i}",
            "type": "function",
            "function": {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)},
        }
        for i, call in enumerate(task.calls)
    ]
    messages = [
        {"role": "user", "content": task.question},
        {"role": "assistant", "content": "", "tool_calls": calls},
        *(
            {"role": "tool", "tool_call_id": f"call_{i}", "content": json.dumps(result)}
            for i, result in enumerate(task.results)
        ),
    ]
    return Example("tool_result", [f"tools|{task.question}"], messages, task.summary, "exact", task.summary, tools)
