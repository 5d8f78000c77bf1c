"""The bundled structured-output backend: llguidance, Earley parsing over lexemes that are derivatives of expressions.

It refuses what it cannot enforce, and its work is bounded: by the size of a grammar when it compiles, and by "fuel" in
every step. Masks of all requests are computed in one call, on several threads, without the interpreter's lock.
https://github.com/guidance-ai/llguidance
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import llguidance
import numpy as np
from numpy.typing import NDArray

from quire.plugins.structured_output.answer_walk import walk_answers
from quire.plugins.structured_output.grammar_state import Follower, GuidanceState, catch_up_together, first_line
from quire.plugins.structured_output.json_schema import apply_defaults, explain_error, prepare_schema
from quire.plugins.structured_output.lark import LarkWriter
from quire.plugins.structured_output.string_bounds import StringBounds, find_string_bounds, join_string_bounds
from quire.plugins.structured_output.string_ends import GrammarMemory
from quire.plugins.structured_output.string_tokens import StringTokens
from quire.plugins.structured_output.structural_tag import TagGrammar, check_structural_tag, list_json_schemas
from quire.sdk import (
    CompiledGrammar,
    GrammarState,
    InvalidRequestError,
    MaskRequest,
    StructuredOutputBackend,
    StructuredOutputsParams,
    TokenizerInfo,
    count_cpus,
)

__all__ = ["GuidanceBackend"]

_WHITESPACE = r"\x20?|\x0D?\x0A[\x20\x09]{0,40}"
"""Nothing, a blank, or a line end and an indentation: a model that goes on with blanks does not fill its answer so."""

_MAX_ITEMS_IN_ROW = 5000
"""Of the parser: enough for an object with a thousand properties, each of which may come next."""
_MAX_THREADS = 8
"""Most masks are known, and few threads are sooner awake than many."""
_MAX_COMPUTED_HERE = 3
"""Masks that take less time than waking other threads for them: 75 microseconds each."""
_PROBED_TOKENS = 8
"""Tokens of an answer that are tried when a grammar is compiled."""


class GuidanceBackend(StructuredOutputBackend):
    """JSON schemas, regular expressions, choices, Lark and GBNF grammars and structural tags."""

    fills_soon = True

    @dataclass(frozen=True)
    class Options:
        """Options of the backend."""

        threads: int = 0
        """Threads that compute masks; 0: four fifths of the processors that the process may use, at most 8."""
        max_lexer_states: int = 50_000
        """States that the lexer of one grammar may build, of 1 to 2 kB each."""
        disable_any_whitespace: bool = False
        """As if every request said so, but for those with a ``whitespace_pattern``."""
        disable_additional_properties: bool = False
        """As if every request said so."""

        def __post_init__(self) -> None:
            if self.threads < 0 or self.max_lexer_states < 1:
                raise ValueError("threads must be at least 0 and max_lexer_states at least 1")

    def __init__(self, tokenizer: TokenizerInfo, options: Options | None = None) -> None:
        super().__init__(tokenizer, options)
        self._options = options = options or self.Options()
        self._tokenizer = llguidance.LLTokenizer(
            tokenizer.tokenizer_json, n_vocab=tokenizer.vocab_size, eos_token=list(tokenizer.eos_token_ids)
        )
        added = {token["content"]: token["id"] for token in json.loads(tokenizer.tokenizer_json)["added_tokens"]}
        # The library takes more for special than the file does: added tokens that look like tags.
        special_ids = {text: token for text, token in added.items() if self._tokenizer.is_special_token(token)}
        self._lark = LarkWriter(special_ids, tokenizer.eos_token_ids)
        self._string_tokens: StringTokens | None = None
        self._limits = llguidance.LLParserLimits(
            max_items_in_row=_MAX_ITEMS_IN_ROW, max_lexer_states=options.max_lexer_states, verbose_errors=False
        )
        self._num_threads = options.threads or min(max(4 * count_cpus() // 5, 1), _MAX_THREADS)
        self._follower: Follower | None = None
        self._behind: list[GuidanceState] = []  # since the last masks

    @classmethod
    def validate_params(cls, params: StructuredOutputsParams) -> None:
        """Refuses by name what a schema asks for and llguidance would pass over."""
        if params.kind == "json":
            prepare_schema(params.load_json())
        elif params.kind == "structural_tag":
            check_structural_tag(params.load_json())

    def prepare_masks(self) -> None:
        """Start the threads, and look at every token."""
        self._follower = Follower(llguidance.LLExecutor(self._num_threads))
        self._string_tokens = StringTokens(self._tokenizer, self.tokenizer.vocab_size)

    def compile(self, params: StructuredOutputsParams) -> CompiledGrammar:
        """Build the parser, and the first mask, which shows what no answer can match."""
        options, yield_to_engine = self._options, self.yield_to_engine
        yield_to_engine()
        params = apply_defaults(params, options.disable_any_whitespace, options.disable_additional_properties)
        try:
            schema = _read_schema(params)
            grammar = self._write_grammar(params, schema)
        except InvalidRequestError:
            raise
        except Exception as error:
            raise InvalidRequestError(f"{params.kind}: {first_line(str(error))}", "structured_outputs") from None
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        for each in (matcher, matcher.deep_copy()):
            yield_to_engine()
            if not each.is_error():
                _walk(each, 0 if each is matcher else _PROBED_TOKENS)
            if each.is_error():
                raise InvalidRequestError(_explain_refusal(params, each.get_error()), "structured_outputs")
        tokens, eos_token_ids = self._string_tokens, frozenset(self.tokenizer.eos_token_ids)
        bounds = None if tokens is None else _find_string_bounds(params, schema)
        compiled = _Grammar(matcher, self._follower, tokens, bounds, eos_token_ids, len(grammar))
        if tokens is not None and bounds is not None and bounds.has_places and not params.answer_begin:
            assert schema is not None
            compiled.walk_answers(schema, tokens, self._tokenizer, yield_to_engine)
        return compiled

    def fill_masks(self, requests: Sequence[MaskRequest], block: NDArray[np.int32]) -> None:
        """What is known is written. The rest is computed here if that is little, else by the library's threads."""
        follower = self._follower
        assert follower is not None, "prepare_masks comes first"
        with follower.take_matchers():
            self._behind = self._fill_masks(requests, block, follower.executor)

    def begin_catch_up(self) -> None:
        """Matchers consume tokens that they have not, and look at the ends of strings."""
        if self._follower is not None and self._behind:
            self._follower.begin_catch_up(self._behind)
            self._behind = []

    def _fill_masks(
        self, requests: Sequence[MaskRequest], block: NDArray[np.int32], executor: llguidance.LLExecutor
    ) -> list[GuidanceState]:
        """Returns the states whose matchers are behind."""
        plain: list[tuple[GuidanceState, int]] = []
        drafting: list[tuple[GuidanceState, int, list[int]]] = []
        behind: list[GuidanceState] = []
        forced_rows, forced_tokens = [], []
        shared: dict[int, tuple[NDArray[np.int32], list[int]]] = {}  # by the mask's identity: its rows
        for request in requests:
            state: Any = request.state
            row, drafts = request.first_row, request.draft_token_ids
            request.is_started = True
            if drafts:
                if not state.write_draft_masks(block[row:], drafts):
                    drafting.append((state, row, list(drafts)))
                    continue
            elif state.forced:
                forced_rows.append(row)
                forced_tokens.append(state.forced[0])
            elif (strings := state.strings) is None:
                plain.append((state, row))
                continue
            elif (mask := strings.find_shared_mask()) is not None:
                shared.setdefault(id(mask), (mask, []))[1].append(row)
            elif not (strings.write_mask(block[row]) or state.recall_mask(block[row])):
                plain.append((state, row))
                continue
            if state.is_behind:
                behind.append(state)
            request.is_filled = not state.has_failed
        for mask, rows in shared.values():
            block[rows] = mask
        if forced_rows:
            tokens = np.array(forced_tokens, np.uint32)
            block[forced_rows] = 0
            block.view(np.uint32)[forced_rows, tokens // 32] = np.uint32(1) << tokens % 32
        memory = (block.ctypes.data, block.shape[1] * 4, block.shape[0])
        if len(plain) + len(drafting) > _MAX_COMPUTED_HERE:
            states = [state for state, _ in plain] + [state for state, *_ in drafting]
            catch_up_together(executor, states, _MAX_COMPUTED_HERE)
        for state, row in plain:
            state.catch_up()
            if len(plain) <= _MAX_COMPUTED_HERE:
                state.matcher.unsafe_compute_mask_ptr(block[row].ctypes.data, block.shape[1] * 4)
        if len(plain) > _MAX_COMPUTED_HERE:
            executor.unsafe_compute_mask_ptr([(state.matcher, row) for state, row in plain], *memory)
        if drafting:
            for state, *_ in drafting:
                state.catch_up()
            executor.unsafe_compute_mask_ptr_with_draft_token(
                [(state.matcher, row, drafts) for state, row, drafts in drafting], *memory
            )
        for state, row in (*plain, *((state, row) for state, row, _ in drafting)):
            state.learn_mask(block[row])
        for request in requests:
            if not request.is_filled:
                request.is_filled = not request.state.matcher.is_error()  # type: ignore[attr-defined]
        return behind

    def _write_grammar(self, params: StructuredOutputsParams, schema: dict[str, Any] | None) -> str:
        """A grammar in the form that llguidance takes."""
        kind = params.kind
        if kind == "structural_tag":
            tag = TagGrammar(self._lark, params.load_json(), _json_options(params))
            body: dict[str, Any] = {"lark_grammar": tag.write(params.answer_begin or "")}
        elif kind == "grammar":
            body = {"lark_grammar": llguidance.gbnf_to_lark.any_to_lark(str(params.grammar))}
        elif kind == "choice":
            body = {"lark_grammar": "start: " + " | ".join(json.dumps(text) for text in params.choice or ())}
        elif kind == "regex":
            body = {"lark_grammar": f"start: REGEX\nREGEX: /{llguidance.regex_to_lark(str(params.regex))}/"}
        else:
            assert schema is not None
            body = {"json_schema": {**schema, "x-guidance": _json_options(params)}}
        grammars = [{"name": "answer", **body}]
        answer_begin = "" if kind == "structural_tag" else params.answer_begin or ""
        if params.reasoning_end is not None or answer_begin:
            starts, ends = params.reasoning_starts, params.reasoning_ends
            lark = self._lark.write_reasoning(starts, ends, params.reasoning_between or "", answer_begin, "answer")
            grammars.insert(0, {"name": "reasoning", "lark_grammar": lark})
        return json.dumps({"grammars": grammars})


class _Grammar(CompiledGrammar):
    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        follower: Follower | None,
        string_tokens: StringTokens | None,
        string_bounds: StringBounds | None,
        eos_token_ids: frozenset[int],
        num_chars: int,
    ) -> None:
        self._matcher = matcher
        has_places = string_bounds is not None and string_bounds.has_places
        memory = GrammarMemory() if has_places else None
        self._follower = follower
        self._known = (string_tokens, string_bounds, eos_token_ids, memory)
        self._memory = memory
        self._own_bytes = (1 << 18) + 64 * num_chars

    @property
    def num_bytes(self) -> int:  # type: ignore[override]
        """It grows by what answers find out."""
        return self._own_bytes + (0 if self._memory is None else self._memory.num_bytes)

    def start(self) -> GrammarState:
        return GuidanceState(self._matcher.deep_copy(), self._follower, *self._known)

    def walk_answers(
        self,
        schema: dict[str, Any],
        tokens: StringTokens,
        tokenizer: llguidance.LLTokenizer,
        yield_to_engine: Callable[[], None],
    ) -> None:
        """Find out masks ahead, and leave room for those that answers find out."""
        assert self._memory is not None
        self._memory.leave_half()

        def start() -> GuidanceState:
            return GuidanceState(self._matcher.deep_copy(), None, *self._known)

        walk_answers(start, schema, tokens, tokenizer, yield_to_engine)
        self._memory.use_all()


