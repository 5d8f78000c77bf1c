"""Tokenized rows: dialogues packed whole, text in chunks. Built by many processes, identical for any number of them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from random import Random

import numpy as np
from tokenizers import Tokenizer
from tools.train_tiny.mixture import training_example
from tools.train_tiny.render import pieces

IGNORE = 0xFFFF
_SHARD = 4000


@dataclass(slots=True)
class Rows:
    """Packed rows of one length; ``labels`` repeats the token where it counts and is IGNORE elsewhere."""

    tokens: np.ndarray  # (rows, length) uint16
    labels: np.ndarray  # (rows, length) uint16

    def __len__(self) -> int:
        return len(self.tokens)


def pack(
    documents: Iterable[tuple[list[int], list[bool]]], length: int, separator: int, *, split: bool = False
) -> Rows:
    """Fill rows with documents, each followed by the separator; too long ones are split or left out."""
    tokens: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    row_tokens = np.full(length, separator, np.uint16)
    row_labels = np.full(length, IGNORE, np.uint16)
    used = 0

    def flush() -> None:
        nonlocal row_tokens, row_labels, used
        if used:
            tokens.append(row_tokens)
            labels.append(row_labels)
        row_tokens, row_labels, used = np.full(length, separator, np.uint16), np.full(length, IGNORE, np.uint16), 0

    for ids, counts in documents:
        ids, counts = [*ids, separator], [*counts, counts[-1]]
        parts = range(0, len(ids), length) if split else range(1)
        for start in parts:
            part, part_counts = ids[start : start + length], counts[start : start + length]
            if not split and len(ids) > length:
                continue
            if used + len(part) > length:
                flush()
            end = used + len(part)
            row_tokens[used:end] = part
            row_labels[used:end] = np.where(part_counts, part, IGNORE)
            used = end
    flush()
    if not tokens:
        return Rows(np.zeros((0, length), np.uint16), np.zeros((0, length), np.uint16))
    return Rows(np.stack(tokens), np.stack(labels))


def make_dialogue_shard(shard: int, *, tokenizer_file: str, length: int, long: bool, seed: int) -> Rows:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_file(tokenizer_file)
    rng = Random(f"{seed}:{long}:{shard}")
    rendered = []
    for _ in range(_SHARD // 10 if long else _SHARD):
        example = training_example(rng, long=long)
        rendered.append(pieces(example.messages, example.tools, example.reply))
    encoded = iter(tokenizer.encode_batch_fast([text for parts in rendered for text, _ in parts]))
    documents = []
    for parts in rendered:
        ids: list[int] = []
        counts: list[bool] = []
        for _, learned in parts:
            found = next(encoded).ids
            ids += found
            counts += [learned] * len(found)
        documents.append((ids, counts))
    return pack(documents, length, 0)


def _text_shard(documents: list[str], *, tokenizer_file: str, length: int) -> Rows:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_file(tokenizer_file)
    encoded = tokenizer.encode_batch_fast(documents)
    return pack(((e.ids, [True] * len(e.ids)) for e in encoded if e.ids), length, 0, split=True)


def _join(shards: Iterable[Rows]) -> Rows:
    found = list(shards)
    return Rows(np.concatenate([s.tokens for s in found]), np.concatenate([s.labels for s in found]))


def build(
    tokenizer_file: str, documents: list[str], dialogues: int, long_dialogues: int, seed: int, workers: int
) -> tuple[Rows, Rows]:
    """Build the short rows (512, dialogues) and the long rows (2048, text and long dialogues)."""
    with ProcessPoolExecutor(workers) as pool:
        short = partial(make_dialogue_shard, tokenizer_file=tokenizer_file, length=512, long=False, seed=seed)
        long = partial(make_dialogue_shard, tokenizer_file=tokenizer_file, length=2048, long=True, seed=seed)
        text = partial(_text_shard, tokenizer_file=tokenizer_file, length=2048)
        texts = pool.map(text, [documents[i : i + 24] for i in range(0, len(documents), 24)])
        longs = pool.map(long, range(max(1, long_dialogues * 10 // _SHARD)))
        shorts = pool.map(short, range(max(1, dialogues // _SHARD)), chunksize=1)
        text_rows, long_rows = _join(texts), _join(longs)
        return _join(shorts), _join([text_rows, text_rows, long_rows])
