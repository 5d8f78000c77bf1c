"""What answers look like, for the OpenAPI document alone: routes encode theirs without these models.

A test compares each kind of answer with its model here. Fields may be added; those that are named are always there.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

__all__ = [
    "ChatChunk",
    "ChatCompletion",
    "Completion",
    "CompletionChunk",
    "DeletedResponse",
    "DetokenizedText",
    "ErrorAnswer",
    "Health",
    "Load",
    "ModelCard",
    "ModelList",
    "ResponseAnswer",
    "ResponseEvent",
    "StepTrace",
    "TokenizedText",
    "Version",
]

FinishReason = Literal["stop", "length", "tool_calls", "abort"]


class Error(BaseModel):
    """What went wrong."""

    message: str = Field(description="one line: the value, the reason, the remedy")
    type: str
    param: str | None = Field(description="the field of the body that is to be changed")
    code: str


class ErrorAnswer(BaseModel):
    """Every answer but a success, and the event with which a stream ends that cannot go on."""

    error: Error


class PromptTokensDetails(BaseModel):
    """How the prompt was computed."""

    cached_tokens: int = Field(description="found in the prefix cache")


class Usage(BaseModel):
    """Tokens of an answer; a prompt counts once, whatever ``n``."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TokenLogprob(BaseModel):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenTokenLogprob(TokenLogprob):
    """The token that was chosen, and the likeliest."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """By token of the answer."""

    content: list[ChosenTokenLogprob]
    refusal: None


class CompletionLogprobs(BaseModel):
    """Parallel lists, by token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(BaseModel):
    """Of one token at one position of the prompt."""

    logprob: float
    rank: int | None
    decoded_token: str | None


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class Choice(BaseModel):
    """What all choices have."""

    index: int
    finish_reason: FinishReason | None
    stop_reason: int | str | None = Field(None, description="the stop string or token that ended it")
    token_ids: list[int] | None = None


class CalledFunction(BaseModel):
    """A function, and JSON text as the model wrote it; in a stream a piece of that."""

    name: str | None = None
    arguments: str | None = None


class ToolCall(BaseModel):
    """A call that the model asks for; in a stream the first piece of it has ``id``, ``type`` and the name."""

    index: int | None = Field(None, description="in a stream: which of the calls")
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class ChatMessage(BaseModel):
    """The answer to a conversation."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class ChatChoice(Choice):
    """One of ``n`` answers."""

    message: ChatMessage
    logprobs: ChatLogprobs | None


class ChatCompletion(BaseModel):
    """The answer of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None
    prompt_logprobs: PromptLogprobs | None
    prompt_token_ids: list[int] | None


class ChatDelta(BaseModel):
    """What is new."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class ChatChunkChoice(Choice):
    """What is new of one of ``n`` answers."""

    delta: ChatDelta
    logprobs: ChatLogprobs | None


class ChatChunk(BaseModel):
    """An event of a streamed answer of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = Field(None, description="with the first chunk of a choice, where asked for")


class CompletionChoice(Choice):
    """One of ``n`` continuations of one prompt."""

    text: str
    logprobs: CompletionLogprobs | None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class Completion(BaseModel):
    """The answer of ``/v1/completions``."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str | None


class CompletionChunk(BaseModel):
    """An event of a streamed answer of ``/v1/completions``."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ResponseAnswer(BaseModel):
    """The answer of ``/v1/responses``; items and other fields are those of the OpenAI API."""

    id: str
    object: Literal["response"]
    created_at: float
    status: Literal["completed", "incomplete", "in_progress", "failed"]
    model: str
    output: list[dict[str, Any]]


class ResponseEvent(BaseModel):
    """An event of a streamed answer of ``/v1/responses``."""

    type: str
    sequence_number: int


class DeletedResponse(BaseModel):
    """A response that is no longer stored."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class ModelCard(BaseModel):
    """A name by which requests may call the model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"]
    data: list[ModelCard]


class TokenizedText(BaseModel):
    """The answer of ``/tokenize``."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizedText(BaseModel):
    """The answer of ``/detokenize``."""

    prompt: str


class Health(BaseModel):
    """Requests can be served."""

    status: Literal["ok"]


class Version(BaseModel):
    """The version of Quire."""

    version: str


class Load(BaseModel):
    """What a load balancer wants to know."""

    server_load: int
    num_requests_running: float
    num_requests_waiting: float
    kv_cache_usage_perc: float


class StepTrace(BaseModel):
    """Steps of the engine in the format of Chrome's traces, which ui.perfetto.dev shows."""

    traceEvents: list[dict[str, Any]]
    displayTimeUnit: str
