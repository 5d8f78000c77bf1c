"""Streamed text equals decoding everything at once; stop strings are found wherever they fall."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.core.engine.detokenizer import Detokenizer
from quire.core.engine.tokenizer import Tokenizer
from quire.core.sampling_params import SamplingParams


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Tokenizer:
    return Tokenizer(str(tiny))


def stream(
    tokenizer: Tokenizer, ids: list[int], params: SamplingParams, prompt: list[int] | None = None
) -> tuple[list[str], str | None]:
    detokenizer = Detokenizer(tokenizer, prompt or [], params)
    pieces = []
    for token in ids:
        stop = detokenizer.append_tokens([token], False)
        if stop is not None:
            return [*pieces, detokenizer.take_delta(True)], stop
        pieces.append(detokenizer.take_delta(False))
    stop = detokenizer.flush()
    return [*pieces, detokenizer.take_delta(True)], stop


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_streams_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces, _ = stream(tokenizer, ids, SamplingParams())
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=150, deadline=None)
@given(
    text=st.text("abc ", min_size=1, max_size=40), stops=st.lists(st.text("abc ", min_size=1, max_size=4), max_size=3)
)
def test_stop_strings_cut_at_the_first(tokenizer: Tokenizer, text: str, stops: list[str]) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    pieces, found = stream(tokenizer, ids, SamplingParams(stop=stops))
    joined = "".join(pieces)
    if any(s in whole for s in stops):
        assert found in stops
        assert whole.startswith(joined + found)
        assert not any(s in joined for s in stops)
    else:
        assert found is None
        assert joined == whole


@pytest.mark.parametrize("num_cut_bytes", [0, 1, 2, 3])
def test_no_text_of_the_prompt_is_in_the_answer(tokenizer: Tokenizer, num_cut_bytes: int) -> None:
    """Also where the prompt ends inside a character, or in U+FFFD itself; and stop strings are not sought there."""
    for prompt_text in ("a swordfish \N{GRINNING FACE}", "a swordfish \ufffd"):
        prompt = tokenizer.encode(prompt_text, add_special_tokens=False)
        prompt, rest = prompt[: len(prompt) - num_cut_bytes], prompt[len(prompt) - num_cut_bytes :]
        answer = [*rest, *tokenizer.encode(" swims", add_special_tokens=False)]
        pieces, stop = stream(tokenizer, answer, SamplingParams(stop=["fish", "fish\ufffd"]), prompt)
        assert stop is None
        assert "".join(pieces).lstrip("\N{GRINNING FACE}\ufffd") == " swims"
        if num_cut_bytes and prompt_text.endswith("\N{GRINNING FACE}"):
            assert "".join(pieces) == "\N{GRINNING FACE} swims", "a character that the answer completes is its own"


def test_a_replacement_character_is_text_like_any_other(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a\ufffdb", add_special_tokens=False)
    pieces, _ = stream(tokenizer, ids, SamplingParams())
    assert pieces == ["a", "", "", "\ufffd", "b", ""], "U+FFFD itself waits for nothing"
    assert stream(tokenizer, ids[:2], SamplingParams(stop=["\ufffd"])) == (["a", "", ""], "\ufffd")


def brute_force_held_back(text: str, stops: list[str]) -> int:
    """The longest end of a text that is the beginning, not the whole, of a stop string."""
    ends = range(len(text), 0, -1)
    return next((n for n in ends if any(len(s) > n and s.startswith(text[-n:]) for s in stops)), 0)


@settings(max_examples=150, deadline=None)
@given(
    text=st.text("ab ", max_size=40),
    stops=st.lists(st.text("ab ", min_size=1, max_size=12), max_size=3),
    min_tokens=st.integers(0, 12),
)
def test_a_stream_holds_back_only_what_may_become_a_stop_string(
    tokenizer: Tokenizer, text: str, stops: list[str], min_tokens: int
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, [], SamplingParams(stop=stops, min_tokens=min_tokens, max_tokens=99))
    shown = ""
    for token in ids:
        if detokenizer.append_tokens([token], False) is not None:
            break
        shown += detokenizer.take_delta(False)
        assert shown == detokenizer.visible_text(False)
        assert len(detokenizer.text) - len(shown) == brute_force_held_back(detokenizer.text, stops)
    assert detokenizer.text.startswith(shown)
    assert shown + detokenizer.take_delta(True) == detokenizer.text == detokenizer.visible_text(True)


def test_a_long_stop_string_delays_nothing(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("never", add_special_tokens=False)
    assert stream(tokenizer, ids, SamplingParams(stop=["x" * 500]))[0] == [*"never", ""]
    assert stream(tokenizer, ids, SamplingParams(stop=["verb" * 99]))[0] == ["n", "e", "", "", "", "ver"]


def test_tokens_behind_a_stop_string_are_not_counted(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, [], SamplingParams(stop=["b"]))
    assert detokenizer.append_tokens(tokenizer.encode("abcd", add_special_tokens=False), False) == "b"
    assert (detokenizer.text, detokenizer.num_tokens) == ("a", 2)
