"""Structured-output backend: from what an answer has to match to the tokens that may come next.

The engine compiles a constraint while its request waits, outside of every step: over HTTP first in a process that can
be killed, then in a thread. A step that holds requests with a grammar is launched as any other. While its model runs,
the engine advances their grammars by the tokens of the step before and fills masks, which the sampler reads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.core.structured_outputs import StructuredOutputsParams

__all__ = [
    "JSON_SCHEMA_FORMATS",
    "CompiledGrammar",
    "GrammarState",
    "MaskRequest",
    "StructuredOutputBackend",
    "TokenizerInfo",
]

JSON_SCHEMA_FORMATS: tuple[str, ...] = (
    *("date", "date-time", "duration", "email", "hostname", "idn-email", "idn-hostname", "ipv4", "ipv6", "iri"),
    *("iri-reference", "json-pointer", "regex", "relative-json-pointer", "time", "uri", "uri-reference"),
    *("uri-template", "uuid"),
)
"""Values of ``format`` that JSON Schema defines (draft 2020-12). Others, such as ``int32``, assert nothing."""


@dataclass(frozen=True, slots=True)
class TokenizerInfo:
    """The tokens of a model, as a backend needs them."""

    tokenizer_json: str
    """The text of ``tokenizer.json``."""
    vocab_size: int
    """Of the model's logits: it may be larger than the tokenizer's."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end an answer; at least one."""


class GrammarState(ABC):
    """Where one answer is in its grammar. Called by one thread at a time."""

    @abstractmethod
    def fill_mask(self, mask: NDArray[np.int32]) -> None:
        """Write which tokens may come next: bit ``t % 32`` of word ``t // 32`` (ceil(vocab / 32),) is 1 if ``t`` may.

        A token may come if some answer that matches begins with what was advanced and it. EOS tokens may come where the
        answer matches. At least one token may, until an EOS token was advanced."""

    @abstractmethod
    def advance(self, token_ids: Sequence[int]) -> int:
        """The answer goes on with these. Returns how many of them the grammar takes; the state is then behind those,
        and the others change nothing."""

    @abstractmethod
    def rollback(self, num_tokens: int) -> None:
        """Take back the last ``num_tokens`` that were advanced."""

    def forced_tokens(self, max_tokens: int) -> Sequence[int]:
        """Tokens that have to come next, as the tokenizer would write their text: keys and braces, for example. They
        are offered as drafts, so that several are verified in one step; others that say the same may come all the
        same."""
        return ()


class CompiledGrammar(ABC):
    """A constraint, ready for any number of answers. It is not changed by them."""

    num_bytes: int = 1 << 20
    """About what it takes: compiled grammars are kept while they fit into a budget."""

    @abstractmethod
    def start(self) -> GrammarState:
        """At the beginning of an answer. Takes microseconds."""


@dataclass(slots=True)
class MaskRequest:
    """The masks that one request needs in a step."""

    state: GrammarState
    first_row: int
    """Row of the block for the token after what was advanced."""
    draft_token_ids: Sequence[int] = ()
    """Drafts that the step verifies: row ``first_row + 1 + i`` is for the token after the first ``i + 1`` of them."""
    is_filled: bool = field(default=False, compare=False)
    """Set when its rows are written: if the call never ends, the engine knows which ones are not to blame."""
    is_started: bool = field(default=False, compare=False)


class StructuredOutputBackend(ABC):
    """Compiles constraints. A grammar that raises, fills a mask without a token or does not return ends its request,
    and no other."""

    fills_soon: bool = False
    """Whether ``fill_masks`` is sure to return, within milliseconds. The engine's own thread calls it then. Else it is
    another one, which can be given up, and which takes time to wake in every step."""

    def __init__(self, tokenizer: TokenizerInfo, options: Any = None) -> None:
        self.tokenizer = tokenizer
        self.options = options
        self.yield_to_engine: Callable[[], None] = _return_at_once
        """For ``compile`` to call between pieces of its work, of some tenths of a millisecond: it returns while the
        engine's own thread waits for a step, or when the compilation has waited for long enough. Else the
        two would take the interpreter from each other."""

    @classmethod
    def validate_params(cls, params: StructuredOutputsParams) -> None:
        """Raise ``InvalidRequestError``, which names the keyword, for what this backend cannot enforce exactly. Called
        before ``compile``; it needs no tokenizer."""

    @classmethod
    def example(cls) -> tuple[StructuredOutputsParams, str] | None:
        """A constraint that it takes, and an answer of at least five tokens that matches it: for the conformance
        checks of a backend that takes neither JSON schemas nor any choices or expressions."""
        return None

    def prepare_masks(self) -> None:
        """Make ready what ``fill_masks`` and states need beyond ``compile``. Called once before the first state is
        started, while the model is loaded; not in the process that only finds out what compiles."""
        return

    def begin_catch_up(self) -> None:
        """Begin what ``fill_masks`` put off, in other threads, and return at once. Called when a step's model is
        launched and the engine waits for the tokens from which its masks follow: until they come it needs neither the
        states nor the interpreter. Never called while ``fill_masks`` runs."""
        return

    @abstractmethod
    def compile(self, params: StructuredOutputsParams) -> CompiledGrammar:
        """Compile a constraint that ``validate_params`` let pass; several threads may. Raises ``InvalidRequestError``
        with the reason where it cannot be enforced."""

    def fill_masks(self, requests: Sequence[MaskRequest], block: NDArray[np.int32]) -> None:
        """Fill rows of ``block`` (rows, ceil(vocab / 32)), whose bits are all 1 before. Every state is where it was
        before the call when it returns. The rows behind a draft that may not come are left: they are never used.

        A backend may do this for all requests at once; this does it for one after the other."""
        for request in requests:
            request.is_started = True
            state, num_advanced = request.state, 0
            for row in range(request.first_row, request.first_row + len(request.draft_token_ids) + 1):
                state.fill_mask(block[row])
                draft = request.draft_token_ids[num_advanced : num_advanced + 1]
                if not draft or not state.advance(draft):
                    break
                num_advanced += 1
            if num_advanced:
                state.rollback(num_advanced)
            request.is_filled = True


def _return_at_once() -> None:
    return
