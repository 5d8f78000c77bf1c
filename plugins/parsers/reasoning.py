"""Reasoning as families of models write it: a table each."""

from __future__ import annotations

from quire.sdk import ReasoningParser

__all__ = ["DeepSeekR1", "GraniteReasoning", "HarmonyReasoning", "NoReasoning", "Qwen3"]


class NoReasoning(ReasoningParser):
    """No reasoning is split off: the text stays as it is."""

    begin = ()
    end = ()


class Qwen3(ReasoningParser):
    """Qwen3, GLM-4.5 and others: ``<think>...</think>``, by the model or begun by its chat template."""

    begin = ("<think>",)
    end = ("</think>",)


class DeepSeekR1(ReasoningParser):
    """DeepSeek-R1 and its distillates: an answer begins with reasoning, with or without ``<think>``, unless the prompt
    has ended it."""

    begin = ("<think>",)
    end = ("</think>",)

    def is_reasoning_open(self, prompt_end: str) -> bool:
        """Unless the prompt has ended it."""
        return not prompt_end.rstrip().endswith(self.end)


class GraniteReasoning(ReasoningParser):
    """Granite 3.2 in sentences, 3.3 with ``<think>`` and ``<response>``."""

    begin = ("Here is my thought process:", "Here's my thought process:", "<think>")
    end = ("Here is my response:", "Here's my response:", "</think>")
    dropped = ("<response>", "</response>")


class HarmonyReasoning(ReasoningParser):
    """gpt-oss: messages on the analysis channel; those on the commentary and final channels are the answer."""

    anywhere = True
    begin = ("<|channel|>analysis<|message|>",)
    end = ("<|end|>",)
    preambles = ("<|channel|>commentary<|message|>",)
    between = "<|start|>assistant"
    answer_begin = "<|channel|>final<|message|>"
    dropped = (
        "<|start|>assistant",
        "<|channel|>final<|message|>",
        "<|channel|>final <|constrain|>json<|message|>",
        "<|channel|>commentary<|message|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
    )
