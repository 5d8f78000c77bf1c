"""Calls of tools and reasoning over HTTP: what users of the ``openai`` package do with a model that calls tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

from ..conftest import RunningServer, check_error, start_server

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_current_weather",
        "description": "Get the weather for a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "location": {"type": "string"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["location"],
        },
    },
}
ASK = [{"role": "user", "content": "What is the weather in Paris in celsius?"}]
FIELDS = {"model": "quire-tiny", "messages": ASK, "tools": [WEATHER], "temperature": 0, "max_tokens": 100}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """quire-tiny, which was trained to call tools."""
    running = start_server(tmp_path_factory.mktemp("tools"), "quire-tiny")
    yield running
    assert running.process.poll() is None, running.stderr.read_text()[-4000:]
    running.stop()


@pytest.fixture(scope="module")
def client(tiny: RunningServer) -> openai.OpenAI:
    return tiny.openai


def without_ids(message) -> dict:
    fields = message.model_dump(exclude_none=True, exclude={"parsed"})
    for call in fields.get("tool_calls", ()):
        assert call.pop("id").startswith("call_")
        call.pop("index", None)
        call["function"].pop("parsed_arguments", None)
    return fields


def test_a_call_and_its_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**FIELDS)
    [choice] = answer.choices
    [call] = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert call.function.name == "get_current_weather"
    assert json.loads(call.function.arguments) == {"location": "Paris", "unit": "celsius"}
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 21, "unit": "celsius"}'}
    answer = client.chat.completions.create(**{**FIELDS, "messages": [*ASK, choice.message, result]})
    assert "21" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop" and not answer.choices[0].message.tool_calls


def test_a_stream_adds_up_to_the_same_message(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**FIELDS)
    with client.chat.completions.stream(**FIELDS) as stream:
        streamed = stream.get_final_completion()
    assert without_ids(streamed.choices[0].message) == without_ids(whole.choices[0].message)
    assert streamed.choices[0].finish_reason == whole.choices[0].finish_reason
    plain = {**FIELDS, "messages": [{"role": "user", "content": "What is paged attention?"}]}
    whole = client.chat.completions.create(**plain)
    with client.chat.completions.stream(**plain) as stream:
        streamed = stream.get_final_completion()
    assert without_ids(streamed.choices[0].message) == without_ids(whole.choices[0].message)
    assert whole.choices[0].message.content


def test_arguments_come_while_they_are_written(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(**FIELDS, stream=True))
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert deltas[0].function.name == "get_current_weather" and deltas[0].function.arguments == ""
    assert all(delta.function.name is None and delta.id is None and delta.index == 0 for delta in deltas[1:])
    assert len(deltas) > 5
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["tool_calls"]


def test_calls_with_n_and_logprobs(client: openai.OpenAI) -> None:
    fields = {**FIELDS, "n": 2, "temperature": 0.01, "seed": 1, "logprobs": True, "top_logprobs": 1}
    whole = client.chat.completions.create(**fields)
    assert [len(choice.message.tool_calls) for choice in whole.choices] == [1, 1]
    counted = [0, 0]
    for chunk in client.chat.completions.create(**fields, stream=True):
        for choice in chunk.choices:
            counted[choice.index] += len(choice.logprobs.content) if choice.logprobs else 0
    assert counted == [len(choice.logprobs.content) for choice in whole.choices]


def test_tool_choice_none_and_a_cut_call(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**FIELDS, tool_choice="none")
    assert not answer.choices[0].message.tool_calls
    answer = client.chat.completions.create(**{**FIELDS, "max_tokens": 25})
    [call] = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "length" and call.function.arguments.startswith('{"')
    answer = client.chat.completions.create(**{**FIELDS, "max_tokens": 5})
    assert answer.choices[0].message.content.startswith("<tool_call>") and answer.choices[0].finish_reason == "length"


def test_functions_that_are_not_declared_are_content(client: openai.OpenAI) -> None:
    """As those of an allowed subset: the template shows all tools, the model calls the one that may not be called."""
    other = {"type": "function", "function": {"name": "timer", "parameters": {"type": "object", "properties": {}}}}
    subset = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"function": {"name": "timer"}}]}}
    fields = {**FIELDS, "tools": [WEATHER, other]}
    assert client.chat.completions.create(**fields).choices[0].message.tool_calls
    message = client.chat.completions.create(**fields, tool_choice=subset).choices[0].message
    assert not message.tool_calls and message.content.startswith("<tool_call>")


def test_bad_tools_are_refused(tiny: RunningServer) -> None:
    with tiny.http as http:
        for fields, param in (
            ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
            ({"tool_choice": {"type": "function", "function": {"name": "nothing"}}}, "tool_choice"),
        ):
            check_error(http.post("/v1/chat/completions", json={**FIELDS, **fields}), 400, param)


def test_parsers_by_flag(thinking_server: RunningServer) -> None:
    """A model whose template shows nothing, and a template that opens its reasoning."""
    server = thinking_server
    fields = {"model": "tiny", "messages": ASK, "max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True}}
    message = server.openai.chat.completions.create(**fields).choices[0].message
    assert message.content is None and message.reasoning_content and message.reasoning == message.reasoning_content
    chunks = list(server.openai.chat.completions.create(**fields, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == message.reasoning_content
    assert not any(delta.content for delta in deltas)


def test_speculation_and_small_chunks_change_no_message(client: openai.OpenAI, tmp_path) -> None:
    """Drafts make deltas of several tokens, small steps cut prompts: the message is the same."""
    flags = ("--spec-method", "ngram", "--num-speculative-tokens", "4", "--max-num-batched-tokens", "64")
    server = start_server(tmp_path, "quire-tiny", *flags, "--max-num-seqs", "4")
    try:
        expected = client.chat.completions.create(**FIELDS).choices[0].message
        for _ in range(2):  # the second finds its prompt in the cache
            with server.openai.chat.completions.stream(**FIELDS) as stream:
                streamed = stream.get_final_completion().choices[0].message
            assert without_ids(streamed) == without_ids(expected)
        assert server.metric('quire:spec_decode_num_draft_tokens_total{model_name="quire-tiny"}') > 0
    finally:
        server.stop()


def calls_of(answer) -> list[tuple[str, dict]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in answer.choices[0].message.tool_calls]


STRICT = {
    "type": "object",
    "properties": {"grade": {"enum": ["a", "b"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["grade", "count"],
    "additionalProperties": False,
}
RATE = {"type": "function", "function": {"name": "rate", "parameters": STRICT, "strict": True}}
PLAIN = {
    "model": "quire-tiny",
    "messages": [{"role": "user", "content": "What is paged attention?"}],
    "max_tokens": 200,
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_required_call_is_made_and_is_valid(client: openai.OpenAI, stream: bool, temperature: float) -> None:
    fields = {**PLAIN, "tools": [WEATHER, RATE], "temperature": temperature, "seed": 3}
    fields["tool_choice"] = {"type": "function", "function": {"name": "rate"}}
    if stream:
        with client.chat.completions.stream(**fields) as events:
            answer = events.get_final_completion()
    else:
        answer = client.chat.completions.create(**fields)
    [(name, arguments)] = calls_of(answer)
    assert name == "rate" and arguments["grade"] in ("a", "b") and 0 <= arguments["count"] <= 99
    assert answer.choices[0].message.content is None and answer.choices[0].finish_reason == "tool_calls"


def test_one_of_the_tools_is_required(client: openai.OpenAI) -> None:
    fields = {**PLAIN, "tools": [WEATHER, RATE], "tool_choice": "required", "temperature": 0}
    calls = calls_of(client.chat.completions.create(**fields, parallel_tool_calls=False))
    assert len(calls) == 1 and calls[0][0] in ("get_current_weather", "rate")
    assert calls_of(client.chat.completions.create(**FIELDS, tool_choice="required"))[0] == (
        "get_current_weather", {"location": "Paris", "unit": "celsius"},
    )  # fmt: skip


def test_strict_tools_of_the_models_own_accord(client: openai.OpenAI) -> None:
    """Text stays free; a call that is made keeps its schema."""
    schema = {**WEATHER["function"]["parameters"], "additionalProperties": False}
    strict = {"type": "function", "function": {**WEATHER["function"], "parameters": schema, "strict": True}}
    [(_, arguments)] = calls_of(client.chat.completions.create(**{**FIELDS, "tools": [strict, RATE]}))
    assert arguments == {"location": "Paris", "unit": "celsius"}
    answer = client.chat.completions.create(**PLAIN, tools=[strict], temperature=0)
    free = client.chat.completions.create(**PLAIN, tools=[WEATHER], temperature=0)
    assert answer.choices[0].message.content == free.choices[0].message.content


def test_a_required_call_leaves_no_room_for_another_form(tiny: RunningServer) -> None:
    with tiny.http as http:
        fields = {"tool_choice": "required", "structured_outputs": {"regex": "[a-z]+"}}
        check_error(http.post("/v1/chat/completions", json={**FIELDS, **fields}), 400, "tool_choice")


@pytest.mark.parametrize("form", [{"type": "json_object"}, {"type": "json_schema"}])
def test_a_required_call_comes_before_json(client: openai.OpenAI, form: dict) -> None:
    """As of OpenAI and vLLM: a form of JSON is one of the text, of which an answer of calls has none."""
    if form["type"] == "json_schema":
        form = {**form, "json_schema": {"name": "rating", "schema": STRICT}}
    fields = {**PLAIN, "tools": [WEATHER, RATE], "response_format": form, "temperature": 0}
    fields["tool_choice"] = {"type": "function", "function": {"name": "rate"}}
    answer = client.chat.completions.create(**fields)
    [(name, arguments)] = calls_of(answer)
    assert name == "rate" and arguments["grade"] in ("a", "b") and answer.choices[0].message.content is None
    calls = calls_of(client.chat.completions.create(**{**FIELDS, "tool_choice": "required", "response_format": form}))
    assert ("get_current_weather", {"location": "Paris", "unit": "celsius"}) in calls


def test_a_required_call_of_a_model_without_a_parser(server: RunningServer) -> None:
    """A random model, whose template shows no tools: the grammar alone makes the call."""
    tools = [{"type": "function", "function": {"name": "rate", "parameters": STRICT}}]
    answer = server.openai.chat.completions.create(
        model="tiny", messages=ASK, tools=tools, tool_choice="required", parallel_tool_calls=False, max_tokens=400
    )
    [(name, arguments)] = calls_of(answer)
    assert name == "rate" and arguments["grade"] in ("a", "b")


def test_parse_of_the_sdk(client: openai.OpenAI) -> None:
    class Rating(BaseModel):
        grade: Literal["a", "b"]
        is_good: bool

    fields = {**PLAIN, "temperature": 0, "max_tokens": 300}
    parsed = client.chat.completions.parse(**fields, response_format=Rating).choices[0].message.parsed
    assert isinstance(parsed, Rating)
    tool = openai.pydantic_function_tool(Rating, name="rate")
    fields |= {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    message = client.chat.completions.parse(**fields).choices[0].message
    assert isinstance(message.tool_calls[0].function.parsed_arguments, Rating)


def test_calls_beside_a_form_of_the_answer(client: openai.OpenAI) -> None:
    """An agent with tools and a ``response_format``: the model calls, or answers in JSON, and nothing else."""
    form = {"type": "json_schema", "json_schema": {"name": "rating", "schema": STRICT}}
    calls = calls_of(client.chat.completions.create(**FIELDS, response_format=form))
    assert calls == [("get_current_weather", {"location": "Paris", "unit": "celsius"})]
    fields = {**PLAIN, "tools": [WEATHER], "response_format": form, "temperature": 0}
    message = client.chat.completions.create(**fields).choices[0].message
    if not message.tool_calls:
        assert json.loads(message.content)["grade"] in ("a", "b")
    answer = client.chat.completions.create(**fields, tool_choice="none")
    assert json.loads(answer.choices[0].message.content)["grade"] in ("a", "b")
