"""Conversations are normalized the same way for ``LLM.chat`` and over HTTP; what cannot be served is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from quire.core.engine.args import EngineArgs
from quire.core.engine.chat import normalize_messages, template_variables
from quire.core.engine.llm import LLM
from quire.core.engine.tokenizer import Tokenizer
from quire.core.errors import ConfigError, InvalidRequestError, UnsupportedError
from quire.core.loading.hub import resolve_model
from quire.core.sampling_params import SamplingParams
from quire.server.http.protocol.chat import ChatBody

CALL = {"id": "c", "type": "function", "function": {"name": "now", "arguments": '{"zone": "UTC"}'}}
BROKEN = {"id": "c", "type": "function", "function": {"name": "now", "arguments": '{"zone": '}}
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}<{{ c.function.name }}"
    "{% for k, v in c.function.arguments.items() %} {{ k }}={{ v }}{% endfor %}>{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}{{ mood }}"
)


def test_contents_become_one_string_and_arguments_objects() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "input_text", "text": "two"}]
    messages = [
        {"role": "user", "content": parts, "name": "ada"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
        {"role": "assistant", "tool_calls": [BROKEN]},
    ]
    user, assistant, broken = normalize_messages(messages)
    assert user == {"role": "user", "content": "one\ntwo", "name": "ada"}
    assert assistant["content"] == "" and "refusal" not in assistant
    assert assistant["tool_calls"][0]["function"]["arguments"] == {"zone": "UTC"}
    assert broken["tool_calls"] == [BROKEN]
    assert messages[1]["tool_calls"] == [CALL], "the caller's messages are left as they are"


@pytest.mark.parametrize(
    "printed",
    [
        "{{ c.function.arguments | tojson }}",
        "{{ '<' + c.function.arguments + '>' }}",
        "{{ '<' ~ c.function.arguments }}",
        "{{ c.function.arguments }}",
        "{{ c.function.arguments | trim }}",
        "{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}"
        "{{ c.function.arguments | tojson }}{% endif %}",
    ],
)
def test_templates_that_want_arguments_as_an_object_or_as_text_both_render(printed: str) -> None:
    template = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}" + printed + "{% endfor %}{% endfor %}"
    )
    tokenizer = Tokenizer(str(resolve_model("quire-tiny")), template)
    ids = tokenizer.apply_chat_template([{"role": "assistant", "content": None, "tool_calls": [CALL]}])
    assert '{"zone": "UTC"}' in tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("message", "place"),
    [
        ({"content": "no role"}, "messages[1]"),
        ("a string", "messages[1]"),
        ({"role": "user", "content": 3}, "messages[1].content"),
        ({"role": "assistant", "tool_calls": "now"}, "messages[1].tool_calls"),
    ],
)
def test_malformed_messages_are_refused_with_their_place(message: object, place: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        normalize_messages([{"role": "user", "content": "fine"}, message])  # type: ignore[list-item]
    assert caught.value.param == place and not isinstance(caught.value, UnsupportedError)


def test_parts_that_are_not_text_are_unsupported() -> None:
    image = {"type": "image_url", "image_url": {"url": "x"}}
    with pytest.raises(UnsupportedError, match="only text parts are supported, got 'image_url'") as caught:
        normalize_messages([{"role": "user", "content": [{"type": "text", "text": "a"}, image]}])
    assert caught.value.param == "messages[0].content[1]"


def test_the_generation_prompt_gives_way_to_a_continued_message() -> None:
    messages = [{"role": "user", "content": "a"}]
    assert template_variables(messages)["add_generation_prompt"] is True
    assert template_variables(messages, continue_final_message=True)["add_generation_prompt"] is False
    with pytest.raises(InvalidRequestError, match="cannot go with add_generation_prompt=true"):
        template_variables(messages, continue_final_message=True, add_generation_prompt=True)
    assert template_variables(messages, chat_template_kwargs={"mood": "calm"}) == {
        "messages": messages,
        "tools": None,
        "add_generation_prompt": True,
        "continue_final_message": False,
        "mood": "calm",
    }


@pytest.mark.parametrize("name", ["tools", "messages", "add_generation_prompt", "padding", "return_dict", "self"])
def test_a_variable_that_cannot_reach_the_template_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"chat_template_kwargs.{name}: cannot be set here") as caught:
        template_variables([{"role": "user", "content": "a"}], chat_template_kwargs={name: 1})
    assert caught.value.param == f"chat_template_kwargs.{name}"


@pytest.mark.parametrize("arguments", ["[" * 100_000, "[" * 100_000 + "]" * 100_000, "1" * 5000, '{"a": "b'])
def test_tool_arguments_that_are_not_json_stay_text(arguments: str) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "now", "arguments": arguments}}
    [message] = normalize_messages([{"role": "assistant", "tool_calls": [call]}])
    assert message["tool_calls"] == [call]


WITHOUT_ARGUMENTS = [{"arguments": ""}, {"arguments": " \n"}, {"arguments": None}, {"arguments": "null"}, {}]


@pytest.mark.parametrize("function", WITHOUT_ARGUMENTS)
def test_a_call_without_arguments_has_an_empty_object(function: dict[str, object]) -> None:
    talk = [{"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "now", **function}}]}]
    [as_object], [as_text] = normalize_messages(talk), normalize_messages(talk, decode_arguments=False)
    assert as_object["tool_calls"][0]["function"]["arguments"] == {}
    assert as_text["tool_calls"][0]["function"]["arguments"] == "{}"


@pytest.mark.parametrize("arguments", ['{"zone": "Europe/Ber', "[1]", "5", "now"])
def test_a_broken_call_does_not_end_the_conversation(tmp_path: Path, arguments: str) -> None:
    """A template that goes through the arguments of a call fails on text that was cut off: it sees none."""
    (tmp_path / "items.jinja").write_text(TEMPLATE)
    tokenizer = Tokenizer(str(resolve_model("quire-tiny")), str(tmp_path / "items.jinja"))
    broken = {"id": "c", "type": "function", "function": {"name": "now", "arguments": arguments}}
    talk = [{"role": "assistant", "tool_calls": [broken, CALL]}, {"role": "user", "content": "go on"}]
    assert (
        tokenizer.decode(tokenizer.apply_chat_template(talk)) == "[assistant]<now><now zone=UTC>[user]go on[assistant]"
    )


def test_a_developer_is_the_system_to_a_template_that_knows_none(tmp_path: Path) -> None:
    talk = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "hi"}]
    for template, shown in ((TEMPLATE, "system"), ("{# developer #}" + TEMPLATE, "developer")):
        (tmp_path / "roles.jinja").write_text(template)
        tokenizer = Tokenizer(str(resolve_model("quire-tiny")), str(tmp_path / "roles.jinja"))
        prompt = tokenizer.decode(tokenizer.apply_chat_template(talk))
        assert prompt == f"[{shown}]be brief[user]hi[assistant]"


def test_offline_and_http_make_the_same_prompt(tmp_path: Path) -> None:
    template = tmp_path / "plain.jinja"
    template.write_text(TEMPLATE)
    llm = LLM(
        model="quire-tiny", device="cpu", max_model_len=256, num_gpu_blocks_override=64, chat_template=str(template)
    )
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
    ]
    variables = {"mood": "calm"}
    [output] = llm.chat(messages, SamplingParams(max_tokens=1), chat_template_kwargs=variables)
    body = ChatBody.model_validate({"messages": messages, "chat_template_kwargs": variables})
    assert output.prompt_token_ids == llm.tokenizer.apply_chat_template(**body.template_arguments())
    assert llm.tokenizer.decode(output.prompt_token_ids) == "[user]a\nb[assistant]<now zone=UTC>[assistant]calm"
    with pytest.raises(TypeError, match="mood"):
        llm.chat(messages, mood="calm")  # type: ignore[call-arg]
    llm.shutdown()


def test_a_keyword_that_is_not_a_setting_is_refused_with_the_closest() -> None:
    with pytest.raises(ConfigError, match=r"'max_modl_len' is not a setting of the engine; did you mean max_model_len"):
        EngineArgs.from_kwargs(max_modl_len=3)
    with pytest.raises(ConfigError, match="'wings_of_lead' is not a setting"):
        LLM(model="quire-tiny", wings_of_lead=4)
