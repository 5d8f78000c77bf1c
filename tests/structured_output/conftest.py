"""The bundled backend over quire-tiny's tokenizer, and answers walked through masks token by token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

import quire.core.assets
from quire import StructuredOutputsParams
from quire.plugins.structured_output.guidance import GuidanceBackend
from quire.sdk import CompiledGrammar, TokenizerInfo

EOS = 2
TINY = Path(quire.core.assets.__path__[0]) / "quire-tiny"

Accepts = Callable[[CompiledGrammar, str], bool]


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
    """Whether every token of a text is allowed where it comes, and EOS behind the last."""

    def walk(grammar: CompiledGrammar, text: str) -> bool:
        state, mask = grammar.start(), np.zeros(128, np.int32)
        for token in tokenizer.encode(text, add_special_tokens=False).ids:
            state.fill_mask(mask)
            if not mask[token // 32] >> (token % 32) & 1:
                return False
            assert state.advance([token]) == 1, "the mask allows a token that the grammar does not take"
        state.fill_mask(mask)
        return bool(mask[EOS // 32] >> EOS & 1)

    return walk


@pytest.fixture(scope="session")
def compile_params(backend: GuidanceBackend) -> Callable[..., CompiledGrammar]:
    def compile_(**fields) -> CompiledGrammar:
        params = StructuredOutputsParams(**fields)
        backend.validate_params(params)
        return backend.compile(params)

    return compile_
