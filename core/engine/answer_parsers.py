"""The tool-call parser and the reasoning parser of an engine, and a parser of both for each answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from quire.core.config import EngineConfig
from quire.core.contracts.reasoning_parser import ReasoningParser
from quire.core.contracts.tool_parser import ToolParser
from quire.core.engine.detokenizer import Detokenizer
from quire.core.engine.tokenizer import Tokenizer
from quire.core.engine.tool_use import ToolUse
from quire.core.messages import CompletionOutput
from quire.core.parsing.answer_parser import AnswerParser
from quire.core.parsing.message import AssistantMessage
from quire.core.plugin.options import parse_options
from quire.core.plugin.quarantine import Quarantine
from quire.core.plugin.target import load_target
from quire.core.sampling_params import SamplingParams
from quire.core.stats import QuarantinedPlugin

__all__ = ["AnswerParsers"]

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
        self._tools_quarantine = Quarantine("tool_parser", names[0], on_quarantine)
        self._reasoning_quarantine = Quarantine("reasoning_parser", names[1], on_quarantine)
        texts = (*reasoning.begin, *reasoning.end, *reasoning.dropped)
        self._reasoning_tokens = tokenizer.find_special_tokens(texts)
        self._all_tokens = self._reasoning_tokens | tokenizer.find_special_tokens(tools.markers)

    @classmethod
    def from_config(
        cls, config: EngineConfig, tokenizer: Tokenizer, on_quarantine: Callable[[QuarantinedPlugin], None]
    ) -> AnswerParsers:
        """The parsers that the configuration names."""

        def make(kind: str, contract: type) -> Any:
            choice = config.plugin(kind)
            plugin = load_target(choice.target, contract)
            return plugin(parse_options(plugin, choice.options))

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
        is_on = self._auto_tool_choice or use.choice == "required"
        return bool(use.functions) and use.choice != "none" and is_on and self._has_tools

    def find_shown_tokens(self, use: ToolUse) -> frozenset[int]:
        """The special tokens that the parser of a request's answers has to see."""
        return self._all_tokens if self.find_calls_in(use) else self._reasoning_tokens

    def make_parser(self, use: ToolUse, prompt_token_ids: Sequence[int]) -> AnswerParser | None:
        """The parser for one answer; None if there is nothing to look for."""
        tools = self._tools if self.find_calls_in(use) else None
        reasoning = self._reasoning if self._reasoning.begin and self._reasoning_quarantine.is_active else None
        if tools is None and reasoning is None:
            return None
        in_reasoning = None
        if reasoning is not None:
            prompt_end = self._tokenizer.decode(prompt_token_ids[-_PROMPT_END_TOKENS:])
            in_reasoning = self._reasoning_quarantine.call(reasoning.is_reasoning_open, prompt_end)
        return AnswerParser(
            tools,
            reasoning if in_reasoning is not None else None,
            use.functions,
            in_reasoning=bool(in_reasoning),
            max_calls=use.max_calls,
            on_fault=partial(_switch_off, self._tools_quarantine),
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

    @property
    def _has_tools(self) -> bool:
        return bool(self._tools.begin or self._tools.begin_first) and self._tools_quarantine.is_active


def _switch_off(quarantine: Quarantine, error: Exception) -> None:
    quarantine.switch_off("raised", f"parse_calls raised {type(error).__name__}: {error}", error)
