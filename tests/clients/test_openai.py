"""OpenAI's own package: chat completions and responses."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest

from .weather import ANNA, ANSWER, EXTRACT, FUNCTION, QUESTION, TOOL, Person, get_weather

MODEL = {"model": "quire-tiny", "temperature": 0}
ASK = [{"role": "user", "content": EXTRACT}]


@pytest.fixture(scope="module")
def client(base_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=base_url, max_retries=0)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["quire-tiny"]


def list_results(message) -> list[dict]:
    return [
        {"role": "tool", "tool_call_id": call.id, "content": get_weather(**json.loads(call.function.arguments))}
        for call in message.tool_calls or ()
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_an_agent_of_chat_completions(client: openai.OpenAI, stream: bool) -> None:
    messages: list = [{"role": "user", "content": QUESTION}]
    for _ in range(3):
        if stream:
            with client.chat.completions.stream(**MODEL, messages=messages, tools=[TOOL]) as events:
                message = events.get_final_completion().choices[0].message
        else:
            message = client.chat.completions.create(**MODEL, messages=messages, tools=[TOOL]).choices[0].message
        messages += [message, *list_results(message)]
        if not message.tool_calls:
            break
    assert [each["role"] if isinstance(each, dict) else each.role for each in messages] == [
        "user", "assistant", "tool", "assistant",
    ]  # fmt: skip
    assert message.content == ANSWER


def test_an_agent_of_the_asynchronous_client(base_url: str, loop: asyncio.Runner) -> None:
    async def run() -> str:
        messages: list = [{"role": "user", "content": QUESTION}]
        async with openai.AsyncOpenAI(base_url=base_url, max_retries=0) as client:
            for _ in range(2):
                answer = await client.chat.completions.create(**MODEL, messages=messages, tools=[TOOL])
                message = answer.choices[0].message
                messages += [message, *list_results(message)]
        return message.content

    assert loop.run(run()) == ANSWER


@pytest.mark.parametrize("stream", [False, True])
def test_an_agent_of_responses(client: openai.OpenAI, stream: bool) -> None:
    items: list = [{"role": "user", "content": QUESTION}]
    for _ in range(2):
        fields = {**MODEL, "input": items, "tools": [{"type": "function", **FUNCTION}]}
        if stream:
            with client.responses.stream(**fields) as events:
                response = events.get_final_response()
        else:
            response = client.responses.create(**fields)
        items += [item.to_dict() for item in response.output]
        for item in response.output:
            if item.type == "function_call":
                result = get_weather(**json.loads(item.arguments))
                items.append({"type": "function_call_output", "call_id": item.call_id, "output": result})
    assert response.output_text == ANSWER


def test_a_structured_answer_of_chat_completions(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(**MODEL, messages=ASK, response_format=Person)
    assert answer.choices[0].message.parsed == ANNA
    with client.chat.completions.stream(**MODEL, messages=ASK, response_format=Person) as events:
        assert events.get_final_completion().choices[0].message.parsed == ANNA


def test_a_structured_answer_of_responses(client: openai.OpenAI) -> None:
    assert client.responses.parse(**MODEL, input=EXTRACT, text_format=Person).output_parsed == ANNA
    with client.responses.stream(**MODEL, input=EXTRACT, text_format=Person) as events:
        assert events.get_final_response().output_parsed == ANNA


def test_a_function_of_pydantic(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Person, name="extract_person")
    fields = {**MODEL, "messages": ASK, "tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    [call] = client.chat.completions.parse(**fields).choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Person)
    with client.chat.completions.stream(**fields) as events:
        [streamed] = events.get_final_completion().choices[0].message.tool_calls
    assert streamed.function.parsed_arguments == call.function.parsed_arguments
