"""What users of the ``openai`` package do, streaming and not."""

from __future__ import annotations

import openai
import pytest
from tokenizers import pre_tokenizers

from ..conftest import RunningServer

TALK = [{"role": "user", "content": "Say something."}]


@pytest.fixture(scope="module")
def client(server: RunningServer) -> openai.OpenAI:
    return server.openai


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=TALK, max_tokens=8, temperature=0)
    [choice] = answer.choices
    assert answer.object == "chat.completion" and answer.model == "tiny" and answer.id.startswith("chatcmpl-")
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason in ("length", "stop")
    assert answer.usage is not None and answer.usage.completion_tokens <= 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_stream_says_the_same(client: openai.OpenAI) -> None:
    fields = {"model": "tiny", "messages": TALK, "max_tokens": 24, "temperature": 0, "extra_body": {"ignore_eos": True}}
    whole = client.chat.completions.create(**fields)
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 24 == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_chat_with_n_and_seed(client: openai.OpenAI) -> None:
    fields = {"model": "tiny", "messages": TALK, "max_tokens": 8, "n": 3, "seed": 7, "temperature": 1.0}
    first = client.chat.completions.create(**fields)
    again = client.chat.completions.create(**fields)
    texts = [c.message.content for c in first.choices]
    assert [c.index for c in first.choices] == [0, 1, 2] and len(set(texts)) > 1
    assert texts == [c.message.content for c in again.choices]
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**fields, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=TALK, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for position in content:
        best = [each.logprob for each in position.top_logprobs]
        assert len(best) == 3 and best == sorted(best, reverse=True)
        assert position.logprob == best[0] <= 0, "greedy takes the likeliest"
        assert isinstance(position.bytes, list)


def test_logprobs_of_named_tokens(client: openai.OpenAI) -> None:
    named, fields = encode_bytes("NoY"), {"model": "tiny", "max_tokens": 3, "temperature": 0}
    more = {"logprob_token_ids": named, "ignore_eos": True}
    for stream in (False, True):
        answer = client.chat.completions.create(**fields, messages=TALK, logprobs=True, stream=stream, extra_body=more)
        choices = [c.choices[0] for c in answer if c.choices] if stream else answer.choices
        content = [each for choice in choices for each in (choice.logprobs.content if choice.logprobs else [])]
        assert len(content) == 3
        for position in content:
            assert sorted(each.token for each in position.top_logprobs) == ["N", "Y", "o"]
            values = [each.logprob for each in position.top_logprobs]
            assert values == sorted(values, reverse=True) and position.logprob >= values[0]
        answer = client.completions.create(**fields, prompt="x", logprobs=0, stream=stream, extra_body=more)
        choices = [c.choices[0] for c in answer] if stream else answer.choices
        tops = [top for choice in choices if choice.logprobs for top in choice.logprobs.top_logprobs]
        assert len(tops) == 3 and all(set("NoY") <= set(top) and len(top) <= 4 for top in tops)


def test_tokens_that_are_no_characters_show_their_bytes(client: openai.OpenAI) -> None:
    """As those of OpenAI do, so that several are told apart."""
    prompt = encode_bytes("a\N{GRINNING FACE}")
    fields = {"model": "tiny", "max_tokens": 0, "echo": True, "logprobs": 20}
    scored = client.completions.create(**fields, prompt=prompt).choices[0]
    assert scored.logprobs.tokens == ["a", r"bytes:\xf0", r"bytes:\x9f", r"bytes:\x98", r"bytes:\x80"]
    assert sum("\N{REPLACEMENT CHARACTER}" in name for top in scored.logprobs.top_logprobs[1:] for name in top) == 0
    only = {"allowed_token_ids": prompt[1:2]}
    chat = client.chat.completions.create(model="tiny", messages=TALK, max_tokens=1, logprobs=True, extra_body=only)
    [position] = chat.choices[0].logprobs.content
    assert (position.token, position.bytes) == (r"\xf0", [0xF0])


def test_chat_logprobs_in_a_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=TALK, max_tokens=5, temperature=0, logprobs=True, stream=True
    )
    counted = sum(len(c.choices[0].logprobs.content) for c in stream if c.choices and c.choices[0].logprobs)
    assert 1 <= counted <= 5


def test_chat_takes_what_clients_send(client: openai.OpenAI) -> None:
    """Parts, names, earlier tool calls, developer messages, max_completion_tokens, tools for the template."""
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    answer = client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "me"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "2"},
        ],
        tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        max_completion_tokens=3,
        user="somebody",
        metadata={"a": "b"},
    )
    assert answer.usage.completion_tokens <= 3


def test_stop_string(client: openai.OpenAI) -> None:
    fields = {"model": "tiny", "prompt": "abc", "temperature": 0, "max_tokens": 40, "extra_body": {"ignore_eos": True}}
    text = client.completions.create(**fields).choices[0].text
    stop = text[10:12]
    for stream in (False, True):
        answer = client.completions.create(**fields, stop=[stop], stream=stream)
        choices = [c.choices[0] for c in answer] if stream else answer.choices
        assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
        assert choices[-1].finish_reason == "stop"


