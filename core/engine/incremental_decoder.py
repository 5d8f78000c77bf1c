"""Token ids to text, one token at a time: what each token adds to the text of those before it."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from itertools import islice, takewhile
from typing import Protocol

from quire.core.engine.token_view import TokenView
from quire.core.engine.tokenizer import Tokenizer

__all__ = ["IncrementalDecoder", "make_incremental_decoder"]

_REPLACEMENT = "\ufffd"
_MAX_PARTIAL_BYTES = 3  # of a UTF-8 character that lacks its last byte
_MAX_PROMPT_TOKENS = 64  # how far back the prompt is searched for tokens that show


class IncrementalDecoder(Protocol):
    """The text of one continuation of a prompt.

    The pieces, joined, are what decoding the prompt and the tokens at once holds beyond the text of the prompt alone,
    so that a word keeps the space before it. A character that the prompt begins and the tokens complete is theirs; one
    that stays incomplete shows as U+FFFD, and only if the prompt has not begun it. Where byte-fallback tokens make
    several characters and one of them is broken, the others are kept, as SentencePiece does; transformers shows U+FFFD
    for each of their bytes.
    """

    def decode_token(self, token_id: int) -> str:
        """The text that is certain with this token: empty while a character lacks bytes."""
        ...

    def flush_bytes(self) -> str:
        """No more tokens will come: the text of an incomplete character."""
        ...

    def count_broken_chars(self, token_id: int) -> int:
        """How many characters at the start of what this token adds are U+FFFD for tokens before it."""
        ...


def make_incremental_decoder(
    tokenizer: Tokenizer,
    prompt_token_ids: Sequence[int],
    skip_special_tokens: bool,
    shown_token_ids: frozenset[int] = frozenset(),
) -> IncrementalDecoder:
    """The decoder for what follows a prompt. ``shown_token_ids`` are special tokens that are not skipped."""
    cls = _ByteLevelDecoder if tokenizer.is_plain_byte_level else _PieceDecoder
    view = tokenizer.view_tokens(skip_special_tokens, shown_token_ids)
    return cls(tokenizer, prompt_token_ids[-_MAX_PROMPT_TOKENS:], view)


class _ByteLevelDecoder:
    """Tokens are bytes, whatever stands beside them (GPT-2, Llama 3, Qwen)."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], view: TokenView) -> None:
        self._token_bytes = view.token_bytes
        tail = b""
        for token_id in reversed(prompt_token_ids):
            tail = self._token_bytes[token_id] + tail
            if len(tail) >= _MAX_PARTIAL_BYTES:
                break
        self._partial = b""  # bytes of an incomplete character
        self._decode(tail[-_MAX_PARTIAL_BYTES:])
        self._num_prompt_chars = len(self._partial.decode(errors="replace"))  # that the prompt's text ends with

    def decode_token(self, token_id: int) -> str:
        text = self._decode(self._token_bytes[token_id])
        return self._drop_prompt_chars(text) if text and self._num_prompt_chars else text

    def flush_bytes(self) -> str:
        text, self._partial = self._partial.decode(errors="replace"), b""
        return self._drop_prompt_chars(text)

    def count_broken_chars(self, token_id: int) -> int:
        first = self._token_bytes[token_id][:1]
        if not first or _continues_char(first[0]):
            return 0
        return max(len(self._partial.decode(errors="replace")) - self._num_prompt_chars, 0)

    def _decode(self, data: bytes) -> str:
        data = self._partial + data
        text, num_bytes = codecs.utf_8_decode(data, "replace", False)
        self._partial = data[num_bytes:]
        return text

    def _drop_prompt_chars(self, text: str) -> str:
        """A broken character that the prompt began is in the prompt's text already."""
        count, self._num_prompt_chars = self._num_prompt_chars, 0
        while count and text.startswith(_REPLACEMENT):
            text, count = text[1:], count - 1
        return text


class _PieceDecoder:
    """Tokens are pieces of text whose spelling may depend on the token before; some may be single bytes (Llama 2)."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], view: TokenView) -> None:
        self._tokenizer = tokenizer
        self._hidden = view.hidden
        self._byte_of_token = tokenizer.byte_of_token
        self._known_texts = view.piece_texts
        self._previous: list[int] = []  # the last token that shows: what comes before changes no spelling
        self._held: list[int] = []  # pieces after it that end inside a character
        self._partial = b""  # byte tokens of an incomplete character
        self._num_prompt_bytes = 0  # how many of them the prompt holds
        last_visible = list(islice(filter(self._shows, reversed(prompt_token_ids)), _MAX_PARTIAL_BYTES))
        self._previous = last_visible[:1]
        for token_id in reversed(last_visible):
            byte = self._byte_of_token.get(token_id)
            if byte is None:
                self._partial = b""
            else:
                self._decode_byte(byte)
        self._num_prompt_bytes = len(self._partial)

    def decode_token(self, token_id: int) -> str:
        known = self._known_texts.get(token_id)
        if known is not None and self._previous and not self._partial:
            self._previous = [token_id]
            return known
        byte = self._byte_of_token.get(token_id)
        if byte is not None and not self._held:
            is_first = not self._previous
            self._previous = [token_id]
            text = self._decode_byte(byte)
            # Decoders that strip the first space strip this one too.
            return self._tokenizer.decode([token_id]) if is_first and text and byte < 0x80 else text
        if not self._shows(token_id):
            return ""
        broken = self._break_char() if self._partial else ""
        text = self._decode_after(token_id)
        may_be_partial = self._tokenizer.has_byte_pieces and (not text or text.endswith(_REPLACEMENT))
        if may_be_partial and len(self._held) < _MAX_PARTIAL_BYTES:
            self._held.append(token_id)
            return broken
        if self._previous and not self._tokenizer.spells_by_context:
            self._known_texts[token_id] = text
        self._previous, self._held = [token_id], []
        return broken + text

    def flush_bytes(self) -> str:
        text = self._break_char()
        if self._held:
            last = self._held.pop()
            text += self._decode_after(last)
        return text

    def count_broken_chars(self, token_id: int) -> int:
        byte = self._byte_of_token.get(token_id)
        if not self._shows(token_id) or (byte is not None and _continues_char(byte)):
            return 0
        return len(self._partial) - self._num_prompt_bytes

    def _shows(self, token_id: int) -> bool:
        return token_id not in self._hidden and self._tokenizer.backend.id_to_token(token_id) is not None

    def _decode_after(self, token_id: int) -> str:
        """What a piece adds to the text of the tokens before it."""
        decode = self._tokenizer.decode
        before = decode(self._previous) if self._previous else ""
        after = decode([*self._previous, *self._held, token_id])
        if after.startswith(before):
            return after[len(before) :]
        return after[sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False))) :]

    def _decode_byte(self, byte: int) -> str:
        text = ""
        self._partial += bytes([byte])
        while self._partial:
            try:
                char = self._partial.decode()
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data":
                    return text
                text += self._break_char(error.end)
            else:
                self._partial, self._num_prompt_bytes = b"", 0
                text += char
        return text

    def _break_char(self, num_bytes: int | None = None) -> str:
        """U+FFFD for each of the first bytes (all of them) that make no character and are not the prompt's."""
        count = len(self._partial) if num_bytes is None else num_bytes
        num_shown = max(count - self._num_prompt_bytes, 0)
        self._num_prompt_bytes = max(self._num_prompt_bytes - count, 0)
        self._partial = self._partial[count:]
        return _REPLACEMENT * num_shown


def _continues_char(byte: int) -> bool:
    """Whether UTF-8 has this byte only inside a character."""
    return byte & 0xC0 == 0x80
