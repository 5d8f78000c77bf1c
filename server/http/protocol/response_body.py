"""The body of ``/v1/responses``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from quire.core.engine.tool_use import ToolUse, read_tool_use
from quire.core.sampling_params import SamplingParams
from quire.core.structured_outputs import StructuredOutputsParams
from quire.server.http.errors import ApiError
from quire.server.http.protocol.common import (
    FORMAT_FIELDS,
    MAX_ITEMS,
    GenerationBody,
    Int32,
    UnsupportedField,
    check_top_logprobs,
    list_unknown_fields,
    unsupported_error,
)
from quire.server.http.protocol.response_input import list_chat_messages, list_chat_tools

__all__ = ["ResponseBody"]

LOGPROBS = "message.output_text.logprobs"
_UNSUPPORTED = (
    UnsupportedField("background", "the answer comes with the request; leave it out", (False,)),
    UnsupportedField("conversation", "conversations are not stored; send the input"),
    UnsupportedField("prompt", "there are no stored prompts; give instructions and input"),
    UnsupportedField("messages", "give them as input"),
    UnsupportedField("logprobs", f"give include: [{LOGPROBS!r}]", (False,)),
    UnsupportedField("max_completion_tokens", "give max_output_tokens"),
)


class ResponseBody(GenerationBody):
    """A response: an answer to a conversation, with calls and reasoning as items of their own."""

    input: str | Annotated[list[dict[str, Any]], Field(max_length=MAX_ITEMS)]
    instructions: str | None = None
    max_output_tokens: Int32 | None = None
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_ITEMS)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    truncation: str | None = None
    include: list[str] | None = Field(None, max_length=MAX_ITEMS)
    top_logprobs: Int32 | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @classmethod
    def unsupported_fields(cls) -> tuple[UnsupportedField, ...]:
        """Those of completions, and what only OpenAI's own service has."""
        return (*super().unsupported_fields(), *_UNSUPPORTED)

    def unknown_fields(self) -> dict[str, list[str]]:
        """Those of ``text``, ``reasoning`` and ``include`` too."""
        form = (self.text or {}).get("format")
        return {
            **super().unknown_fields(),
            **list_unknown_fields("text", self.text, ("format",)),
            **list_unknown_fields("text.format", form, ("type", *FORMAT_FIELDS)),
            **list_unknown_fields("reasoning", self.reasoning, ("effort",)),
            **{f"include.{name}": [f"include.{LOGPROBS}"] for name in self.include or () if name != LOGPROBS},
        }

    @property
    def wants_logprobs(self) -> bool:
        """Whether the message comes with the log-probabilities of its tokens."""
        return LOGPROBS in (self.include or ())

    def list_messages(self) -> list[dict[str, Any]]:
        """The input as messages of a chat. Raises InvalidRequestError."""
        return list_chat_messages(self.input)

    def template_arguments(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """The arguments of ``AsyncLLM.apply_chat_template`` for a conversation, before which the instructions stand."""
        variables = dict(self.chat_template_kwargs or {})
        effort = (self.reasoning or {}).get("effort")
        if effort is not None:
            variables.setdefault("reasoning_effort", effort)
        instructions = [{"role": "system", "content": self.instructions}] if self.instructions else []
        tools = None if self.tool_choice == "none" else list_chat_tools(self.tools)
        return {"messages": [*instructions, *messages], "tools": tools, "chat_template_kwargs": variables or None}

    def read_tool_use(self) -> ToolUse:
        """What the request says of tools. Raises InvalidRequestError."""
        return read_tool_use(self.tools, self.tool_choice, self.parallel_tool_calls)

    def to_sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """The engine's parameters, with the model's ``defaults`` where the body says nothing. Raises ApiError or
        InvalidRequestError."""
        self.check_supported()
        for name, remedy in (("n", "one answer is given; leave it out"), ("max_tokens", "give max_output_tokens")):
            if getattr(self, name) not in (None, 1 if name == "n" else None):
                raise unsupported_error(name, remedy)
        check_top_logprobs(self.top_logprobs, self.wants_logprobs, f"include: [{LOGPROBS!r}]")
        if self.truncation not in (None, "auto", "disabled"):
            raise ApiError(400, "truncation: must be 'auto' or 'disabled'", param="truncation")
        if self.response_format is not None:
            raise unsupported_error("response_format", "give it as text.format")
        limit = self.max_output_tokens if self.max_output_tokens is not None else defaults.get("max_tokens")
        cut = {"truncate_prompt_tokens": -1} if self.truncation == "auto" else {}
        constraint = _read_format((self.text or {}).get("format"))
        form = {} if constraint is None else {"structured_outputs": constraint}
        logprobs = (self.top_logprobs or 0) if self.wants_logprobs else None
        return self.build_sampling_params(defaults, max_tokens=limit, logprobs=logprobs, **cut, **form)


def _read_format(wanted: Any) -> StructuredOutputsParams | None:
    """``text.format``: text, a JSON object, or JSON of a schema."""
    if wanted is None or (isinstance(wanted, dict) and wanted.get("type", "text") == "text"):
        return None
    if isinstance(wanted, dict) and wanted.get("type") == "json_object":
        return StructuredOutputsParams(json_object=True)
    if isinstance(wanted, dict) and wanted.get("type") == "json_schema" and wanted.get("schema") is not None:
        return StructuredOutputsParams(json=wanted["schema"])
    message = "text.format: must have the type text, json_object, or json_schema with a schema"
    raise ApiError(400, f"{message}, got {wanted!r:.60}", param="text.format")