@pytest.mark.parametrize("prompt", ["abc", ["abc", "def"], [97, 98, 99], [[97, 98], [99]]])
def test_completion_prompts(client: openai.OpenAI, prompt: object) -> None:
    answer = client.completions.create(model="also-tiny", prompt=prompt, max_tokens=4, n=2, seed=1)
    expected = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    assert [choice.index for choice in answer.choices] == list(range(2 * expected))
    assert answer.model == "also-tiny" and answer.object == "text_completion"
    streamed = [""] * (2 * expected)
    for chunk in client.completions.create(model="tiny", prompt=prompt, max_tokens=4, n=2, seed=1, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == [choice.text for choice in answer.choices]


def test_echo_with_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="hello", max_tokens=2, echo=True, logprobs=2, temperature=0)
    [choice] = answer.choices
    assert choice.text.startswith("hello")
    logprobs = choice.logprobs
    assert logprobs.tokens[:5] == list("hello") and logprobs.token_logprobs[0] is None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 7
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert logprobs.text_offset[:6] == [0, 1, 2, 3, 4, 5]
    assert all(2 <= len(top) <= 3 for top in logprobs.top_logprobs[1:])


@pytest.mark.parametrize("max_tokens", [0, 6])
def test_a_stream_echoes_and_scores_as_a_whole_answer_does(client: openai.OpenAI, max_tokens: int) -> None:
    fields = {
        "model": "tiny",
        "prompt": ["hello", "a longer prompt"],
        "max_tokens": max_tokens,
        "temperature": 0,
        "n": 2,
    }
    more = {"ignore_eos": True, "return_token_ids": True}
    fields |= {"echo": True, "logprobs": 2, "extra_body": more}
    whole = client.completions.create(**fields)
    chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert chunks.pop().usage == whole.usage
    for choice in whole.choices:
        parts = [c.choices[0] for c in chunks if c.choices[0].index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert parts[0].prompt_token_ids == choice.prompt_token_ids and len(parts[0].prompt_token_ids) >= 5
        assert [token for part in parts for token in getattr(part, "token_ids", [])] == choice.token_ids
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            streamed = [value for part in parts if part.logprobs for value in getattr(part.logprobs, name)]
            expected = getattr(choice.logprobs, name)
            if name in ("tokens", "text_offset"):
                assert streamed == expected
            assert len(streamed) == len(expected) == len(choice.prompt_token_ids) + max_tokens
        assert [part.finish_reason for part in parts if part.finish_reason] == ["length"] == [choice.finish_reason]


def test_token_ids_in_a_stream_are_those_of_a_whole_answer(client: openai.OpenAI) -> None:
    """Also where the text holds them back, and that of the stop token, which has no text."""
    ids = encode_bytes("\N{GRINNING FACE}n")
    fields = {"model": "tiny", "messages": TALK, "max_tokens": 12, "seed": 4}
    more = {"return_token_ids": True, "allowed_token_ids": ids, "stop_token_ids": ids[-1:], "min_tokens": 3}
    whole = client.chat.completions.create(**fields, extra_body=more)
    chunks = list(client.chat.completions.create(**fields, extra_body=more, stream=True))
    streamed = [token for c in chunks for token in getattr(c.choices[0], "token_ids", [])]
    assert streamed == whole.choices[0].token_ids and len(streamed) > 3
    assert [chunk.prompt_token_ids for chunk in chunks if hasattr(chunk, "prompt_token_ids")] == [
        whole.prompt_token_ids
    ]
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content


def test_text_offsets_are_the_places_of_the_tokens(client: openai.OpenAI) -> None:
    """Tokens that share a character begin where it does; a stream with stop strings says the same."""
    prompt = "Smile \N{GRINNING FACE} ok"
    scored = client.completions.create(model="tiny", prompt=prompt, max_tokens=0, echo=True, logprobs=0).choices[0]
    assert scored.logprobs.text_offset == [*range(6), 6, 6, 6, 6, *range(7, 10)]
    ids = [1, *encode_bytes("ok \N{GRINNING FACE}")]
    scored = client.completions.create(model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=0).choices[0]
    lead = len(scored.text) - 4
    assert scored.logprobs.text_offset == [0, lead, lead + 1, lead + 2, *[lead + 3] * 4]
    body = {"model": "tiny", "prompt": "What", "max_tokens": 24, "temperature": 0, "logprobs": 0, "stop": ["n" * 40]}
    whole = client.completions.create(**body).choices[0]
    assert whole.logprobs.text_offset[0] == 0 and whole.logprobs.text_offset == sorted(whole.logprobs.text_offset)
    streamed: list[int] = []
    for chunk in client.completions.create(**body, stream=True):
        streamed += [offset for c in chunk.choices if c.logprobs for offset in c.logprobs.text_offset]
    assert streamed == whole.logprobs.text_offset


def encode_bytes(text: str) -> list[int]:
    """Tokens of the tiny model: one a byte, in the order of their letters, but for the special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letter_of = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [letters.index(letter_of[byte]) for byte in text.encode()]


@pytest.mark.parametrize("include_usage", [True, False])
def test_every_chunk_can_bring_the_usage_so_far(client: openai.OpenAI, include_usage: bool) -> None:
    options = {"include_usage": include_usage, "continuous_usage_stats": True}
    more = {"ignore_eos": True, "stream_options": options}
    kept = client.completions.create(model="tiny", prompt="ab", max_tokens=5, stream=True, n=2, extra_body=more)
    chunks = list(kept)
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[0] >= 1 and counts[-1] == 10
    assert all(chunk.usage.total_tokens == 2 + chunk.usage.completion_tokens for chunk in chunks)
    assert (not chunks[-1].choices) == include_usage
    talk = [{"role": "user", "content": "hi"}]
    chat = list(client.chat.completions.create(model="tiny", messages=talk, max_tokens=5, stream=True, extra_body=more))
    assert all(chunk.usage.prompt_tokens == chat[0].usage.prompt_tokens > 2 for chunk in chat)
    assert [chunk.usage.completion_tokens for chunk in chat][-1] == 5


def test_prompt_is_scored_without_an_answer(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="hello", max_tokens=0, echo=True, logprobs=0)
    assert answer.choices[0].text == "hello" and len(answer.choices[0].logprobs.tokens) == 5
    assert answer.usage.completion_tokens == 0


def test_best_of(client: openai.OpenAI) -> None:
    few = client.completions.create(model="tiny", prompt="x", max_tokens=4, n=2, best_of=5, seed=3)
    every = client.completions.create(model="tiny", prompt="x", max_tokens=4, n=5, seed=3, logprobs=0)
    scores = {}
    for choice in every.choices:
        values = choice.logprobs.token_logprobs
        scores[choice.text] = sum(values) / len(values)
    best = sorted(scores, key=scores.__getitem__, reverse=True)[:2]
    assert [choice.text for choice in few.choices] == best and few.choices[0].logprobs is None


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "also-tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="served here: 'tiny', 'also-tiny'"):
        client.models.retrieve("gpt")


def test_errors_become_the_sdk_s_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-5", messages=TALK)
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=TALK, temperature=-1)
    assert bad.value.param == "temperature" and bad.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError):
        list(client.chat.completions.create(model="tiny", messages=TALK, temperature=-1, stream=True))


async def _many(server: RunningServer, count: int) -> list[str]:
    import asyncio

    import httpx

    limits = httpx.Limits(max_connections=count)
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",
        max_retries=0,
        http_client=openai.DefaultAsyncHttpxClient(limits=limits, timeout=120),
    ) as client:

        async def one(i: int) -> str:
            fields = {"model": "tiny", "prompt": f"{i % 20}:", "max_tokens": 5 + i % 20, "temperature": 0}
            if i % 2:
                return (await client.completions.create(**fields)).choices[0].text
            return "".join([c.choices[0].text async for c in await client.completions.create(**fields, stream=True)])

        return list(await asyncio.gather(*(one(i) for i in range(count))))


def test_two_hundred_at_once_lose_nothing(server: RunningServer, client: openai.OpenAI) -> None:
    import asyncio

    texts = asyncio.run(_many(server, 200))
    assert len(texts) == 200
    for i in range(20):
        assert len(set(texts[i::20])) == 1, "requests with the same prompt differ"
    alone = client.completions.create(model="tiny", prompt="3:", max_tokens=8, temperature=0).choices[0].text
    assert texts[3] == alone
    assert server.load()["server_load"] == 0


def test_a_stream_has_a_chunk_for_text_that_is_not_complete(client: openai.OpenAI) -> None:
    lead = "\N{LATIN SMALL LETTER A WITH CIRCUMFLEX}"  # stands for byte E2, with which a character of three begins
    token = sorted(pre_tokenizers.ByteLevel.alphabet()).index(lead)
    stream = client.completions.create(
        model="tiny",
        prompt="So",
        max_tokens=6,
        logit_bias={str(token): 100},
        stream=True,
        extra_body={"ignore_eos": True},
    )
    texts = [chunk.choices[0].text for chunk in stream if chunk.choices and chunk.choices[0].finish_reason is None]
    assert len(texts) >= 5
    assert texts[0] == ""


@pytest.mark.parametrize("fields", [{"max_completion_tokens": 3}, {"max_completion_tokens": 3, "max_tokens": 3}])
def test_a_completion_takes_the_limit_by_both_names(client: openai.OpenAI, fields: dict[str, int]) -> None:
    """Load generators send both at once."""
    body = {"prompt": "x", "temperature": 0, "ignore_eos": True, **fields}
    answer = client.completions.create(model="tiny", prompt="x", max_tokens=None, extra_body=body)
    assert answer.usage is not None and answer.usage.completion_tokens == 3
