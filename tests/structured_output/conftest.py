"""The bundled backend over quire-tiny's tokenizer, and answers walked through masks token by token."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer

import quire.core.assets
from quire import StructuredOutputsParams
from quire.plugins.structured_output.guidance import GuidanceBackend
from quire.sdk import CompiledGrammar, TokenizerInfo

EOS = 2
TINY = Path(quire.core.assets.__path__[0]) / "quire-tiny"

Accepts = Callable[[CompiledGrammar, str], bool]


@dataclass
class Prefix:
    """The mask behind some tokens, once it is known, and the prefixes that are longer by a token."""

    mask: NDArray[np.int32] | None = None
    longer: dict[int, Prefix] = field(default_factory=dict)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TINY / "tokenizer.json"))


@pytest.fixture(scope="session")
def backend() -> GuidanceBackend:
    backend = GuidanceBackend(TokenizerInfo((TINY / "tokenizer.json").read_text(), 4096, (EOS,)))
    backend.prepare_masks()
    return backend


@pytest.fixture(scope="session")
def accepts(tokenizer: Tokenizer) -> Accepts:
    """Whether every token of a text is allowed where it comes, and EOS behind the last.

    What texts for one grammar begin with alike is walked through once; but every second text is walked through whole,
    as an answer that takes masks which others found out.
    """
    last: tuple[CompiledGrammar | None, Prefix] = (None, Prefix())
    numbers = itertools.count()

    def walk(grammar: CompiledGrammar, text: str) -> bool:
        nonlocal last
        if last[0] is not grammar:
            last = grammar, Prefix()
        prefix, state, num_advanced = Prefix() if next(numbers) % 2 else last[1], grammar.start(), 0
        token_ids = tokenizer.encode(text, add_special_tokens=False).ids
        for index, token in enumerate((*token_ids, EOS)):
            if prefix.mask is None:
                behind = token_ids[num_advanced:index]
                assert state.advance(behind) == len(behind), "the mask allows a token that the grammar does not take"
                num_advanced, prefix.mask = index, np.zeros(128, np.int32)
                state.fill_mask(prefix.mask)
            if not prefix.mask[token // 32] >> (token % 32) & 1:
                return False
            prefix = prefix.longer.setdefault(token, Prefix())
        return True

    return walk


@pytest.fixture(scope="session")
def compile_params(backend: GuidanceBackend) -> Callable[..., CompiledGrammar]:
    def compile_(**fields) -> CompiledGrammar:
        params = StructuredOutputsParams(**fields)
        backend.validate_params(params)
        return backend.compile(params)

    return compile_
