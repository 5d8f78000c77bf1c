"""``/v1/responses`` as users of the ``openai`` package call it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import httpx
import openai
import pytest
from pydantic import BaseModel

import quire.core.assets
from quire.core.engine.incremental_decoder import make_incremental_decoder
from quire.core.engine.tokenizer import Tokenizer
from quire.core.messages import CompletionOutput
from quire.core.parsing.answer_parser import AnswerParser
from quire.core.parsing.events import ContentDelta
from quire.plugins.parsers.reasoning import Qwen3
from quire.plugins.parsers.tool_calls import Hermes
from quire.server.http.parsed_text import ParsedText
from quire.server.http.protocol.response_body import ResponseBody
from quire.server.http.text_offsets import TextOffsets

from ..conftest import RunningServer, check_error, start_server

PATH = "/v1/responses"
PARAMETERS = {
    "type": "object",
    "properties": {"location": {"type": "string"}, "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}},
    "required": ["location"],
}
WEATHER = {
    "type": "function",
    "name": "get_current_weather",
    "description": "Get the weather for a city.",
    "parameters": PARAMETERS,
}
ASK = "What is the weather in Paris in celsius?"
FIELDS = {"model": "quire-tiny", "input": ASK, "tools": [WEATHER], "temperature": 0, "max_output_tokens": 100}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """quire-tiny, with two keys and room for three responses."""
    flags = ("--max-stored-responses", "3", "--api-key", "none", "--api-key", "other")
    running = start_server(tmp_path_factory.mktemp("responses"), "quire-tiny", *flags)
    yield running
    assert running.process.poll() is None, running.stderr.read_text()[-4000:]
    running.stop()


@pytest.fixture(scope="module")
def client(tiny: RunningServer) -> openai.OpenAI:
    return tiny.openai


@pytest.fixture(scope="module")
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with server.http as client:
        yield client


def test_a_response(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model="quire-tiny", input="What is 12 + 30?", instructions="Answer.", temperature=0, max_output_tokens=20
    )
    assert response.status == "completed" and response.object == "response" and "42" in response.output_text
    [item] = response.output
    assert item.type == "message" and item.role == "assistant" and item.status == "completed"
    usage = response.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens > 0
    assert response.instructions == "Answer." and response.max_output_tokens == 20


def test_an_answer_that_the_limit_cuts_is_incomplete(client: openai.OpenAI) -> None:
    fields = {"model": "quire-tiny", "input": "What is paged attention?", "temperature": 0, "max_output_tokens": 3}
    response = client.responses.create(**fields)
    assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete" and response.usage.output_tokens == 3
    *_, last = client.responses.create(**fields, stream=True)
    assert last.type == "response.incomplete" and last.response.output_text == response.output_text


def comparable(response) -> dict:
    fields = response.model_dump(exclude={"id", "created_at", "parsed"})
    for item in fields["output"]:
        assert item.pop("id").startswith({"message": "msg_", "function_call": "fc_", "reasoning": "rs_"}[item["type"]])
        item.pop("call_id", None)
        item.pop("parsed_arguments", None)
        for part in item.get("content") or ():
            part.pop("parsed", None)
    return fields


@pytest.mark.parametrize("question", [ASK, "What is paged attention?"])
def test_a_stream_adds_up_to_the_same_response(client: openai.OpenAI, question: str) -> None:
    fields = {**FIELDS, "input": question}
    whole = client.responses.create(**fields)
    with client.responses.stream(**fields) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_response()
    left, right = comparable(whole), comparable(streamed)
    for each in (left, right):
        each["usage"].pop("input_tokens_details")  # the second finds the first one's prefix in the cache
    assert left == right
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == len(whole.output)


def test_the_events_of_a_stream(client: openai.OpenAI) -> None:
    events = list(client.responses.create(**FIELDS, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    [done] = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert len(deltas) > 3 and "".join(deltas) == done.arguments
    assert json.loads(done.arguments) == {"location": "Paris", "unit": "celsius"}
    assert not any(event.type == "response.output_text.delta" for event in events)


def test_a_call_is_answered(client: openai.OpenAI) -> None:
    response = client.responses.create(**FIELDS)
    [call] = response.output
    assert call.type == "function_call" and call.name == "get_current_weather" and call.status == "completed"
    result = {"type": "function_call_output", "call_id": call.call_id, "output": '{"temperature": 21}'}
    conversation = [{"role": "user", "content": [{"type": "input_text", "text": ASK}]}, call, result]
    answered = client.responses.create(**{**FIELDS, "input": conversation})
    assert "21" in answered.output_text
    following = client.responses.create(**{**FIELDS, "input": [result], "previous_response_id": response.id})
    assert following.output_text == answered.output_text
    assert following.usage.input_tokens == answered.usage.input_tokens
    assert following.previous_response_id == response.id


def test_stored_responses(tiny: RunningServer, client: openai.OpenAI) -> None:
    fields = {"model": "quire-tiny", "input": "What is 1 + 1?", "temperature": 0, "max_output_tokens": 8}
    first = client.responses.create(**fields)
    assert first.store is True and client.responses.retrieve(first.id).output_text == first.output_text
    other = openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="other", max_retries=0)
    for refused in (
        lambda: other.responses.retrieve(first.id),
        lambda: other.responses.create(**fields, previous_response_id=first.id),
        lambda: other.responses.delete(first.id),
        lambda: client.responses.retrieve("resp_none"),
    ):
        with pytest.raises(openai.NotFoundError, match="there is no response"):
            refused()
    later = [client.responses.create(**fields) for _ in range(2)]
    unstored = client.responses.create(**fields, store=False)
    assert client.responses.retrieve(first.id).id == first.id, "three have room"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unstored.id)
    client.responses.create(**fields)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    client.responses.delete(later[0].id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(later[0].id)


def test_nothing_is_stored_unless_asked(http: httpx.Client) -> None:
    body = {"model": "tiny", "input": "x", "max_output_tokens": 2, "store": True}
    response = http.post(PATH, json=body)
    assert response.status_code == 200 and response.json()["store"] is False
    message = check_error(http.post(PATH, json={**body, "previous_response_id": "resp_1"}), 400, "previous_response_id")
    assert "--max-stored-responses" in message
    check_error(http.get(f"{PATH}/{response.json()['id']}"), 400)
    check_error(http.delete(f"{PATH}/resp_1"), 400)


def test_structured_text(client: openai.OpenAI) -> None:
    class Rating(BaseModel):
        grade: Literal["a", "b"]
        is_good: bool

    fields = {"model": "quire-tiny", "input": "What is paged attention?", "temperature": 0, "max_output_tokens": 200}
    response = client.responses.parse(**fields, text_format=Rating)
    assert isinstance(response.output_parsed, Rating)
    with client.responses.stream(**fields, text_format=Rating) as stream:
        assert stream.get_final_response().output_parsed == response.output_parsed
    schema = {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]}
    schema["additionalProperties"] = False
    form = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    assert "x" in json.loads(client.responses.create(**fields, text=form).output_text)


@pytest.mark.parametrize("question", [ASK, "What is paged attention?"])
def test_log_probabilities_of_the_message(client: openai.OpenAI, question: str) -> None:
    """Those of its tokens, streamed and not; a call has none."""
    fields = {**FIELDS, "input": question, "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    response = client.responses.create(**fields)
    [item] = response.output
    events = list(client.responses.create(**fields, stream=True))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    if item.type == "function_call":
        assert not deltas
        return
    logprobs = item.content[0].logprobs
    assert "".join(each.token for each in logprobs).strip() == response.output_text
    assert all(len(each.top_logprobs) == 2 and each.logprob == each.top_logprobs[0].logprob for each in logprobs)
    assert [each.token for delta in deltas for each in delta.logprobs] == [each.token for each in logprobs]
    [done] = [event for event in events if event.type == "response.output_text.done"]
    assert [each.token for each in done.logprobs] == [each.token for each in logprobs]
    chat = client.chat.completions.create(
        model="quire-tiny",
        messages=[{"role": "user", "content": question}],
        tools=[{"type": "function", "function": {key: WEATHER[key] for key in WEATHER if key != "type"}}],
        temperature=0,
        max_tokens=100,
        logprobs=True,
    )
    told = [each.logprob for each in chat.choices[0].logprobs.content]
    assert [each.logprob for each in logprobs] == pytest.approx(told[: len(logprobs)], abs=1e-4)


def test_log_probabilities_beside_reasoning_are_those_of_the_message() -> None:
    """However many tokens come at once."""
    tokenizer = Tokenizer(str(Path(quire.core.assets.__path__[0], "quire-tiny")))
    text = "<think>No.</think>\n\nYes, it is.\n<tool_call>\n{}"
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    names = [tokenizer.decode([token]) for token in token_ids]
    expected = None
    for size in (1, 2, 5, len(token_ids)):
        parser = AnswerParser(Hermes(), Qwen3(), {"f": {}})
        parsed = ParsedText(parser, TextOffsets(tokenizer, [5], True, 0))
        content, logprobs, position = "", [], 0
        decoder = make_incremental_decoder(tokenizer, [5], True)
        for position in range(0, len(token_ids), size):
            ids = token_ids[position : position + size]
            is_last = position + size >= len(token_ids)
            piece = "".join(map(decoder.decode_token, ids))
            choice = CompletionOutput(0, piece, ids, finish_reason="stop" if is_last else None)
            for event, of_event in parsed.add_output(choice, names[position : position + size]):
                content += event.text if isinstance(event, ContentDelta) else ""
                logprobs += of_event
        assert content.startswith("Yes, it is.")
        assert "".join(logprobs).startswith("\n\nYes, it is.") and "No" not in logprobs
        expected = expected or logprobs
        assert logprobs == expected


def test_a_call_is_required(client: openai.OpenAI) -> None:
    fields = {**FIELDS, "input": "What is paged attention?", "tool_choice": "required", "parallel_tool_calls": False}
    [call] = client.responses.create(**fields).output
    assert call.type == "function_call" and "location" in json.loads(call.arguments)
    named = {"type": "function", "name": "get_current_weather"}
    [call] = client.responses.create(**{**fields, "tool_choice": named}).output
    assert call.name == "get_current_weather"


def test_reasoning_is_an_item(thinking_server: RunningServer) -> None:
    fields = {"model": "tiny", "input": "Hm?", "temperature": 0, "max_output_tokens": 6}
    extra = {"extra_body": {"ignore_eos": True}}
    response = thinking_server.openai.responses.create(**fields, **extra)
    [item] = response.output
    assert item.type == "reasoning" and item.content[0].text and item.summary == []
    assert 0 < response.usage.output_tokens_details.reasoning_tokens <= 6
    events = list(thinking_server.openai.responses.create(**fields, **extra, stream=True))
    deltas = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
    assert deltas == item.content[0].text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": "message", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": 3}]}, "input[0].content"),
        ({"input": [{"type": "function_call", "name": 3}]}, "input[0].name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": 3}}}}, None),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"n": 2}, "n"),
        ({"max_tokens": 3}, "max_tokens"),
        ({"truncation": "some"}, "truncation"),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"logprob_token_ids": [5]}, "logprob_token_ids"),
        ({"text": {"format": 3}}, "text.format"),
        ({"temperature": 1000}, "temperature"),
        ({"top_logprobs": 3}, "top_logprobs"),
    ],
)
def test_what_cannot_be_done_is_refused(http: httpx.Client, fields: dict, param: str) -> None:
    check_error(http.post(PATH, json={"model": "tiny", "input": "x", "max_output_tokens": 2, **fields}), 400, param)


def test_values_that_ask_for_what_is_done_anyway_are_taken(http: httpx.Client) -> None:
    neutral = {"background": False, "top_logprobs": 0, "truncation": "disabled", "text": {"format": {"type": "text"}}}
    neutral |= {"include": ["reasoning.encrypted_content"], "tool_choice": "auto", "metadata": {"a": "b"}, "n": 1}
    response = http.post(PATH, json={"input": "x", "max_output_tokens": 2, **neutral})
    assert response.status_code == 200 and response.json()["metadata"] == {"a": "b"}


def test_a_long_conversation_is_cut_where_that_is_asked_for(http: httpx.Client) -> None:
    body = {"model": "tiny", "input": "word " * 3000, "max_output_tokens": 4}
    message = check_error(http.post(PATH, json=body), 400)
    assert "2048" in message
    response = http.post(PATH, json={**body, "truncation": "auto"})
    assert response.status_code == 200 and response.json()["usage"]["input_tokens"] <= 2044


def test_what_include_names_in_vain_is_told() -> None:
    body = ResponseBody.model_validate(
        {"input": "x", "include": ["message.output_text.logprobs", "reasoning.encrypted_content"]}
    )
    assert list(body.unknown_fields()) == ["include.reasoning.encrypted_content"]
