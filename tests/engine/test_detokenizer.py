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


def stream(tokenizer: Tokenizer, ids: list[int], params: SamplingParams) -> tuple[list[str], str | None]:
    detokenizer = Detokenizer(tokenizer, [], params)
    pieces = []
    for token in ids:
        stop = detokenizer.append_tokens([token], False)
        if stop is not None:
            return [*pieces, detokenizer.take_delta(True)], stop
        pieces.append(detokenizer.take_delta(False))
    detokenizer.flush()
    return [*pieces, detokenizer.take_delta(True)], None


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
