"""LangChain: ``ChatOpenAI`` over both APIs, and its agents."""

from __future__ import annotations

import asyncio
from functools import reduce
from operator import add

import pytest
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

from .weather import ANNA, ANSWER, EXTRACT, QUESTION, Person, get_weather

WEATHER = tool(get_weather)


@pytest.fixture(scope="module", params=["chat completions", "responses"])
def model(base_url: str, request: pytest.FixtureRequest) -> ChatOpenAI:
    is_responses = request.param == "responses"
    fields = {"temperature": 0, "api_key": "none", "max_retries": 0, "use_responses_api": is_responses}
    return ChatOpenAI(model="quire-tiny", base_url=base_url, **fields)


@pytest.mark.parametrize("stream", [False, True])
def test_bind_tools(model: ChatOpenAI, stream: bool) -> None:
    bound, messages = model.bind_tools([WEATHER]), [HumanMessage(QUESTION)]
    for _ in range(3):
        message = reduce(add, bound.stream(messages)) if stream else bound.invoke(messages)
        messages += [message, *(WEATHER.invoke(call) for call in message.tool_calls)]
        if not message.tool_calls:
            break
    assert len(messages) == 4 and message.text == ANSWER


@pytest.mark.parametrize("tool_choice", ["any", "get_weather"])
def test_a_call_that_is_required(model: ChatOpenAI, tool_choice: str) -> None:
    bound = model.bind_tools([WEATHER], tool_choice=tool_choice, strict=True, parallel_tool_calls=False)
    [call] = bound.invoke("What is paged attention?").tool_calls
    assert call["name"] == "get_weather" and set(call["args"]) == {"city"}


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_with_structured_output(model: ChatOpenAI, method: str) -> None:
    structured = model.with_structured_output(Person, method=method)
    assert structured.invoke(EXTRACT) == ANNA
    assert list(structured.stream(EXTRACT))[-1] == ANNA
    raw = model.with_structured_output(Person, method=method, include_raw=True).invoke(EXTRACT)
    assert raw["parsed"] == ANNA and raw["parsing_error"] is None


def test_with_structured_output_of_a_schema(model: ChatOpenAI) -> None:
    assert model.with_structured_output(Person.model_json_schema()).invoke(EXTRACT) == ANNA.model_dump()


def test_an_agent(model: ChatOpenAI, loop: asyncio.Runner) -> None:
    agent, question = create_agent(model, [WEATHER]), {"messages": [("user", QUESTION)]}
    messages = agent.invoke(question)["messages"]
    assert [message.type for message in messages] == ["human", "ai", "tool", "ai"] and messages[-1].text == ANSWER
    assert loop.run(agent.ainvoke(question))["messages"][-1].text == ANSWER
    *_, (text, _) = chunks = list(agent.stream(question, stream_mode="messages"))
    assert len(chunks) > 8 and text.id == chunks[-2][0].id
    *_, last = agent.stream(question, stream_mode="values")
    assert last["messages"][-1].text == ANSWER


@pytest.mark.parametrize("strategy", [ProviderStrategy, ToolStrategy])
def test_a_structured_answer_of_an_agent(model: ChatOpenAI, strategy: type) -> None:
    agent = create_agent(model, [], response_format=strategy(Person))
    assert agent.invoke({"messages": [("user", EXTRACT)]})["structured_response"] == ANNA
