"""The tokenizer keeps every text, takes digits one by one; the chat template says what training rendered."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tools.train_tiny.mixture import SKILLS, training_example
from tools.train_tiny.render import pieces, prompt
from tools.train_tiny.tokenizer import MARKERS, SPECIAL, VOCAB_SIZE, train_tokenizer
from transformers import AutoTokenizer

from .conftest import ROOT

ASSETS = ROOT / "core" / "assets"
HF = AutoTokenizer.from_pretrained(ASSETS / "quire-tiny", local_files_only=True)
TOKENIZER = HF.backend_tokenizer
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)


def encode(text):
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def decode(ids):
    return TOKENIZER.decode(ids, skip_special_tokens=False)


@given(TEXT)
@example("\x00 \r\n\t　naïve 🜁 مرحبا <|im_start|>user <tool_call> <|im_end|>")
def test_any_text_comes_back(text):
    assert decode(encode(text)) == text


@given(st.text("0123456789", min_size=1, max_size=12), TEXT)
def test_digits_are_single_tokens(digits, around):
    ids = encode(digits)
    assert len(ids) == len(digits) and all(decode([token]) == digit for token, digit in zip(ids, digits, strict=True))
    tokens = [decode([token]) for token in encode(f"{around} {digits}{around}")]
    assert not any(len(token) > 1 and any(c in "0123456789" for c in token) for token in tokens if token != "�")


def test_its_entries():
    assert TOKENIZER.get_vocab_size() == VOCAB_SIZE == 4096
    for word in (*SPECIAL, *MARKERS):
        assert len(encode(word)) == 1
    assert TOKENIZER.decode(encode("".join((*SPECIAL, *MARKERS))), skip_special_tokens=True) == "".join(MARKERS)
    assert (HF.eos_token, HF.pad_token) == ("<|im_end|>", "<|endoftext|>")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_the_draft_has_the_same(name):
    assert (ASSETS / "quire-tiny" / name).read_bytes() == (ASSETS / "quire-tiny-draft" / name).read_bytes()


def test_the_template_is_the_one_of_the_tools():
    kept = (ROOT / "tools" / "train_tiny" / "chat_template.jinja").read_text()
    assert (ASSETS / "quire-tiny" / "chat_template.jinja").read_text() == kept


def rendered(messages, tools=None, **options):
    return HF.apply_chat_template(messages, tools=tools or None, tokenize=False, **options)


@pytest.mark.parametrize("skill", [*SKILLS, "training", "long training"])
def test_the_template_renders_what_was_trained_on(skill):
    rng = Random(f"render:{skill}")
    for _ in range(30):
        made = SKILLS[skill](rng) if skill in SKILLS else training_example(rng, long=skill == "long training")
        assert rendered(made.messages, made.tools, add_generation_prompt=True) == prompt(made.messages, made.tools)
        whole = "".join(text for text, _ in pieces(made.messages, made.tools, made.reply))
        answered = [*made.messages, {"role": "assistant", "content": made.reply}]
        assert rendered(answered, made.tools) == whole


def test_a_dialogue_with_everything():
    function = {"name": "f", "arguments": '{"x": 1}'}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ]
    text = rendered(messages, [{"type": "function", "function": {"name": "f"}}], add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nBe brief.\n\nYou may call these functions:\n<tools>\n")
    assert text.endswith(
        "<|im_start|>user\nHello<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_tokenizer_is_trained_the_same_twice():
    documents = [path.read_text() for path in sorted((ROOT / "core").rglob("*.py"))[:40]]
    first, second = (train_tokenizer(documents, dialogues=300, seed=1).to_str() for _ in range(2))
    assert first == second
