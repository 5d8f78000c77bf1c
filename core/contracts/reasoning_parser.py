"""Reasoning parser: tells a model's reasoning from its answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

__all__ = ["ReasoningParser"]


class ReasoningParser(ABC):
    """The texts between which a family of models reasons. One object serves every answer: it keeps nothing of them.

    Special tokens among these texts are found though ``skip_special_tokens`` hides them from callers.
    """

    anywhere: bool = False
    """Whether reasoning may begin again after content. Otherwise ``begin`` counts only where the answer begins."""
    dropped: tuple[str, ...] = ()
    """Texts between messages that are part of neither, such as the header of the final channel of gpt-oss."""

    preambles: tuple[str, ...] = ()
    """Texts that begin a part of the answer that ``end`` ends, such as what gpt-oss says before a call."""
    between: str = ""
    """What the family writes before all that follows ``end``, such as the begin of another message."""
    answer_begin: str = ""
    """What stands before an answer that is no call, such as the header of the final channel of gpt-oss. It is one of
    ``dropped``."""

    def __init__(self, options: Any = None) -> None:
        self.options = options

    @property
    @abstractmethod
    def begin(self) -> tuple[str, ...]:
        """Texts that begin reasoning."""

    @property
    @abstractmethod
    def end(self) -> tuple[str, ...]:
        """Texts that end it. A call of a tool ends it too."""

    def is_reasoning_open(self, prompt_end: str) -> bool:
        """Whether an answer begins with reasoning, by the end of its prompt: chat templates that always think write
        the begin themselves, and those that are told not to write the end too."""
        return prompt_end.rstrip().endswith(self.begin)
