"""The body of ``/v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from quire.core.engine.tool_use import ToolUse, read_tool_use
from quire.core.sampling_params import SamplingParams
from quire.server.http.protocol.common import (
    MAX_ITEMS,
    Body,
    GenerationBody,
    Int32,
    UnsupportedField,
    check_top_logprobs,
    unsupported_error,
)

__all__ = ["ChatBody", "Conversation", "Message"]


_UNSUPPORTED_IN_CHAT = (
    UnsupportedField("echo", "it belongs to /v1/completions; leave it out", (False,)),
    UnsupportedField("best_of", "it belongs to /v1/completions; leave it out", (1,)),
    UnsupportedField("suffix", "it belongs to /v1/completions; leave it out", ("",)),
    UnsupportedField("functions", "give them as tools"),
    UnsupportedField("function_call", "a call cannot be enforced yet; give tools and leave it out", ("auto", "none")),
    UnsupportedField("documents", "give them in chat_template_kwargs"),
)


class Message(Body):
    """One turn, as ``quire.core.engine.chat`` normalizes it. Whatever else it holds reaches the chat template."""

    role: str = Field(min_length=1)
    content: str | Annotated[list[dict[str, Any]], Field(max_length=MAX_ITEMS)] | None = None
    tool_calls: list[dict[str, Any]] | None = Field(None, max_length=MAX_ITEMS)


class Conversation(Body):
    """Messages, and how the chat template turns them into a prompt."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_ITEMS)
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_ITEMS)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def template_arguments(self) -> dict[str, Any]:
        """The arguments of ``AsyncLLM.apply_chat_template``."""
        if self.chat_template is not None:
            raise unsupported_error(
                "chat_template", "templates in requests are not run; start with --chat-template FILE"
            )
        return {
            "messages": [message.model_dump(exclude_none=True) for message in self.messages],
            "tools": self.tools,
            "add_generation_prompt": self.add_generation_prompt,
            "continue_final_message": bool(self.continue_final_message),
            "chat_template_kwargs": self.chat_template_kwargs,
        }


class ChatBody(GenerationBody, Conversation):
    """A chat completion."""

    logprobs: bool | None = None
    top_logprobs: Int32 | None = None
    max_completion_tokens: Int32 | None = None
    reasoning_effort: str | None = None
    """The variable ``reasoning_effort`` of the chat template."""
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    @classmethod
    def unsupported_fields(cls) -> tuple[UnsupportedField, ...]:
        """Those of completions, and the predecessors of ``tools``."""
        return (*super().unsupported_fields(), *_UNSUPPORTED_IN_CHAT)

    def template_arguments(self) -> dict[str, Any]:
        """As for any conversation; with ``tool_choice: none`` the template sees no tools."""
        arguments = super().template_arguments()
        if self.tool_choice == "none":
            arguments["tools"] = None
        if self.reasoning_effort is not None:
            variables = {"reasoning_effort": self.reasoning_effort, **(self.chat_template_kwargs or {})}
            arguments["chat_template_kwargs"] = variables
        return arguments

    def read_tool_use(self) -> ToolUse:
        """What the request says of tools. Raises InvalidRequestError."""
        return read_tool_use(self.tools, self.tool_choice, self.parallel_tool_calls)

    def to_sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """The engine's parameters, with the model's ``defaults`` where the body says nothing. Raises ApiError or
        InvalidRequestError."""
        self.check_supported()
        if self.add_special_tokens:
            raise unsupported_error("add_special_tokens", "the chat template writes them; leave it out")
        check_top_logprobs(self.top_logprobs, bool(self.logprobs), "logprobs=true")
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        limit = limit if limit is not None else defaults.get("max_tokens")
        return self.build_sampling_params(
            defaults, max_tokens=limit, logprobs=(self.top_logprobs or 0) if self.logprobs else None
        )
