"""Calls of strict functions in the syntax of each family: what the masks let pass keeps the schemas."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from tests.parsing.families import FAMILIES, HAS_REASONING, Turn, load_parsers, render
from tests.structured_output.conftest import TINY
from tokenizers import AddedToken
from tokenizers import Tokenizer as BackendTokenizer

from quire import LLM
from quire.core.engine.answer_parsers import AnswerParsers
from quire.core.engine.tokenizer import Tokenizer
from quire.core.engine.tool_use import ToolUse, read_tool_use
from quire.core.errors import UnsupportedError
from quire.core.parsing.message import AssistantMessage
from quire.core.sampling_params import SamplingParams
from quire.core.structured_outputs import StructuredOutputsParams
from quire.plugins.parsers.reasoning import NoReasoning
from quire.plugins.parsers.tool_calls import Hermes
from quire.plugins.structured_output.guidance import GuidanceBackend
from quire.sdk import CompiledGrammar, GrammarState, TokenizerInfo

EOS, RETURN, CALL = 2, "<|return|>", "<|call|>"
SPECIAL = (
    *("<|channel|>", "<|message|>", "<|constrain|>", "<|start|>", "<|end|>", RETURN, CALL),
    *("<think>", "</think>", "[TOOL_CALLS]", "<|tool_call|>", "<|python_tag|>", "<|python_start|>", "<|python_end|>"),
    *(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
    ),
    *("<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>"),
    *("<|tool_call_end|>", "<|tool_calls_section_end|>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
)
BOOK = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "days": {"type": "integer", "minimum": 1, "maximum": 30},
        "unit": {"$ref": "#/$defs/Unit"},
        "exact": {"type": "boolean"},
        "near": {"anyOf": [{"type": "number", "minimum": 0, "maximum": 9}, {"type": "null"}]},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
        "code": {"type": "string", "pattern": "^[A-Z]{2}\\d$"},
        "level": {"anyOf": [{"enum": ["low", "high"], "type": "string"}, {"type": "null"}]},
    },
    "required": ["city", "days", "unit"],
    "additionalProperties": False,
    "$defs": {"Unit": {"enum": ["celsius", "kelvin"]}},
}
FUNCTIONS = {"book": BOOK, "get_time": {"type": "object", "properties": {}, "additionalProperties": False}}
VALIDATORS = {name: jsonschema.Draft202012Validator(schema) for name, schema in FUNCTIONS.items()}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema, "strict": True}}
    for name, schema in FUNCTIONS.items()
]
BOUNDED_TOOLS = [{"type": "function", "function": {**each["function"]}} for each in TOOLS]
BOUNDED_TOOLS[0]["function"]["parameters"] = {
    **BOOK,
    "properties": {name: schema for name, schema in BOOK["properties"].items() if name != "note"},
}
BOOKING = {"city": "Paris", "days": 2, "unit": "kelvin", "exact": True, "near": None, "note": "a <b>", "level": "low"}
INVALID = [
    {**BOOKING, "days": 31},
    {**BOOKING, "city": "much too long"},
    {**BOOKING, "unit": "fahrenheit"},
    {**BOOKING, "other": 1},
    {key: value for key, value in BOOKING.items() if key != "days"},
    {**BOOKING, "level": "middle"},
    {**BOOKING, "code": "abc"},
]


class Model:
    """A tokenizer with or without the families' markers as special tokens, and a grammar backend over it."""

    def __init__(self, folder: Path, is_special: bool) -> None:
        backend = BackendTokenizer.from_file(str(TINY / "tokenizer.json"))
        if is_special:
            backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
        backend.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text((TINY / "tokenizer_config.json").read_text())
        self.tokenizer = Tokenizer(str(folder))
        ends = [backend.token_to_id(text) for text in (RETURN, CALL)] if is_special else []
        self.eos = [EOS, *ends]
        size = 32 * -(-backend.get_vocab_size() // 32)
        self.backend = GuidanceBackend(TokenizerInfo((folder / "tokenizer.json").read_text(), size, tuple(self.eos)))
        self.backend.prepare_masks()
        self.num_words = size // 32

    def make_parsers(self, family: str) -> AnswerParsers:
        return AnswerParsers(*load_parsers(family), self.tokenizer, on_quarantine=lambda plugin: None)

    def compile(self, parsers: AnswerParsers, use: ToolUse, **fields: Any) -> CompiledGrammar:
        params = parsers.constrain_params(use, [5], SamplingParams(**fields)).structured_outputs
        assert params is not None
        self.backend.validate_params(params)
        return self.backend.compile(params)

    def list_allowed(self, state: GrammarState) -> np.ndarray:
        mask = np.zeros(self.num_words, np.int32)
        state.fill_mask(mask)
        return np.unpackbits(mask.view(np.uint8), bitorder="little").nonzero()[0]

    def accepts(self, grammar: CompiledGrammar, text: str) -> bool:
        """The text, up to a token that ends answers if it has one."""
        state, mask = grammar.start(), np.zeros(self.num_words, np.int32)
        token_ids = self.tokenizer.encode(text, add_special_tokens=False)
        for token in (*token_ids, EOS):
            state.fill_mask(mask)
            if not mask[token // 32] >> token % 32 & 1:
                return False
            assert state.advance([token]) == 1
            if token in self.eos:
                return True
        raise AssertionError

    def read(self, parsers: AnswerParsers, use: ToolUse, text: str) -> AssistantMessage:
        parser = parsers.make_parser(use, [5])
        assert parser is not None
        return AssistantMessage.from_events([*parser.feed(text), *parser.finish()])


@pytest.fixture(scope="module", params=[True, False], ids=["special tokens", "plain text"])
def model(request, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("strict"), request.param)


def check_calls(message: AssistantMessage) -> int:
    for call in message.tool_calls:
        VALIDATORS[call.name].validate(json.loads(call.arguments))
    return len(message.tool_calls)


def test_a_parser_without_a_format_of_calls_refuses_strict_functions(model: Model) -> None:
    """They would not be what was asked for. Functions that are not strict, and calls that are required, go on."""

    class Unwritten(Hermes):
        call_formats = ()

    parsers = AnswerParsers(Unwritten(), NoReasoning(), model.tokenizer, on_quarantine=lambda plugin: None)
    with pytest.raises(UnsupportedError, match=r"strict.*Unwritten.*'book', 'get_time'"):
        parsers.constrain_params(read_tool_use(TOOLS), [5], SamplingParams())
    loose = [{"type": "function", "function": {**each["function"], "strict": False}} for each in TOOLS]
    assert parsers.constrain_params(read_tool_use(loose), [5], SamplingParams()).structured_outputs is None
    assert parsers.constrain_params(read_tool_use(TOOLS, "required"), [5], SamplingParams()).structured_outputs


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_model_writes_is_accepted(model: Model, family: str) -> None:
    """Answers as the family's template writes them: calls, several calls, text, reasoning before either."""
    parsers, use = model.make_parsers(family), read_tool_use(TOOLS)
    turns = [Turn(calls=[("book", BOOKING)]), Turn(content="Look at [1] {a: b}.")]
    if family != "openai":  # whose answers end with a call
        turns += [Turn(calls=[("book", BOOKING), ("get_time", {})]), Turn(calls=[("get_time", {}), ("book", BOOKING)])]
    grammar = model.compile(parsers, use)
    for turn in turns:
        assert model.accepts(grammar, render(family, turn)), render(family, turn)
        message = model.read(parsers, use, render(family, turn))
        assert [(call.name, json.loads(call.arguments)) for call in message.tool_calls] == turn.calls


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_arguments_that_break_their_schema_cannot_be_written(model: Model, family: str, choice: str) -> None:
    grammar = model.compile(model.make_parsers(family), read_tool_use(TOOLS, choice))
    for arguments in INVALID:
        text = render(family, Turn(calls=[("book", arguments)]))
        assert not model.accepts(grammar, text), text
        assert not model.accepts(grammar, "\n " + text), text


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_whatever_passes_keeps_its_schema(model: Model, family: str, choice: str) -> None:
    """Answers drawn at random from the masks."""
    parsers, rng, num_calls = model.make_parsers(family), random.Random(family + choice), 0
    uses = [read_tool_use(BOUNDED_TOOLS, choice, parallel_tool_calls=is_parallel) for is_parallel in (True, False)]
    grammars = [model.compile(parsers, use) for use in uses]
    for index in range(6):
        use, state, token_ids = uses[index % 2], grammars[index % 2].start(), []
        if choice == "auto" or family in HAS_REASONING:  # it would hardly begin a call by itself
            begin = render(family, Turn(calls=[("book", {"city": "Paris"})])).partition("Paris")[0]
            token_ids = model.tokenizer.encode(begin, add_special_tokens=False)[:-1]
            assert state.advance(token_ids) == len(token_ids)
        for count in range(300):
            allowed = model.list_allowed(state)
            others = allowed[~np.isin(allowed, model.eos)]
            if not len(others) or (len(others) < len(allowed) and (count > 40 or rng.random() < 0.3)):
                break
            token_ids.append(int(rng.choice(others)))
            assert state.advance(token_ids[-1:]) == 1
        else:
            continue  # one call after the other
        text = model.tokenizer.decode(token_ids)
        message = model.read(parsers, use, text)
        num_calls += check_calls(message)
        if choice == "required":
            assert message.tool_calls and not message.content, text
    assert num_calls >= 4


@pytest.mark.parametrize("family", FAMILIES)
def test_no_other_way_of_writing_a_call_gets_round_it(model: Model, family: str) -> None:
    """Every family's syntax, read by each parser: what it takes for a call has been enforced, or cannot be written."""
    parsers, use = model.make_parsers(family), read_tool_use(TOOLS)
    grammar = model.compile(parsers, use)
    texts = [render(each, Turn(calls=[("book", arguments)])) for each in FAMILIES for arguments in INVALID[:2]]
    texts += [
        f"<tool_call>{json.dumps({'name': 'book', 'arguments': INVALID[0]})}",
        f"[TOOL_CALLS]book {json.dumps({})}",
        f" to=functions.book<|channel|>commentary json<|message|>{json.dumps(INVALID[0])}<|call|>",
    ]
    for text in texts:
        for before in ("", "\u00a0\n", "Yes.\n"):
            if model.accepts(grammar, before + text):
                check_calls(model.read(parsers, use, before + text))


@pytest.mark.parametrize("family", FAMILIES)
def test_functions_that_are_not_strict_are_free_beside_others(model: Model, family: str) -> None:
    parsers = model.make_parsers(family)
    free = {"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}
    use = read_tool_use([TOOLS[0], free])
    grammar = model.compile(parsers, use)
    assert model.accepts(grammar, render(family, Turn(calls=[("get", {"key": "(a) b", "n": [1, {"x": None}]})])))
    assert model.accepts(grammar, render(family, Turn(calls=[("book", BOOKING)])))
    if family != "openai":
        calls = [("book", BOOKING), ("get", {"other": True})]
        assert model.accepts(grammar, render(family, Turn(calls=calls)))
        invalid = [("get", {"other": True}), ("book", INVALID[0])]
        assert not model.accepts(grammar, render(family, Turn(calls=invalid)))


@pytest.mark.parametrize("family", ["qwen3_coder", "glm45", "pythonic"])
def test_what_the_syntax_cannot_keep_is_refused_by_name(model: Model, family: str) -> None:
    parsers = model.make_parsers(family)
    for schema, word in (
        ({**BOOK, "minProperties": 2}, "'minProperties'"),
        ({**BOOK, "required": ["nothing"]}, "'required'"),
        ({"type": "object", "properties": {"class": {"type": "string", "format": "date"}, "a>b</": {}}}, ""),
    ):
        function = {"name": "f", "parameters": schema, "strict": True}
        tools = [{"type": "function", "function": function}]
        with pytest.raises(UnsupportedError, match=f"'f' is strict.*{word}"):
            parsers.constrain_params(read_tool_use(tools), [5], SamplingParams())
        tag = parsers.constrain_params(read_tool_use(tools, "required"), [5], SamplingParams()).structured_outputs
        assert tag is not None and tag.load_json()["structures"][0]["begin"].startswith("<tool_call>\n{"), "as JSON"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_format_of_no_standard_asserts_nothing_of_an_argument(model: Model, family: str) -> None:
    file = {"type": "string", "format": "path", "maxLength": 8}
    data = {"anyOf": [{"type": "string", "format": "binary"}, {"type": "null"}]}
    schema = {"type": "object", "properties": {"file": file, "data": data}, "required": ["file"]}
    use = read_tool_use([{"type": "function", "function": {"name": "read", "parameters": schema, "strict": True}}])
    grammar = model.compile(model.make_parsers(family), use)
    assert model.accepts(grammar, render(family, Turn(calls=[("read", {"file": "a/b.txt", "data": "xyz"})])))
    assert not model.accepts(grammar, render(family, Turn(calls=[("read", {"file": "a/bcd.txt"})])))


@pytest.mark.parametrize("name", ["time", "email", "uuid", "ipv4", "uri", "regex", "idn-email", "duration", "hostname"])
def test_a_format_of_the_standard_is_never_passed_over(model: Model, name: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "format": name}}}
    use = read_tool_use([{"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}])
    with pytest.raises(UnsupportedError, match="'f' is strict: 'format' at /properties/a"):
        model.make_parsers("glm45").constrain_params(use, [5], SamplingParams())


def test_an_answer_in_json_stands_in_the_final_channel(model: Model) -> None:
    """gpt-oss thinks, says something, and answers or calls."""
    if len(model.eos) == 1:
        pytest.skip("its channels are special tokens")
    parsers, form = model.make_parsers("openai"), StructuredOutputsParams(json=BOOK)
    grammar = model.compile(parsers, ToolUse(), structured_outputs=form)
    answer, start = json.dumps({"city": "Paris", "days": 2, "unit": "kelvin"}), "<|start|>assistant"
    thought = f"<|channel|>analysis<|message|>Is it {{}}?<|end|>{start}"
    final = f"<|channel|>final<|message|>{answer}<|return|>"
    for text in (final, thought + final, thought + thought + final):
        assert model.accepts(grammar, text)
        message = model.read(parsers, ToolUse(), text)
        assert message.content == answer and bool(message.reasoning_content) == ("analysis" in text)
    for text in (answer, thought + answer, final.replace("kelvin", "other"), "<|channel|>final<|message|>So"):
        assert not model.accepts(grammar, text)
    use = read_tool_use(TOOLS)
    either = model.compile(parsers, use, structured_outputs=form)
    said = f"<|channel|>commentary<|message|>I look.<|end|>{start}"
    call = "<|channel|>commentary to=functions.get_time <|constrain|>json<|message|>{}<|call|>"
    for text in (thought + said + call, final, thought + final):
        assert model.accepts(either, text)
    assert [each.name for each in model.read(parsers, use, thought + said + call).tool_calls] == ["get_time"]
    required = model.compile(parsers, read_tool_use(TOOLS, "required"))
    assert model.accepts(required, thought + call) and not model.accepts(required, final)


@pytest.mark.parametrize("family", ["qwen3_coder", "pythonic", "openai"])
def test_a_model_that_writes_nothing_of_the_kind(family: str) -> None:
    """quire-tiny, which knows one syntax, calls in another one where a call is required."""
    llm = LLM("quire-tiny", device="cpu", max_model_len=1024, tool_call_parser=family)
    try:
        talk = [{"role": "user", "content": "What is paged attention?"}]
        params = [SamplingParams(temperature=1, seed=seed, max_tokens=400) for seed in range(3)]
        outputs = llm.chat([talk] * 3, params, tools=BOUNDED_TOOLS, tool_choice="required")
        messages = [output.outputs[0].message for output in outputs if output.outputs[0].finish_reason == "stop"]
        assert messages and all(check_calls(message) for message in messages)
    finally:
        llm.shutdown()
