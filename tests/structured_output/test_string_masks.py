"""Masks that are derived inside strings are those that the library computes, bit for bit."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.structured_output.conftest import EOS
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from quire import StructuredOutputsParams
from quire.plugins.structured_output.grammar_state import GuidanceState
from quire.plugins.structured_output.string_bounds import find_string_bounds
from quire.plugins.structured_output.string_masks import StringMasks
from quire.sdk import MaskRequest

WORDS = 4096 // 32
LENGTHS = [0, 1, 2, 3, 5, 9, 14, 23, 40, 90, 400]
NAMES = ["a", "name", ":b", "z" * 7, "é", "to\nken", 'qu"ote', "back\\slash", "\U0001f600", "long name of a property"]


@st.composite
def strings(draw) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    least, most = sorted((draw(st.sampled_from(LENGTHS)), draw(st.sampled_from(LENGTHS))))
    kind = draw(st.integers(0, 4))
    if kind & 1:
        schema["maxLength"] = most
    if kind & 2:
        schema["minLength"] = most if draw(st.booleans()) else least
    return schema


leaves = st.one_of(
    strings(),
    strings(),
    st.lists(st.sampled_from([*NAMES, "z" * 12, 7, None]), min_size=1, max_size=4, unique=True).map(
        lambda values: {"enum": values}
    ),
    st.sampled_from([{"type": "integer"}, {"type": "boolean"}, {"const": "zebra"}, {"type": ["string", "null"]}, {}]),
)


@st.composite
def objects(draw, values) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(NAMES), max_size=3, unique=True))
    schema: dict[str, Any] = {"type": "object", "properties": {name: draw(values) for name in names}}
    schema["required"] = [name for name in names if draw(st.integers(0, 3))]
    if draw(st.integers(0, 3)):
        schema["additionalProperties"] = False
    elif draw(st.booleans()):
        schema["additionalProperties"] = draw(values)
    return schema


@st.composite
def arrays(draw, values) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "array", "items": draw(values), "minItems": draw(st.integers(0, 2))}
    if draw(st.booleans()):
        schema["maxItems"] = 3
    if draw(st.booleans()):
        schema["prefixItems"] = [draw(values)]
    return schema


@st.composite
def unions(draw, values) -> dict[str, Any]:
    cases = [draw(values), draw(st.sampled_from([{"type": "null"}, {"type": "string", "maxLength": 12}]))]
    return {draw(st.sampled_from(["anyOf", "oneOf"])): cases}


@st.composite
def records(draw) -> dict[str, Any]:
    """Objects without other properties, of numbers and of strings that may not end at once."""
    least = st.sampled_from(LENGTHS[4:])
    lengths = least.flatmap(lambda n: st.sampled_from([{"minLength": n}, {"minLength": n, "maxLength": n + n % 3}]))
    numbers = st.sampled_from([{"type": "integer"}, {"type": "number"}, {"type": "number", "maximum": 40}])
    values = lengths.map(lambda bounds: {"type": "string", **bounds}) | numbers
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True))
    properties = {name: draw(values) for name in names}
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


schemas = records() | st.recursive(
    leaves, lambda values: st.one_of(objects(values), objects(values), arrays(values), unions(values)), max_leaves=6
)


class Vocabulary:
    """Tokens by what they do in a string: close it, escape, be a part of a character, or none of these."""

    def __init__(self, texts: list[str]) -> None:
        self.words = [token for token, text in enumerate(texts) if text.isalnum()]
        self.odd = {sign: np.array([sign in text for text in texts]) for sign in '"\\\ufffd'}
        self.plain = ~np.logical_or.reduce(list(self.odd.values()))

    def choose(self, rng: random.Random, mask: np.ndarray, oddity: float) -> int:
        """Mostly a plain token that ``mask`` allows; else one that closes the string, escapes, or is a part."""
        allowed = np.unpackbits(mask.view(np.uint8), bitorder="little").astype(bool)
        wanted = self.odd[rng.choice('"\\\ufffd')] if rng.random() < oddity else self.plain
        choices = (allowed & wanted).nonzero()[0]
        return int(rng.choice(choices if len(choices) else allowed.nonzero()[0]))


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary([tokenizer.decode([token], skip_special_tokens=False) for token in range(4096)])


@settings(max_examples=60, deadline=None)
@given(
    schema=schemas,
    blanks=st.booleans(),
    form=st.sampled_from(["json", "json", "reasoning", "tag", "tag in text"]),
    oddity=st.sampled_from([0.01, 0.05, 0.3]),
    seed=st.integers(0, 2**32),
)
def test_every_mask_is_that_of_the_library(backend, vocabulary, schema, blanks, form, oddity, seed) -> None:
    """Also behind drafts and behind what is taken back."""
    tag = {
        "structures": [{"begin": "<f>", "schema": schema, "end": "</f>"}, {"begin": "<g>", "schema": {}}],
        "triggers": ["<"],
        "free_text": form == "tag in text",
    }
    params = StructuredOutputsParams(
        **({"structural_tag": tag} if "tag" in form else {"json": json.dumps(schema)}),
        disable_any_whitespace=not blanks,
        reasoning_end="###" if form == "reasoning" else None,
    )
    try:
        backend.validate_params(params)
        grammar = backend.compile(params)
    except Exception:
        return  # nothing to walk
    rng = random.Random(seed)
    for num_tokens in (150, 40, 40):  # later answers know of places where earlier ones were
        compare_masks(backend, grammar, vocabulary, rng, oddity, num_tokens)


def compare_masks(backend, grammar, vocabulary, rng, oddity, num_tokens) -> None:
    """Walk through an answer, beside one of which nothing is derived."""
    state, plain = grammar.start(), grammar.start()
    plain.strings = None
    masks, expected = np.full((2, 3, WORDS), -1, np.int32)
    for _ in range(num_tokens):
        draft = rng.choices(vocabulary.words if rng.random() < 0.7 else range(4096), k=2) if rng.random() < 0.3 else []
        masks.fill(-1)
        expected.fill(-1)
        backend.fill_masks([MaskRequest(state, 0, draft)], masks)
        backend.fill_masks([MaskRequest(plain, 0, draft)], expected)
        assert np.array_equal(masks, expected)
        token = vocabulary.choose(rng, masks[0], oddity)
        assert state.advance([token]) == plain.advance([token]) == 1
        if token == EOS:
            break
        if rng.random() < 0.05:
            state.rollback(1)
            plain.rollback(1)
        assert list(state.forced_tokens(4)) == list(plain.forced_tokens(4))


@pytest.mark.parametrize("blanks", [True, False])
@pytest.mark.parametrize(
    "answers",
    [
        ['{"a":"xyzuvw","b":":wq"}', '{"a": "xyzuvw", "b": ":wq"}'],  # behind `":"` and behind a closing quote is `"`
        ['{"a": "xyzuvw", "b": ":wq"}', '{"a":"xyzuvw","b":":wq"}'],
        ['{"a": "xyzuvw", "b": ":wq", "c": ":smile:", ":d": "z,:y,:x"}'] * 2,
        ['{"a": "xyz", "b": ":q", "n": 12, "s": "n: 5, "}', '{"a": "xyz", "b": ":wq", "m": null, "s": "n: null"}'],
        [
            '{"a": "xyz", "b": ":q", "n": -7, "m": "a, 1", "s": ""}',
            '{"a": "xyz", "b": ":wq", "n": 0, "m": 12, "s": "a"}',
        ],
        ['{"a": "été une \U0001f600x", "b": ":wq", "c": ":smile:", ":d": "\U0001f600uvwxy"}'] * 2,
    ],
)
def test_places_that_look_alike_do_not_share_masks(backend, tokenizer, answers, blanks) -> None:
    """Token by token, and character by character: by tokens of other lengths an answer comes to other places."""
    text = {"type": "string", "minLength": 3, "maxLength": 12}
    values = {"a": text, "b": {"enum": [":wq", ":q"]}, "c": {"enum": [":smile:", ":hover"]}, ":d": text}
    values |= {"n": {"type": "integer"}, "m": {"enum": [None, 12, "a, 1"]}, "s": {"type": "string"}}
    schema = {"type": "object", "properties": values, "required": ["a", "b"], "additionalProperties": False}
    grammar = backend.compile(StructuredOutputsParams(json=json.dumps(schema), disable_any_whitespace=not blanks))
    masks, expected = np.zeros((2, 1, WORDS), np.int32)
    for answer in answers:
        pieces = re.findall(r'": "|":"|", "|","|.', answer)
        for parts in ([answer], list(answer), pieces):
            state, plain = grammar.start(), grammar.start()
            plain.strings = None
            for token in (token for part in parts for token in tokenizer.encode(part, add_special_tokens=False).ids):
                backend.fill_masks([MaskRequest(state, 0)], masks)
                backend.fill_masks([MaskRequest(plain, 0)], expected)
                assert np.array_equal(masks, expected)
                if plain.advance([token]) == 0:  # blanks that the schema's form has not
                    break
                assert state.advance([token]) == 1


@pytest.mark.parametrize("bounds", [{}, {"maxLength": 300}, {"minLength": 300, "maxLength": 300}])
def test_most_masks_of_a_string_are_derived(backend, tokenizer, monkeypatch, bounds) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", **bounds}},
        "required": ["name"],
        "additionalProperties": False,
    }
    params = StructuredOutputsParams(json=json.dumps(schema), disable_any_whitespace=True)
    state, masks = backend.compile(params).start(), np.zeros((1, WORDS), np.int32)
    tokens = tokenizer.encode('{"name": "' + ("plain words " * 30)[:300] + '"}').ids
    computed = []
    learn_mask = StringMasks.learn_mask
    monkeypatch.setattr(StringMasks, "learn_mask", lambda self, mask: (computed.append(0), learn_mask(self, mask))[1])
    for token in tokens:
        backend.fill_masks([MaskRequest(state, 0)], masks)
        assert masks[0, token // 32] >> token % 32 & 1
        assert state.advance([token]) == 1
    assert len(computed) < 15 < 40 < len(tokens)


def test_masks_are_known_before_the_first_answer(backend, tokenizer, monkeypatch) -> None:
    """Of what a tokenizer would write; what answers find out beside that is remembered, and counted."""
    values = {
        "title": {"type": "string", "minLength": 60, "maxLength": 60},
        "color": {"enum": ["red", "dark green"]},
        "is_new": {"type": "boolean"},
        "size": {"type": "object", "properties": {"unit": {"const": "cm"}}, "required": ["unit"]},
        "note": {"type": "string", "minLength": 12},
    }
    values["size"]["additionalProperties"] = False
    schema = {"type": "object", "properties": values, "required": list(values), "additionalProperties": False}
    grammar = backend.compile(StructuredOutputsParams(json=json.dumps(schema), disable_any_whitespace=True))
    answer = {"title": ("plain words " * 9)[:60], "color": "dark green", "is_new": False}
    answer |= {"size": {"unit": "cm"}, "note": "some words here"}
    computed: list[int] = []
    asked: list[int] = []
    learn_mask, get_matcher = StringMasks.learn_mask, GuidanceState.get_matcher
    monkeypatch.setattr(StringMasks, "learn_mask", lambda self, mask: (computed.append(0), learn_mask(self, mask))[1])
    monkeypatch.setattr(GuidanceState, "get_matcher", lambda self: (asked.append(0), get_matcher(self))[1])
    counts = []
    for text in (json.dumps(answer), *[json.dumps(answer | {"color": "red"}).replace("red", "r\te\td")] * 2):
        state, masks, before = grammar.start(), np.zeros((1, WORDS), np.int32), grammar.num_bytes
        for part in text.split("\t"):
            for token in tokenizer.encode(part, add_special_tokens=False).ids:
                backend.fill_masks([MaskRequest(state, 0)], masks)
                assert state.advance([token]) == 1
        counts.append((len(computed), grammar.num_bytes - before, len(asked)))
        computed.clear()
        asked.clear()
    assert counts[0] == (0, 0, 0)
    assert counts[1][0] > 0 and counts[1][1] > 0
    assert counts[2][:2] == (0, 0)


@pytest.mark.parametrize("character", ["\U0001f600", "\u4e94", "\\\\", "\\n"])
def test_a_string_goes_on_behind_a_character_of_several_tokens(backend, tokenizer, monkeypatch, character) -> None:
    """The library is asked for the masks within the character, and not where it begins or ends."""
    schema = {"type": "object", "properties": {"name": {"type": "string", "minLength": 90, "maxLength": 90}}}
    schema |= {"required": ["name"], "additionalProperties": False}
    grammar = backend.compile(StructuredOutputsParams(json=json.dumps(schema), disable_any_whitespace=True))
    [(signs, _)] = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(character)  # one for each byte
    parts = [tokenizer.encode(text, add_special_tokens=False).ids for text in ('{"name": "some words', "and then " * 8)]
    token_ids = [*parts[0], *map(tokenizer.token_to_id, signs), *parts[1]]
    state, masks, computed, asked = grammar.start(), np.zeros((1, WORDS), np.int32), [], []
    learn_mask, get_matcher = StringMasks.learn_mask, GuidanceState.get_matcher
    monkeypatch.setattr(StringMasks, "learn_mask", lambda self, mask: (computed.append(0), learn_mask(self, mask))[1])
    monkeypatch.setattr(GuidanceState, "get_matcher", lambda self: (asked.append(0), get_matcher(self))[1])
    for token in token_ids:
        backend.fill_masks([MaskRequest(state, 0)], masks)
        assert state.advance([token]) == 1
    assert (len(computed), len(asked)) == (len(character.encode()) - 1, 0)


def test_masks_within_numbers_do_not_depend_on_their_digits(backend, tokenizer, monkeypatch) -> None:
    values = {"count": {"type": "integer"}, "price": {"type": "number"}, "share": {"type": "number", "minimum": 0}}
    schema = {"type": "object", "properties": values, "required": [*values], "additionalProperties": False}
    grammar = backend.compile(StructuredOutputsParams(json=json.dumps(schema), disable_any_whitespace=True))
    computed: list[int] = []
    learn_mask = StringMasks.learn_mask
    monkeypatch.setattr(StringMasks, "learn_mask", lambda self, mask: (computed.append(0), learn_mask(self, mask))[1])
    counts = []
    for answer in (
        '{"count": 271, "price": 98.125, ',
        '{"count": 9046, "price": 3.07, ',
        '{"count": 0, "price": 0.5, ',
    ):
        state, masks = grammar.start(), np.zeros((1, WORDS), np.int32)
        for part in re.findall(r"\d|\D+", answer):
            for token in tokenizer.encode(part, add_special_tokens=False).ids:
                backend.fill_masks([MaskRequest(state, 0)], masks)
                assert state.advance([token]) == 1
        counts.append(len(computed))
    assert counts[1] == counts[0] < counts[2]


def test_what_answers_find_out_is_counted_once_and_has_room_beside_the_walk(backend, tokenizer, monkeypatch) -> None:
    """Answers of one schema in step, in a form that the walk does not write, and one more behind them."""
    names = [f"field{i}" for i in range(16)]
    properties = {name: {"type": "string", "minLength": 12} for name in names}
    schema = {"type": "object", "properties": properties, "required": names, "additionalProperties": False}
    grammar = backend.compile(StructuredOutputsParams(json=json.dumps(schema)))
    answer = json.dumps(dict.fromkeys(names, "some words here"), indent=2)
    computed: list[int] = []
    learn_mask = StringMasks.learn_mask
    monkeypatch.setattr(StringMasks, "learn_mask", lambda self, mask: (computed.append(0), learn_mask(self, mask))[1])
    start = grammar.num_bytes
    for num_answers in (4, 1):
        computed.clear()
        states, masks = [grammar.start() for _ in range(num_answers)], np.zeros((num_answers, WORDS), np.int32)
        for token in tokenizer.encode(answer, add_special_tokens=False).ids:
            backend.fill_masks([MaskRequest(state, row) for row, state in enumerate(states)], masks)
            assert [state.advance([token]) for state in states] == [1] * num_answers
        if num_answers == 4:
            assert 0 < grammar.num_bytes - start < 2 * 1024 * len(computed) / num_answers
    assert not computed


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^[a-z ]+$"},
        {"type": "string", "format": "uri"},
        {"enum": ["z" * 8]},
        {"anyOf": [{"type": "string", "maxLength": 4}, {"enum": ["zebra"]}]},
        {"allOf": [{"type": "string"}, {"type": "string", "maxLength": 4}]},
        {"type": "object", "patternProperties": {"^z": {"type": "string"}}},
    ],
)
def test_strings_that_are_not_free_are_left_to_the_library(schema) -> None:
    assert find_string_bounds({"type": "array", "items": schema}) is None
