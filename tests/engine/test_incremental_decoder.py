"""Tokens decoded one at a time give what decoding them at once gives, whatever the tokenizer and the prompt."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from quire.core.engine.incremental_decoder import make_incremental_decoder
from quire.core.engine.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
GEMMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
DECODERS = {
    "byte level": decoders.ByteLevel(),
    "byte level, fused": decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]),
    "llama": decoders.Sequence(LLAMA),
    "gemma": decoders.Sequence(GEMMA),
    "metaspace": decoders.Metaspace(),
    "wordpiece": decoders.WordPiece(),
    "bpe suffix": decoders.BPEDecoder("</w>"),
    "ctc": decoders.CTC(pad_token="x", word_delimiter_token="▁"),
    "none": None,
}
WORDS = ["▁", "▁▁", "▁hello", "hello", "a", ".", "##b", "c</w>", "x", "▁'", "ö", "你", REPLACEMENT, "▁" + REPLACEMENT]
BYTES = [0x20, 0x41, 0x80, 0x98, 0x9F, 0xBD, 0xBF, 0xE4, 0xEF, 0xF0, 0xC3, 0xE0, 0xED, 0xA0]


def make_tokenizer(decoder: decoders.Decoder | None, folder: Path) -> Tokenizer:
    """A tokenizer of a few words and bytes, with an added token and two special ones."""
    if "ByteLevel" in str(decoder):
        alphabet = {byte: letter for letter, byte in zip(*byte_letters(), strict=True)}
        texts = ["hello", " hello", "a", "ö", "你", "\U0001f600", REPLACEMENT, "\ufffdx"]
        pieces = ["".join(alphabet[b] for b in text.encode()) for text in texts]
        pieces += [alphabet[b] for b in BYTES] + [alphabet[0xE4] + alphabet[0xBD], alphabet[0xA0] + alphabet[0x41]]
    else:
        pieces = WORDS + [f"<0x{byte:02X}>" for byte in BYTES]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    backend = Backend(models.WordLevel(vocab, unk_token="a"))
    backend.decoder = decoder
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    backend.add_tokens([AddedToken("<tool call>", special=False)])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder)
    return Tokenizer(str(folder))


def byte_letters() -> tuple[list[str], list[int]]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))], printable + others


@pytest.fixture(scope="module", params=DECODERS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(DECODERS[request.param], tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(DECODERS["llama"], tmp_path_factory.mktemp("tokenizer"))


def decode_at_once(tokenizer: Tokenizer, ids: list[int], skip: bool) -> str:
    """What transformers decodes; but a broken character of byte-fallback tokens does not spoil those beside it."""
    pieces: list[int] = []
    for run, broken in split_byte_runs(tokenizer, ids, skip):
        pieces += [tokenizer.backend.token_to_id(REPLACEMENT)] if broken else run
    return tokenizer.decode(pieces, skip_special_tokens=skip)


def split_byte_runs(tokenizer: Tokenizer, ids: list[int], skip: bool) -> list[tuple[list[int], bool]]:
    """(tokens, whether each is a broken byte), cut by Python's own decoder where characters of byte tokens end."""
    visible = [i for i in ids if not (skip and i in tokenizer.special_token_ids)]
    runs: list[tuple[list[int], bool]] = []
    at = 0
    while at < len(visible):
        size = next((n for n in (1, 2, 3, 4) if is_char(tokenizer, visible[at : at + n], n)), 0)
        runs.append((visible[at : at + max(size, 1)], not size and visible[at] in tokenizer.byte_of_token))
        at += max(size, 1)
    return runs


def is_char(tokenizer: Tokenizer, ids: list[int], size: int) -> bool:
    values = [tokenizer.byte_of_token.get(i) for i in ids]
    if len(values) < size or None in values:
        return False
    try:
        return len(bytes(v for v in values if v is not None).decode()) == 1
    except UnicodeDecodeError:
        return False


