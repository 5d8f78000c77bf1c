"""What every structured-output backend must keep: masks that say what a grammar takes, states that roll back, refusals
that are errors of the request. Run on quire-tiny's tokenizer."""

from __future__ import annotations

import json
import re
import unittest
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

import quire.core.assets
from quire.core.contracts.structured_output import (
    CompiledGrammar,
    GrammarState,
    MaskRequest,
    StructuredOutputBackend,
    TokenizerInfo,
)
from quire.core.errors import InvalidRequestError
from quire.core.plugin.options import parse_options
from quire.core.structured_outputs import StructuredOutputsParams

__all__ = [
    "check_answers_are_independent",
    "check_eos_comes_where_the_answer_matches",
    "check_forced_tokens_may_come",
    "check_mask_and_advance_agree",
    "check_masks_for_drafts",
    "check_refusals_are_errors_of_the_request",
    "check_refused_tokens_change_nothing",
    "check_rollback_restores_the_mask",
]

_EOS, _VOCAB = 2, 4096
_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tag": {"enum": ["red", "green"]}},
    "required": ["name", "age", "tag"],
    "additionalProperties": False,
}
_ANSWER = '{"name": "Ada", "age": 36, "tag": "red"}'
_CHOICES = [_ANSWER, '{"name": "Ada"}', '{"age": 36}', "none"]
"""For a backend that takes no schema; as an expression for one that takes no choices."""
_MIN_TOKENS = 5
"""Of an answer that a backend names."""
_TINY = Path(quire.core.assets.__path__[0], "quire-tiny", "tokenizer.json")


def check_mask_and_advance_agree(cls: type[StructuredOutputBackend]) -> None:
    """Along an answer, a token of the vocabulary is in the mask exactly if ``advance`` takes it."""
    grammar, answer = _compile(cls)
    state = grammar.start()
    rng = np.random.default_rng(0)
    for token in (*answer, _EOS):
        allowed = _allowed(_mask(state))
        assert allowed[token], f"token {token} of an answer that matches is not allowed"
        for other in {*rng.integers(0, _VOCAB, 24).tolist(), *allowed.nonzero()[0][:8].tolist()}:
            taken = state.advance([other])
            assert taken == int(allowed[other]), f"token {other}: the mask says {allowed[other]}, advance {bool(taken)}"
            if taken:
                state.rollback(1)
        assert state.advance([token]) == 1


def check_eos_comes_where_the_answer_matches(cls: type[StructuredOutputBackend]) -> None:
    """EOS is allowed at the end of an answer that matches, and nowhere before."""
    grammar, answer = _compile(cls)
    cases = [(grammar, answer, True)]
    if answer == _encode(_ANSWER):  # no part of it matches
        cases += [(grammar, _encode("{"), False), (grammar, answer[:-1], False)]
    if choices := _compile_if_taken(cls, StructuredOutputsParams(choice=["yes", "yes sir"])):
        cases += [(choices, _encode(text), bool(text)) for text in ("", "yes", "yes sir")]
    for grammar, tokens, is_end in cases:
        state, text = grammar.start(), _decode(tokens)
        assert state.advance(tokens) == len(tokens), f"{text!r} is refused"
        assert _allowed(_mask(state))[_EOS] == is_end, f"EOS after {text!r}: expected {is_end}"


def check_refused_tokens_change_nothing(cls: type[StructuredOutputBackend]) -> None:
    """``advance`` stops before the first token that may not come, and the state is behind those before it."""
    grammar, tokens = _compile(cls)
    state = grammar.start()
    wrong = int((~_allowed(_mask(_advance(grammar, tokens[:3])))).nonzero()[0][0])
    assert state.advance([*tokens[:3], wrong, *tokens[3:]]) == 3
    assert state.advance(tokens[3:]) == len(tokens) - 3, "the answer cannot go on behind a refused token"


def check_rollback_restores_the_mask(cls: type[StructuredOutputBackend]) -> None:
    """After ``rollback`` masks are what they were, at any place of an answer."""
    grammar, tokens = _compile(cls)
    state, masks = grammar.start(), []
    for token in tokens:
        masks.append(_mask(state))
        assert state.advance([token]) == 1
    for count in (1, 3, len(tokens) - 4):
        state.rollback(count)
        del tokens[-count:]
        assert np.array_equal(_mask(state), masks[len(tokens)]), f"the mask after {len(tokens)} tokens differs"


def check_answers_are_independent(cls: type[StructuredOutputBackend]) -> None:
    """Two answers of one grammar do not know of each other."""
    grammar, answer = _compile(cls)
    first, second = grammar.start(), grammar.start()
    before = _mask(second)
    first.advance(answer)
    assert np.array_equal(_mask(second), before), "one answer changed the mask of another"
    assert np.array_equal(_mask(grammar.start()), before), "an answer changed its grammar"


