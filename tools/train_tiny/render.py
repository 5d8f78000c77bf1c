"""Dialogues as ChatML, in pieces: the same text as the chat template's, and which of it the model is to learn.

The template stays the authority; a test holds the two equal. This one exists because millions of dialogues are
rendered.
"""

from __future__ import annotations

import json
from typing import Any

from tools.train_tiny.examples import Message

#: (text, whether its tokens count in the loss). Text is tokenized piece by piece, as it is when a model is served.
Piece = tuple[str, bool]

_TOOLS_AFTER = (
    '</tools>\nTo call one, answer with:\n<tool_call>\n{"name": <name>, "arguments": <arguments>}\n</tool_call>'
)


def _system(messages: list[Message], tools: list[dict[str, Any]]) -> str:
    own = messages[0]["content"] if messages[0]["role"] == "system" else None
    if not tools:
        return "" if own is None else f"<|im_start|>system\n{own}<|im_end|>\n"
    lead = "" if own is None else f"{own}\n\n"
    listed = "".join(json.dumps(tool, ensure_ascii=False) + "\n" for tool in tools)
    return f"<|im_start|>system\n{lead}You may call these functions:\n<tools>\n{listed}{_TOOLS_AFTER}<|im_end|>\n"


def _assistant_text(message: Message) -> str:
    calls = [call["function"] for call in message.get("tool_calls", ())]
    written = [
        f'<tool_call>\n{{"name": {json.dumps(c["name"])}, "arguments": {c["arguments"]}}}\n</tool_call>' for c in calls
    ]
    return "\n".join([*([message["content"]] if message["content"] else []), *written])


def pieces(messages: list[Message], tools: list[dict[str, Any]], reply: str) -> list[Piece]:
    """Render a dialogue and its reply; every assistant turn counts in the loss."""
    found: list[Piece] = []
    waiting = _system(messages, tools)
    start = 1 if messages[0]["role"] == "system" else 0
    for index in range(start, len(messages)):
        message = messages[index]
        if message["role"] == "assistant":
            found += [(waiting + "<|im_start|>assistant\n", False), (_assistant_text(message) + "<|im_end|>", True)]
            waiting = "\n"
        elif message["role"] == "tool":
            first = messages[index - 1]["role"] != "tool"
            last = index + 1 == len(messages) or messages[index + 1]["role"] != "tool"
            waiting += "<|im_start|>user\n" if first else "\n"
            waiting += f"<tool_response>\n{message['content']}\n</tool_response>"
            waiting += "<|im_end|>\n" if last else ""
        else:
            waiting += f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"
    return [*found, (waiting + "<|im_start|>assistant\n", False), (reply + "<|im_end|>", True), ("\n", False)]


def prompt(messages: list[Message], tools: list[dict[str, Any]]) -> str:
    """Render what is given to the model to be answered."""
    return "".join(text for text, _ in pieces(messages, tools, "")[:-2])