def expected_answer(tokenizer: Tokenizer, prompt: list[int], ids: list[int], skip: bool) -> str:
    """What the answer adds to the prompt's text. An incomplete character at the prompt's end is not its text yet."""
    before, whole = (decode_at_once(tokenizer, tokens, skip) for tokens in (prompt, prompt + ids))
    while not whole.startswith(before):
        assert before.endswith(REPLACEMENT)
        before = before[:-1]
    return whole[len(before) :]


@settings(max_examples=300, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_every_prefix_is_decoded_as_if_at_once(tokenizer: Tokenizer, data: st.DataObject, skip: bool) -> None:
    token = st.integers(0, tokenizer.vocab_size - 1)
    prompt, ids = data.draw(st.lists(token, max_size=6)), data.draw(st.lists(token, max_size=10))
    pieces: list[str] = []
    decoder = make_incremental_decoder(tokenizer, prompt, skip)
    for token_id in ids:
        pieces.append(decoder.decode_token(token_id))
    for end in range(len(ids) + 1):
        decoder = make_incremental_decoder(tokenizer, prompt, skip)
        for token_id in ids[:end]:
            decoder.decode_token(token_id)
        text = "".join(pieces[:end]) + decoder.flush_bytes()
        assert text == expected_answer(tokenizer, prompt, ids[:end], skip), (end, pieces)


def test_a_broken_byte_loses_neither_itself_nor_the_next_space(llama: Tokenizer) -> None:
    char = [llama.backend.token_to_id(f"<0x{byte:02X}>") for byte in "你".encode()]
    word = llama.backend.token_to_id("▁hello")
    decoder = make_incremental_decoder(llama, [word], True)
    text = "".join(decoder.decode_token(i) for i in [*char, char[0], word, *char, word])
    assert text == f"你{REPLACEMENT} hello你 hello"


def test_a_byte_level_decoder_among_others_waits_for_whole_characters(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(decoders.Sequence([decoders.ByteLevel(), decoders.Replace("hello", "hallo")]), tmp_path)
    letters = dict(zip(*reversed(byte_letters()), strict=True))
    ids = [tokenizer.backend.token_to_id(letters[byte]) for byte in "\U0001f600A".encode()]
    decoder = make_incremental_decoder(tokenizer, ids[:1], True)
    pieces = [decoder.decode_token(i) for i in [*ids[1:], tokenizer.backend.token_to_id("hello"), ids[0]]]
    assert [*pieces, decoder.flush_bytes()] == ["", "", "\U0001f600", "A", "hallo", "", REPLACEMENT]


def test_the_text_of_a_token_is_what_it_adds_to_a_text(tokenizer: Tokenizer) -> None:
    """With the space that SentencePiece writes before a word; byte-fallback tokens stand for their byte."""
    if tokenizer.spells_by_context and tokenizer.backend.decoder is not None:
        pytest.skip("its text depends on the tokens beside it")
    before = tokenizer.backend.token_to_id("a")
    for token_id in tokenizer.backend.get_vocab().values():
        decoder = make_incremental_decoder(tokenizer, [before], skip_special_tokens=False)
        text = decoder.decode_token(token_id) + decoder.flush_bytes()
        assert tokenizer.convert_id_to_text(token_id) == text == tokenizer.token_texts[token_id]
        if token_id in tokenizer.byte_of_token:
            assert tokenizer.convert_id_to_bytes(token_id) == bytes([tokenizer.byte_of_token[token_id]])
        elif REPLACEMENT not in text:
            assert tokenizer.convert_id_to_bytes(token_id) == text.encode()


def test_the_text_of_a_word_holds_its_space(llama: Tokenizer) -> None:
    texts = {piece: llama.convert_id_to_text(token_id) for piece, token_id in llama.backend.get_vocab().items()}
    assert (texts["▁hello"], texts["hello"], texts["<0x41>"], texts["<0xE4>"]) == (" hello", "hello", "A", REPLACEMENT)
    assert llama.convert_id_to_bytes(llama.backend.token_to_id("▁hello")) == b" hello"
