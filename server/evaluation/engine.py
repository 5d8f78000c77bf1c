"""The engine in this process that ``quire eval`` uses without ``--url``."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from quire.core.engine.args import EngineArgs

if TYPE_CHECKING:
    from quire import LLM, SamplingParams
    from quire.core.messages import RequestOutput

__all__ = ["answer_conversations", "generate_with_progress", "open_engine"]


@contextlib.contextmanager
def open_engine(args: EngineArgs, *processors: str) -> Iterator[LLM]:
    """An engine in this process with additional logits processors; its memory is freed afterwards."""
    from quire import LLM

    args = replace(args, logits_processors=[*args.logits_processors, *processors])
    llm = LLM(**{each.name: getattr(args, each.name) for each in fields(args)})
    try:
        yield llm
    finally:
        llm.shutdown()
        del llm
        gc.collect()
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def answer_conversations(
    llm: LLM, conversations: Sequence[tuple[list[dict[str, Any]], list[dict[str, Any]]]]
) -> list[str]:
    """The assistant's text for each conversation, in order."""
    from quire import SamplingParams
    from quire.server.evaluation import MAX_NEW_TOKENS

    prompts = [llm.tokenizer.apply_chat_template(messages, tools=tools) for messages, tools in conversations]
    params = SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS)
    return [each.outputs[0].text for each in generate_with_progress(llm, prompts, [params] * len(prompts))]


def generate_with_progress(
    llm: LLM, prompts: Sequence[list[int]], params: Sequence[SamplingParams]
) -> list[RequestOutput]:
    """Complete them, with a progress bar on a terminal."""
    return llm.generate(prompts, params, use_tqdm=sys.stderr.isatty())
