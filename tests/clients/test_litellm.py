"""LiteLLM, by the names under which it knows such a server: ``openai/`` and, as for vLLM, ``hosted_vllm/``."""

from __future__ import annotations

import asyncio
import json

import litellm
import pytest

from .weather import ANNA, ANSWER, EXTRACT, QUESTION, TOOL, Person, get_weather


@pytest.fixture(scope="module", params=["openai", "hosted_vllm"])
def fields(base_url: str, request: pytest.FixtureRequest) -> dict:
    return {"model": f"{request.param}/quire-tiny", "api_base": base_url, "api_key": "none", "temperature": 0}


def list_results(message) -> list[dict]:
    return [
        {"role": "tool", "tool_call_id": call.id, "content": get_weather(**json.loads(call.function.arguments))}
        for call in message.tool_calls or ()
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_an_agent(fields: dict, stream: bool) -> None:
    messages: list = [{"role": "user", "content": QUESTION}]
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    for _ in range(3):
        answer = litellm.completion(messages=messages, tools=[TOOL], **fields, **options)
        if stream:
            answer = litellm.stream_chunk_builder(list(answer), messages=messages)
        message = answer.choices[0].message
        messages += [message.model_dump(), *list_results(message)]
        assert answer.usage.completion_tokens > 5 and answer.usage.prompt_tokens > 50
        if answer.choices[0].finish_reason != "tool_calls":
            break
    assert len(messages) == 4 and message.content == ANSWER


def test_an_asynchronous_agent(fields: dict, loop: asyncio.Runner) -> None:
    async def run() -> str:
        messages: list = [{"role": "user", "content": QUESTION}]
        for _ in range(2):
            answer = await litellm.acompletion(messages=messages, tools=[TOOL], **fields)
            messages += [answer.choices[0].message.model_dump(), *list_results(answer.choices[0].message)]
        return answer.choices[0].message.content

    assert loop.run(run()) == ANSWER


@pytest.mark.parametrize("form", [Person, {"type": "json_object"}])
def test_a_structured_answer(fields: dict, form: object) -> None:
    request = {"messages": [{"role": "user", "content": EXTRACT}], "response_format": form, **fields}
    assert Person.model_validate_json(litellm.completion(**request).choices[0].message.content) == ANNA
    chunks = list(litellm.completion(**request, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert Person.model_validate_json(text) == ANNA


def test_a_call_that_is_required(fields: dict) -> None:
    request = {"messages": [{"role": "user", "content": EXTRACT}], "tools": [TOOL], **fields}
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        message = litellm.completion(**request, tool_choice=choice).choices[0].message
        assert message.tool_calls[0].function.name == "get_weather"


def test_text_completions_and_responses(fields: dict) -> None:
    assert litellm.text_completion(prompt="def add(a, b):", max_tokens=8, **fields).choices[0].text
    assert litellm.responses(input="What is paged attention?", **fields).output[-1].content[0].text
    events = list(litellm.responses(input="What is paged attention?", stream=True, **fields))
    assert events[-1].type == "response.completed"
