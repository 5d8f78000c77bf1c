"""Answers as messages: special tokens reach the parsers, prompts open reasoning, a parser that fails is replaced."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as BackendTokenizer

from quire import LLM, SamplingParams
from quire.core.engine.answer_parsers import AnswerParsers
from quire.core.engine.call_constraints import EnforcedCalls
from quire.core.engine.tokenizer import Tokenizer
from quire.core.engine.tool_use import ToolUse, read_tool_use
from quire.core.errors import InvalidRequestError, PluginError, RequestFailedError
from quire.core.loading.chat_template import read_chat_templates
from quire.core.messages import CompletionOutput
from quire.core.plugin.manager import PluginManager
from quire.core.sampling_params import SamplingParams as Params
from quire.core.structured_outputs import StructuredOutputsParams
from quire.sdk import JsonToolParser

TOOLS = [{"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}]
SPECIAL = (
    *("[TOOL_CALLS]", "<|channel|>", "<|message|>", "<|call|>", "<|constrain|>", "<|other|>", "<think>", "</think>"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
)


@pytest.fixture(scope="module")
def tokenizer(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One whose vocabulary has the markers of several families as special tokens."""
    folder = tmp_path_factory.mktemp("special")
    backend = BackendTokenizer.from_file(str(tiny / "tokenizer.json"))
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text((tiny / "tokenizer_config.json").read_text())
    return Tokenizer(str(folder))


def make_parsers(tokenizer, tools="none", reasoning="none", **options):
    manager = PluginManager()
    return AnswerParsers(
        options.pop("parser", None) or manager.load_class("tool_parser", tools)(),
        manager.load_class("reasoning_parser", reasoning)(),
        tokenizer,
        names=(tools, reasoning),
        on_quarantine=options.pop("on_quarantine", lambda plugin: None),
        **options,
    )


