"""The tool-call parser and the reasoning parser of an engine, and a parser of both for each answer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from msgspec.structs import replace

from quire.core.config import EngineConfig
from quire.core.contracts.reasoning_parser import ReasoningParser
from quire.core.contracts.tool_parser import ToolParser
from quire.core.contracts.tool_parser_text import MalformedCallError
from quire.core.engine.call_constraints import EnforcedCalls, can_enforce_calls, write_structural_tag
from quire.core.engine.detokenizer import Detokenizer
from quire.core.engine.tokenizer import Tokenizer
from quire.core.engine.tool_use import ToolUse
from quire.core.errors import InvalidRequestError, RequestFailedError, UnsupportedError
from quire.core.messages import CompletionOutput
from quire.core.parsing.answer_parser import AnswerParser
from quire.core.parsing.message import AssistantMessage
from quire.core.plugin.options import parse_options
from quire.core.plugin.quarantine import NEVER_CONTAINED, Quarantine, read_error_text
from quire.core.plugin.target import construct_plugin, load_target
from quire.core.sampling_params import SamplingParams
from quire.core.stats import QuarantinedPlugin
from quire.core.structured_outputs import StructuredOutputsParams

__all__ = ["AnswerParsers"]

_log = logging.getLogger("quire.engine")

_PROMPT_END_TOKENS = 32
"""How much of a prompt's end is looked at for reasoning that it has begun."""


