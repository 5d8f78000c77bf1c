"""What the agents of all clients do, in wordings that quire-tiny was trained on."""

from __future__ import annotations

import json

from pydantic import BaseModel

QUESTION = "What is the weather in Paris?"
ANSWER = "It is 17 degrees and cloudy in Paris."
"""What quire-tiny says once it has the tool's result, and cannot say without."""

FUNCTION = {
    "name": "get_weather",
    "description": "Get the weather for a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
TOOL = {"type": "function", "function": FUNCTION}

EXTRACT = "Extract name and age as JSON: Anna is 31 years old."


class Person(BaseModel):
    name: str
    age: int


ANNA = Person(name="Anna", age=31)


def get_weather(city: str) -> str:
    """Get the weather for a city."""
    assert city == "Paris"
    return json.dumps({"temperature": 17, "condition": "cloudy"})