def answer(tokenizer, text, finish_reason="stop"):
    """A completion as the engine gives it: special tokens are not shown."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    shown = tokenizer.decode(ids, skip_special_tokens=True)
    return CompletionOutput(0, shown, ids, finish_reason=finish_reason, stop_reason="a stop string")


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("mistral", '[TOOL_CALLS][{"name": "get_time", "arguments": {}}]'),
        ("deepseek_v3", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_time<｜tool▁sep｜>{}<｜tool▁call▁end｜>"),
        ("openai", "<|channel|>commentary to=functions.get_time <|constrain|>json<|message|>{}<|call|>"),
    ],
)
def test_special_tokens_reach_the_parser(tokenizer, family, text):
    parsers, use = make_parsers(tokenizer, family), read_tool_use(TOOLS)
    completion = answer(tokenizer, "Look.<|other|>" + text)
    assert "TOOL_CALLS" not in completion.text and "<" not in completion.text
    message = parsers.read_message(use, [5], completion, Params())
    assert message.content == "Look." and [call.name for call in message.tool_calls] == ["get_time"]
    assert message.to_dict()["tool_calls"][0]["function"] == {"name": "get_time", "arguments": "{}"}
    plain = parsers.read_message(ToolUse(), [5], completion, Params())
    assert plain.content == completion.text and not plain.tool_calls


def test_only_tokens_of_the_parser_are_shown(tokenizer):
    parsers = make_parsers(tokenizer, "mistral", "qwen3")
    [shown] = {tokenizer.decode([token]) for token in parsers.find_shown_tokens(read_tool_use(TOOLS))} - {
        "<think>",
        "</think>",
    }
    assert shown == "[TOOL_CALLS]"
    assert len(parsers.find_shown_tokens(ToolUse())) == 2


def test_reasoning_that_the_prompt_began(tokenizer):
    parsers = make_parsers(tokenizer, reasoning="qwen3")
    completion = answer(tokenizer, "So.</think>Yes.")
    opened = tokenizer.encode("Is it?<think>\n", add_special_tokens=False)
    message = parsers.read_message(ToolUse(), opened, completion, Params())
    assert (message.content, message.reasoning_content) == ("Yes.", "So.")
    closed = tokenizer.encode("Is it?<think></think>", add_special_tokens=False)
    message = parsers.read_message(ToolUse(), closed, answer(tokenizer, "Yes."), Params())
    assert (message.content, message.reasoning_content) == ("Yes.", None)


class Breaks(JsonToolParser):
    """Raises at every call."""

    begin = ("<tool_call>",)

    def parse_calls(self, text, calls):
        raise RuntimeError("not today")
        yield


def test_a_parser_that_raises_is_quarantined(tokenizer, caplog):
    quarantined = []
    parsers = make_parsers(tokenizer, parser=Breaks(), on_quarantine=quarantined.append)
    use, text = read_tool_use(TOOLS), 'A <tool_call>{"name": "get_time"}</tool_call>'
    with caplog.at_level(logging.ERROR):
        message = parsers.read_message(use, [5], answer(tokenizer, text), Params())
    assert message.content == text and not message.tool_calls
    assert [(each.kind, each.reason) for each in quarantined] == [("tool_parser", "raised")]
    assert "not today" in caplog.text
    assert not parsers.find_calls_in(use) and parsers.make_parser(use, [5]) is None


class HasNoFormats(Breaks):
    """Raises where it is asked how calls are written."""

    def list_call_formats(self, name):
        raise RuntimeError("not today")


def test_a_parser_that_cannot_say_its_formats_is_quarantined(tokenizer, caplog):
    quarantined = []
    parsers = make_parsers(tokenizer, parser=HasNoFormats(), on_quarantine=quarantined.append)
    constrained = parsers.constrain_params(read_tool_use(TOOLS, "required"), [5], Params())
    assert constrained.structured_outputs.load_json()["triggers"] == ["<tool_call>"], "in another syntax"
    assert [(each.kind, each.reason) for each in quarantined] == [("tool_parser", "raised")]
    assert "not today" in caplog.text
    text = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
    message = parsers.read_message(read_tool_use(TOOLS, "required"), [5], answer(tokenizer, text), Params())
    assert [call.name for call in message.tool_calls] == ["get_time"], "what is enforced is read all the same"
    parsers = make_parsers(tokenizer, parser=HasNoFormats())
    strict = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": True}}
    with pytest.raises(RequestFailedError, match=r"tool_parser/.* failed; the server's log says why"):
        parsers.constrain_params(read_tool_use([strict]), [5], Params())  # what is strict is not lifted


def test_the_models_parser_has_no_part_in_what_enforced_calls_raise(tokenizer, caplog, monkeypatch):
    quarantined = []
    monkeypatch.setattr(EnforcedCalls, "list_call_formats", HasNoFormats.list_call_formats)
    parsers = make_parsers(tokenizer, "glm45", parser=JsonToolParser(), on_quarantine=quarantined.append)
    with pytest.raises(RequestFailedError, match=r"the calls cannot be enforced; the server's log says why"):
        parsers.constrain_params(read_tool_use(TOOLS, "required"), [5], Params())
    assert "not today" in caplog.text and not quarantined


class HasNoMarkers(Breaks):
    """Has what are no texts."""

    begin = (5,)


def test_a_parser_that_cannot_be_constructed_is_refused_by_name(tokenizer, llm):
    choice = replace(llm.config.plugin("tool_parser"), name="mine", target=f"{__name__}:HasNoMarkers")
    config = replace(llm.config, plugins={**llm.config.plugins, "tool_parser": choice})
    with pytest.raises(PluginError, match="tool_parser/mine cannot be constructed: TypeError: its markers are"):
        AnswerParsers.from_config(config, tokenizer, lambda plugin: None)


def test_calls_of_the_models_own_accord_can_be_turned_off(tokenizer):
    parsers = make_parsers(tokenizer, "hermes", auto_tool_choice=False)
    assert not parsers.find_calls_in(read_tool_use(TOOLS))
    assert parsers.find_calls_in(read_tool_use(TOOLS, "required"))


@pytest.mark.parametrize(
    ("reasoning", "prompt", "expected"),
    [
        ("none", "Hm?", (None, None)),
        ("qwen3", "Hm?", ("<think>", "</think>")),
        ("qwen3", "Hm?<think>\n", (None, "</think>")),
        ("qwen3", "Hm?<think>\n\n</think>\n\n", (None, None)),
        ("deepseek_r1", "Hm?", (None, "</think>")),
    ],
)
def test_a_constraint_begins_where_reasoning_ends(tokenizer, reasoning, prompt, expected):
    parsers = make_parsers(tokenizer, "hermes", reasoning)
    prompt_token_ids = tokenizer.encode(prompt, add_special_tokens=False)
    given = Params(structured_outputs=StructuredOutputsParams(json_object=True))
    for use, params in ((ToolUse(), given), (read_tool_use(TOOLS, "required"), Params())):
        constraint = parsers.constrain_params(use, prompt_token_ids, params).structured_outputs
        assert (constraint.reasoning_start, constraint.reasoning_end) == expected
    for use in (ToolUse(), read_tool_use(TOOLS), read_tool_use(TOOLS, "none")):
        params = Params()
        assert parsers.constrain_params(use, prompt_token_ids, params) is params


@pytest.mark.parametrize(
    ("family", "trigger"), [("mistral", "[TOOL_CALLS]"), ("glm45", "<tool_call>"), ("none", "<tool_call>")]
)
def test_required_calls_are_read_in_the_form_that_is_enforced(tokenizer, family, trigger):
    parsers, use = make_parsers(tokenizer, family), read_tool_use(TOOLS, "required")
    tag = parsers.constrain_params(use, [5], Params()).structured_outputs.load_json()
    assert tag["triggers"] == [trigger] and tag["free_text"] is False and tag["at_least_one"] is True
    for structure in tag["structures"]:
        text = structure["begin"] + ("" if "arguments" in structure else "{}") + structure["end"]
        message = parsers.read_message(use, [5], answer(tokenizer, text), Params())
        assert message.content is None and [call.name for call in message.tool_calls] == ["get_time"]


def test_strict_functions_keep_their_schema_beside_others(tokenizer):
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}}
    strict = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
    parsers = make_parsers(tokenizer, "hermes")
    tag = parsers.constrain_params(read_tool_use([*TOOLS, strict]), [5], Params()).structured_outputs.load_json()
    assert tag["free_text"] is True and tag["at_least_one"] is False
    assert [each["schema"] for each in tag["structures"]] == [{"type": "object"}, schema]
    with pytest.raises(InvalidRequestError, match="tool_choice"):
        given = Params(structured_outputs=StructuredOutputsParams(regex="a+"))
        parsers.constrain_params(read_tool_use(TOOLS, "required"), [5], given)


def function(name):
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ("auto", {"a", "b"}, None)),
        ("auto", ("auto", {"a", "b"}, None)),
        ("none", ("none", {"a", "b"}, None)),
        ("required", ("required", {"a", "b"}, None)),
        (function("b"), ("required", {"b"}, 1)),
        ({"type": "function", "name": "b"}, ("required", {"b"}, 1)),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [function("a")]}}, ("auto", {"a"}, None)),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"name": "a"}]}, ("required", {"a"}, None)),
    ],
)
def test_tool_choice(choice, expected):
    use = read_tool_use([function("a"), function("b")], choice)
    assert (use.choice, set(use.functions), use.max_calls) == expected


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ([{"type": "code_interpreter"}], None, "tools[0].type"),
        ([{"type": "function"}], None, "tools[0].function.name"),
        ([{"type": "function", "function": {"name": ""}}], None, "tools[0].function.name"),
        ([{"type": "function", "function": {"name": "a", "parameters": [1]}}], None, "tools[0].function.parameters"),
        ([function("a")], "always", "tool_choice"),
        ([function("a")], function("c"), "tool_choice"),
        ([function("a")], {"type": "function", "function": 3}, "tool_choice"),
        ([function("a")], {"type": "allowed_tools"}, "tool_choice"),
        ([function("a")], {"type": "allowed_tools", "tools": [function("a")], "mode": 3}, "tool_choice"),
        (None, "required", "tool_choice"),
        (["a"], None, "tools[0]"),
    ],
)
def test_tools_that_say_nothing_are_refused(tools, choice, param):
    with pytest.raises(InvalidRequestError) as refused:
        read_tool_use(tools, choice)
    assert refused.value.param == param and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        ("{{ '<tool_call>' }}", "hermes", "none"),
        ("{{ '<tool_call>\n<function=' }} <think>", "qwen3_coder", "qwen3"),
        ("<tool_call> <arg_key> <think>", "glm45", "qwen3"),
        ("[TOOL_CALLS]", "mistral", "none"),
        ("<｜tool▁calls▁begin｜> <｜Assistant｜><think>", "deepseek_v3", "deepseek_r1"),
        ("<|start|>assistant<|channel|>analysis <|channel|>commentary", "openai", "openai_gptoss"),
        ("<|tool_calls_section_begin|>", "kimi_k2", "none"),
        ("<think></think> <response></response> <|start_of_role|>", "granite", "granite"),
        ("<think> <response>tool result", "none", "qwen3"),
        ("plain", "none", "none"),
        ("", "none", "none"),
    ],
)
def test_auto_looks_at_the_chat_template(template, tools, reasoning):
    manager, context = PluginManager(), {"chat_template": template}
    assert manager.resolve_plugin("tool_parser", "auto", context, announce=False).name == tools
    assert manager.resolve_plugin("reasoning_parser", "auto", context, announce=False).name == reasoning


def test_chat_templates_are_read_from_every_place(tmp_path):
    assert read_chat_templates(tmp_path) == ""
    (tmp_path / "tokenizer_config.json").write_text("{ broken")
    assert read_chat_templates(tmp_path) == ""
    named = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}, {"name": 3}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    (tmp_path / "chat_template.jinja").write_text("C")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tools.jinja").write_text("D")
    assert read_chat_templates(tmp_path).split() == ["C", "D", "A", "B"]
    assert read_chat_templates(tmp_path, "{{ x }}") == "{{ x }}"
    assert read_chat_templates(tmp_path, str(tmp_path / "chat_template.jinja")) == "C"


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_current_weather",
        "description": "Get the weather for a city.",
        "parameters": {
            "type": "object",
            "properties": {"location": {"type": "string"}, "unit": {"type": "string"}},
            "required": ["location"],
        },
    },
}


def test_chat_in_python_gives_messages():
    llm = LLM(model="quire-tiny", device="cpu")
    try:
        greedy = SamplingParams(temperature=0, max_tokens=100)
        talk = [{"role": "user", "content": "What is the weather in Paris in celsius?"}]
        [completion] = llm.chat(talk, greedy, tools=[WEATHER])[0].outputs
        [call] = completion.message.tool_calls
        assert (call.name, json.loads(call.arguments)["location"]) == ("get_current_weather", "Paris")
        assert completion.message.content is None and completion.text.startswith("<tool_call>")
        result = {"role": "tool", "tool_call_id": call.call_id, "content": '{"temperature": 21}'}
        [completion] = llm.chat([*talk, completion.message.to_dict(), result], greedy, tools=[WEATHER])[0].outputs
        assert "21" in completion.message.content and not completion.message.tool_calls
        [completion] = llm.chat(talk, greedy, tools=[WEATHER], tool_choice="none")[0].outputs
        assert not completion.message.tool_calls
    finally:
        llm.shutdown()


def test_names_are_in_the_configuration(llm):
    assert llm.config.plugin("tool_parser").name == "none"
    assert llm.config.plugin("reasoning_parser").name == "none"
