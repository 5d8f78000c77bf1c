"""Byte-level tokenizers (GPT-2, Llama 3, Qwen): printable characters that stand for bytes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer as BackendTokenizer

__all__ = ["restore_byte_level", "undo_byte_level"]


def restore_byte_level(backend: BackendTokenizer, file: Path) -> BackendTokenizer:
    """``backend``, unless ``file`` is a byte-level tokenizer that transformers rebuilt as another: its versions before
    5.22 make SentencePiece of one labelled ``LlamaTokenizer``, which loses spaces. Then the file's own is taken."""
    if _has_byte_level_decoder(backend) or not file.is_file():
        return backend
    from tokenizers import Tokenizer as BackendTokenizer

    original = BackendTokenizer.from_file(str(file))
    if not _has_byte_level_decoder(original):
        return backend
    vocabulary = original.get_vocab()
    added = sorted(backend.get_added_tokens_decoder().items())  # with those of tokenizer_config.json
    original.add_tokens([token for token_id, token in added if vocabulary.get(token.content) != token_id])
    return original


def undo_byte_level(piece: str) -> bytes:
    """Undo GPT-2's mapping of bytes to printable characters (Radford et al. 2019)."""
    table = _bytes_of_characters()
    if all(c in table for c in piece):
        return bytes(table[c] for c in piece)
    return piece.encode()


def _has_byte_level_decoder(backend: BackendTokenizer) -> bool:
    """Whether tokens are GPT-2's printable characters for bytes."""
    return backend.decoder is not None and b"ByteLevel" in backend.decoder.__getstate__()


@cache
def _bytes_of_characters() -> dict[str, int]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in printable}
    table.update({chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in printable)})
    return table