def check_masks_for_drafts(cls: type[StructuredOutputBackend]) -> None:
    """``fill_masks`` gives the mask of every position of every request, wrong drafts included, and leaves the states
    where they were."""
    backend, (grammar, tokens) = _make(cls), _compile(cls)
    states = [grammar.start() for _ in range(3)]
    states[1].advance(tokens[:4])
    wrong = int((~_allowed(_mask(_advance(grammar, tokens[:2])))).nonzero()[0][0])
    drafts: list[Sequence[int]] = [tokens[:3], [], [*tokens[:2], wrong, tokens[3]]]
    requests, first_row = [], 0
    for state, draft in zip(states, drafts, strict=True):
        requests.append(MaskRequest(state, first_row, draft))
        first_row += 1 + len(draft)
    block = np.full((first_row, _VOCAB // 32), -1, np.int32)
    backend.fill_masks(requests, block)
    for request, start, draft in zip(requests, (0, 4, 0), drafts, strict=True):
        assert request.is_filled, "is_filled is not set"
        for offset in range(1 + len(draft)):
            if wrong in draft[:offset]:
                break
            expected = _mask(_advance(grammar, [*tokens[:start], *draft[:offset]]))
            row = block[request.first_row + offset]
            assert np.array_equal(row, expected), f"the mask behind {offset} drafts differs"
        after = _mask(request.state)
        assert np.array_equal(after, _mask(_advance(grammar, tokens[:start]))), "fill_masks moved a state"


def check_forced_tokens_may_come(cls: type[StructuredOutputBackend]) -> None:
    """What ``forced_tokens`` gives, the grammar takes; at most as many as asked for, and no state is moved."""
    grammar, answer = _compile(cls)
    state, any_forced = grammar.start(), False
    for token in answer:
        before = _mask(state)
        forced = list(state.forced_tokens(4))
        assert len(forced) <= 4
        assert state.advance(forced) == len(forced), f"forced tokens {forced} are refused"
        state.rollback(len(forced))
        assert np.array_equal(_mask(state), before), "forced_tokens moved the state"
        any_forced = any_forced or bool(forced)
        state.advance([token])
    if not any_forced:
        raise unittest.SkipTest("names no forced tokens")


def check_refusals_are_errors_of_the_request(cls: type[StructuredOutputBackend]) -> None:
    """What cannot be enforced is refused with ``InvalidRequestError``, and nothing else is raised."""
    for params in (
        StructuredOutputsParams(json={"not": {}}),
        StructuredOutputsParams(json={"type": "string", "pattern": "(?=a)b"}),
        StructuredOutputsParams(json={"$ref": "#/$defs/missing"}),
        StructuredOutputsParams(regex="(unclosed"),
        StructuredOutputsParams(grammar="start: missing_rule"),
        StructuredOutputsParams(structural_tag={"structures": 3}),
    ):
        try:
            cls.validate_params(params)
            _make(cls).compile(params)
        except InvalidRequestError as error:
            assert "\n" not in str(error), "the reason is more than one line"
        else:
            raise AssertionError(f"{params.kind} {json.dumps(params.json)} compiles, and cannot be enforced")


def _make(cls: type[StructuredOutputBackend]) -> StructuredOutputBackend:
    backend = cls(TokenizerInfo(_TINY.read_text(encoding="utf-8"), _VOCAB, (_EOS,)), parse_options(cls, {}))
    backend.prepare_masks()
    return backend


def _compile(cls: type[StructuredOutputBackend]) -> tuple[CompiledGrammar, list[int]]:
    """The sample schema, or choices or an expression of which the same answer is one, or the backend's own example;
    with the tokens of the answer."""
    either = "|".join(map(re.escape, _CHOICES))
    for params in (
        StructuredOutputsParams(json=_SCHEMA),
        StructuredOutputsParams(choice=_CHOICES),
        StructuredOutputsParams(regex=either),
    ):
        if grammar := _compile_if_taken(cls, params):
            return grammar, _encode(_ANSWER)
    example = cls.example()
    if example is None:
        raise unittest.SkipTest("refuses the sample schema, choices and expression; example() can name what it takes")
    answer = _encode(example[1])
    assert len(answer) >= _MIN_TOKENS, f"the answer of example() has {len(answer)} tokens; at least {_MIN_TOKENS}"
    cls.validate_params(example[0])
    return _make(cls).compile(example[0]), answer


def _compile_if_taken(cls: type[StructuredOutputBackend], params: StructuredOutputsParams) -> CompiledGrammar | None:
    try:
        cls.validate_params(params)
        return _make(cls).compile(params)
    except InvalidRequestError:
        return None


def _advance(grammar: CompiledGrammar, tokens: Sequence[int]) -> GrammarState:
    state = grammar.start()
    assert state.advance(tokens) == len(tokens)
    return state


def _encode(text: str) -> list[int]:
    ids: list[int] = Tokenizer.from_file(str(_TINY)).encode(text, add_special_tokens=False).ids
    return ids


def _decode(tokens: Sequence[int]) -> str:
    text: str = Tokenizer.from_file(str(_TINY)).decode(tokens)
    return text


def _mask(state: GrammarState) -> NDArray[np.int32]:
    mask = np.zeros(_VOCAB // 32, np.int32)
    state.fill_mask(mask)
    return mask


def _allowed(mask: NDArray[np.int32]) -> NDArray[np.bool_]:
    return np.unpackbits(mask.view(np.uint8), bitorder="little").astype(bool)