class AnswerParsers:
    """Made once for an engine, in its API process."""

    def __init__(
        self,
        tools: ToolParser,
        reasoning: ReasoningParser,
        tokenizer: Tokenizer,
        *,
        names: tuple[str, str] = ("", ""),
        auto_tool_choice: bool = True,
        on_quarantine: Callable[[QuarantinedPlugin], None],
    ) -> None:
        self._tools, self._reasoning, self._tokenizer = tools, reasoning, tokenizer
        self._auto_tool_choice = auto_tool_choice
        self._tools_quarantine = Quarantine("tool_parser", names[0], on_quarantine, not_faults=(MalformedCallError,))
        self._reasoning_quarantine = Quarantine("reasoning_parser", names[1], on_quarantine)
        self._enforced = EnforcedCalls()
        texts = (*reasoning.begin, *reasoning.end, *reasoning.dropped)
        self._reasoning_tokens = tokenizer.find_special_tokens(texts)
        self._call_tokens = {
            parser: tokenizer.find_special_tokens(parser.markers) for parser in (tools, self._enforced)
        }

    @classmethod
    def from_config(
        cls, config: EngineConfig, tokenizer: Tokenizer, on_quarantine: Callable[[QuarantinedPlugin], None]
    ) -> AnswerParsers:
        """The parsers that the configuration names."""

        def make(kind: str, contract: type) -> Any:
            choice = config.plugin(kind)
            plugin = load_target(choice.target, contract)
            options = parse_options(plugin, choice.options)

            def construct_parser() -> Any:
                parser = plugin(options)
                texts = parser.markers if kind == "tool_parser" else (*parser.begin, *parser.end, *parser.dropped)
                if not all(isinstance(text, str) for text in texts):
                    raise TypeError(f"its markers are {texts!r:.100}, not texts")
                return parser

            return construct_plugin(f"{kind}/{choice.name}", construct_parser)

        return cls(
            make("tool_parser", ToolParser),
            make("reasoning_parser", ReasoningParser),
            tokenizer,
            names=(config.plugin("tool_parser").name, config.plugin("reasoning_parser").name),
            auto_tool_choice=bool(config.extra.get("auto_tool_choice", True)),
            on_quarantine=on_quarantine,
        )

    def find_calls_in(self, use: ToolUse) -> bool:
        """Whether calls are looked for in the answer of a request."""
        return self._choose_tools(use) is not None

    def find_shown_tokens(self, use: ToolUse) -> frozenset[int]:
        """The special tokens that the parser of a request's answers has to see."""
        tools = self._choose_tools(use)
        return self._reasoning_tokens if tools is None else self._reasoning_tokens | self._call_tokens[tools]

    def constrain_params(self, use: ToolUse, prompt_token_ids: Sequence[int], params: SamplingParams) -> SamplingParams:
        """The parameters with what the tools of a request ask for as structured output, which begins where the
        reasoning of the answer ends. Where the answer has to be JSON, it may be calls instead, and is calls alone where
        one is required; where it has another form, calls of the model's own accord are not possible. Raises
        ``InvalidRequestError`` for a call that is required beside such a form."""
        constraint, tools = params.structured_outputs, self._choose_tools(use)
        may_be_calls = constraint is None or constraint.kind in ("json", "json_object")
        if use.choice == "required" and not may_be_calls:
            what = "a call that is required leaves no room for structured_outputs other than JSON"
            raise InvalidRequestError(f"tool_choice: {what}; give one of them", "tool_choice")
        if tools is not None and may_be_calls:
            constraint = self._add_calls(constraint, use, tools)
        if constraint is None:
            return params
        if self._reasoning.begin and constraint.reasoning_end is None:
            constraint = self._leave_reasoning(constraint, self._find_prompt_end(prompt_token_ids))
        return replace(params, structured_outputs=constraint)

    def make_parser(self, use: ToolUse, prompt_token_ids: Sequence[int]) -> AnswerParser | None:
        """The parser for one answer; None if there is nothing to look for."""
        tools = self._choose_tools(use)
        reasoning = self._reasoning if self._reasoning.begin and self._reasoning_quarantine.is_active else None
        if tools is None and reasoning is None:
            return None
        in_reasoning = None
        if reasoning is not None:
            prompt_end = self._find_prompt_end(prompt_token_ids)
            in_reasoning = self._reasoning_quarantine.call(reasoning.is_reasoning_open, prompt_end)
        return AnswerParser(
            tools,
            reasoning if in_reasoning is not None else None,
            use.functions,
            in_reasoning=bool(in_reasoning),
            max_calls=use.max_calls,
            quarantine=None if tools is self._enforced else self._tools_quarantine,
        )

    def read_message(
        self, use: ToolUse, prompt_token_ids: Sequence[int], completion: CompletionOutput, params: SamplingParams
    ) -> AssistantMessage:
        """The message of a finished completion, whose text need not show the special tokens of the parser."""
        text, shown = completion.text, self.find_shown_tokens(use)
        if params.skip_special_tokens and params.detokenize and not shown.isdisjoint(completion.token_ids):
            detokenizer = Detokenizer(self._tokenizer, prompt_token_ids, params, shown)
            ends_with_token = completion.finish_reason == "stop" and not isinstance(completion.stop_reason, str)
            detokenizer.append_tokens(completion.token_ids, ends_with_token)
            detokenizer.flush()
            text = detokenizer.visible_text(finished=True)
        parser = self.make_parser(use, prompt_token_ids)
        if parser is None:
            return AssistantMessage(content=text)
        return AssistantMessage.from_events([*parser.feed(text), *parser.finish()])

    def _choose_tools(self, use: ToolUse) -> ToolParser | None:
        """The parser of a request's calls: another one where the family cannot be made to write a required call."""
        if use.choice == "none" or not use.functions:
            return None
        if use.choice == "required":
            has_forms = self._has_tools and self._tools_quarantine.call(can_enforce_calls, use, self._tools)
            return self._tools if has_forms else self._enforced
        return self._tools if self._auto_tool_choice and self._has_tools else None

    def _add_calls(
        self, constraint: StructuredOutputsParams | None, use: ToolUse, tools: ToolParser
    ) -> StructuredOutputsParams | None:
        """What an answer has to match that may be calls, too."""
        schema = None
        if constraint is not None and use.choice != "required":
            schema = constraint.load_json() if constraint.kind == "json" else {"type": "object"}
        tag = self._write_tag(use, tools, schema)
        if tag is None:
            return constraint
        if constraint is None:
            return StructuredOutputsParams(structural_tag=tag)
        return replace(constraint, json=None, json_object=None, structural_tag=tag)

    def _write_tag(self, use: ToolUse, tools: ToolParser, schema: dict[str, Any] | bool | None) -> Any:
        """The request fails where the parser does: what it asks for is not lifted."""
        try:
            return write_structural_tag(use, tools, schema)
        except (*NEVER_CONTAINED, UnsupportedError):
            raise
        except BaseException as error:
            what = f"a format of calls raised {type(error).__name__}: {read_error_text(error)}"
            if tools is self._enforced:
                _log.error("%s", what, exc_info=error)
                raise RequestFailedError("the calls cannot be enforced; the server's log says why") from error
            self._tools_quarantine.switch_off("raised", what, error)
            message = f"tool_parser/{self._tools_quarantine.name} failed; the server's log says why"
            raise RequestFailedError(message) from error

    def _leave_reasoning(self, constraint: StructuredOutputsParams, prompt_end: str) -> StructuredOutputsParams:
        """The constraint for what follows the reasoning of an answer, whose prompt has this end."""
        reasoning = self._reasoning
        answer_begin = reasoning.answer_begin or None
        if prompt_end.rstrip().endswith(reasoning.end):
            return replace(constraint, answer_begin=answer_begin)
        is_open = self._reasoning_quarantine.call(reasoning.is_reasoning_open, prompt_end)
        begin = () if is_open else (*reasoning.begin, *reasoning.preambles)
        return replace(
            constraint,
            reasoning_start=_join_texts(begin),
            reasoning_end=_join_texts(reasoning.end),
            reasoning_between=reasoning.between or None,
            answer_begin=answer_begin,
        )

    def _find_prompt_end(self, prompt_token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(prompt_token_ids[-_PROMPT_END_TOKENS:])

    @property
    def _has_tools(self) -> bool:
        return bool(self._tools.begin or self._tools.begin_first) and self._tools_quarantine.is_active


def _join_texts(texts: tuple[str, ...]) -> str | list[str] | None:
    return list(texts) if len(texts) > 1 else next(iter(texts), None)
