"""instructor, in each of its modes for servers of this API."""

from __future__ import annotations

import instructor
import openai
import pytest
from instructor import Mode
from pydantic import create_model

from .weather import ANNA, ANSWER, EXTRACT, QUESTION, TOOL, Person, get_weather

FIELDS = {"model": "quire-tiny", "temperature": 0, "max_retries": 0}
ASK = [{"role": "user", "content": EXTRACT}]
MODES = [Mode.TOOLS, Mode.JSON, Mode.JSON_SCHEMA, Mode.MD_JSON, Mode.RESPONSES_TOOLS]


Weather = create_model("get_weather", __doc__="Get the weather for a city.", city=(str, ...))
"""The name of the class is the name of the function."""


@pytest.fixture(scope="module")
def sdk(base_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=base_url, max_retries=0)


def test_an_agent(sdk: openai.OpenAI) -> None:
    """The arguments of the call are an object of pydantic, the answer is free text."""
    client = instructor.from_openai(sdk, mode=Mode.TOOLS)
    messages: list = [{"role": "user", "content": QUESTION}]
    wanted, answer = client.chat.completions.create_with_completion(**FIELDS, messages=messages, response_model=Weather)
    message = answer.choices[0].message
    [call] = message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": get_weather(wanted.city)}
    messages += [message.to_dict(), result]
    answer = client.chat.completions.create(**FIELDS, messages=messages, tools=[TOOL], response_model=None)
    assert answer.choices[0].message.content == ANSWER


@pytest.mark.parametrize("mode", MODES)
def test_a_structured_answer(sdk: openai.OpenAI, mode: Mode) -> None:
    client = instructor.from_openai(sdk, mode=mode)
    assert client.create(**FIELDS, messages=ASK, response_model=Person).model_dump() == ANNA.model_dump()


@pytest.mark.parametrize("mode", MODES)
def test_a_structured_answer_that_streams(sdk: openai.OpenAI, mode: Mode) -> None:
    client = instructor.from_openai(sdk, mode=mode)
    partial = list(client.create_partial(**FIELDS, messages=ASK, response_model=Person))
    assert partial[-1].model_dump() == ANNA.model_dump()


@pytest.mark.parametrize("mode", [Mode.JSON, Mode.JSON_SCHEMA, Mode.MD_JSON])
def test_a_list(sdk: openai.OpenAI, mode: Mode) -> None:
    client = instructor.from_openai(sdk, mode=mode)
    assert list(client.create_iterable(**FIELDS, messages=ASK, response_model=Person)) == [ANNA]
