"""The tokenizer: byte-level BPE of 4,096 entries, digits one by one, ChatML's special tokens."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tools.train_tiny.mixture import training_example
from tools.train_tiny.render import pieces

VOCAB_SIZE = 4096
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END_OF_TEXT, TURN_START, TURN_END)
#: Single tokens, but ordinary text: they survive ``skip_special_tokens``.
MARKERS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


def _dialogue_text(count: int, seed: int) -> Iterator[str]:
    rng = Random(seed)
    for _ in range(count):
        example = training_example(rng)
        text = "".join(piece for piece, _ in pieces(example.messages, example.tools, example.reply))
        for special in (*SPECIAL, *MARKERS):
            text = text.replace(special, "\n")
        yield text


def train_tokenizer(documents: list[str], dialogues: int = 25_000, seed: int = 0) -> Tokenizer:
    """Train on the text and a sample of dialogues."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(MARKERS),
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        yield from documents[::2]
        yield from _dialogue_text(dialogues, seed)

    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.add_tokens([AddedToken(marker, special=False, normalized=False) for marker in MARKERS])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer
