"""pydantic-ai: its agents over both APIs, and each of its ways to a structured answer."""

from __future__ import annotations

import asyncio

import pytest
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.messages import ToolReturnPart
from pydantic_ai.models import Model
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

from .weather import ANNA, ANSWER, EXTRACT, QUESTION, Person, get_weather

GREEDY = {"temperature": 0}


@pytest.fixture(params=[OpenAIChatModel, OpenAIResponsesModel])
def model(base_url: str, request: pytest.FixtureRequest) -> Model:
    return request.param("quire-tiny", provider=OpenAIProvider(base_url=base_url, api_key="none"))


def test_an_agent(model: Model) -> None:
    result = Agent(model, tools=[get_weather], model_settings=GREEDY).run_sync(QUESTION)
    parts = [part for message in result.all_messages() for part in message.parts]
    assert result.output == ANSWER and any(isinstance(part, ToolReturnPart) for part in parts)


def test_an_agent_that_streams(model: Model, loop: asyncio.Runner) -> None:
    async def run() -> list[str]:
        async with Agent(model, tools=[get_weather], model_settings=GREEDY).run_stream(QUESTION) as result:
            return [text async for text in result.stream_text(delta=True, debounce_by=None)]

    texts = loop.run(run())
    assert "".join(texts) == ANSWER and len(texts) > 3


@pytest.mark.parametrize("output", [ToolOutput, NativeOutput, PromptedOutput])
def test_a_structured_answer(model: Model, output: type, loop: asyncio.Runner) -> None:
    agent = Agent(model, output_type=output(Person), model_settings=GREEDY, retries=0)
    assert agent.run_sync(EXTRACT).output == ANNA

    async def run() -> Person:
        async with agent.run_stream(EXTRACT) as result:
            return [person async for person in result.stream_output(debounce_by=None)][-1]

    assert loop.run(run()) == ANNA


def test_tools_beside_a_structured_answer(model: Model) -> None:
    agent = Agent(model, tools=[get_weather], output_type=NativeOutput(Person), model_settings=GREEDY, retries=0)
    assert agent.run_sync(EXTRACT).output == ANNA