def _read_schema(params: StructuredOutputsParams) -> dict[str, Any] | None:
    """The schema of an answer that is JSON as a whole; None: it is not."""
    if params.kind == "json":
        return prepare_schema(params.load_json())
    return {"type": "object"} if params.kind == "json_object" else None


def _find_string_bounds(params: StructuredOutputsParams, schema: dict[str, Any] | None) -> StringBounds | None:
    if params.whitespace_pattern is not None:  # blanks could look like the inside of a string
        return None
    if params.kind == "structural_tag":
        tag = params.load_json()
        if (schemas := list_json_schemas(tag)) is None:
            return None
        has_free_text = tag.get("free_text") is not False or any(each.get("free") for each in tag["structures"])
        return join_string_bounds(list(map(prepare_schema, schemas)), has_free_text or params.reasoning_end is not None)
    if schema is None:
        return None
    if params.reasoning_end is not None:  # free text before an answer may look like the properties of the schema
        return join_string_bounds([schema])
    bounds = find_string_bounds(schema)
    return (
        None if bounds is None else bounds._replace(form=(not params.disable_any_whitespace, bool(params.answer_begin)))
    )


def _walk(matcher: llguidance.LLMatcher, num_tokens: int) -> None:
    """Begin some answer, so that a grammar that soon exceeds a limit is refused, and not in the middle of an answer."""
    matcher.compute_bitmask()
    for _ in range(num_tokens):
        if matcher.is_error() or matcher.is_stopped():
            return
        token_ids = matcher.compute_ff_tokens()[:1]
        if not token_ids:
            mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            token_ids = [int(np.unpackbits(mask, bitorder="little").argmax())]
        matcher.try_consume_tokens(token_ids)


def _json_options(params: StructuredOutputsParams) -> dict[str, Any]:
    if params.disable_any_whitespace:
        return {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    pattern = params.whitespace_pattern or _WHITESPACE
    return {"whitespace_flexible": True, "whitespace_pattern": pattern}


def _explain_refusal(params: StructuredOutputsParams, error: str) -> str:
    line = first_line(error)
    if params.kind == "regex":  # without the grammar that it was written into
        line = line.partition(" 1 | start:")[0]
    return f"{params.kind}: {explain_error(line)}"
