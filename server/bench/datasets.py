"""Prompts from a file: conversations in ShareGPT's layout, JSON lines, or plain text."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from quire.core.errors import ConfigError
from quire.server.bench.workloads import Workload

__all__ = ["load_dataset_workload", "read_prompts"]

_MIN_TOKENS, _MAX_PROMPT_TOKENS, _MAX_TOTAL_TOKENS = 4, 1024, 2048
"""Conversations outside of these, in tokens, are left out, as in vLLM's benchmarks."""


def read_prompts(path: str, count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Up to ``count`` pairs of a prompt and an answer, which may be empty, shuffled with ``seed``.

    ``.json``: a list of ``{"conversations": [{"value": prompt}, {"value": answer}, ...]}``; ``.jsonl``: a line an
    object with ``prompt`` (or ``question``) and perhaps ``completion`` (or ``answer``); anything else: a prompt a line.
    Raises ConfigError.
    """
    pairs = list(_read_pairs(Path(path)))
    if not pairs:
        raise ConfigError(f"--dataset {path} has no prompts; see quire bench throughput --help for the layouts")
    random.Random(seed).shuffle(pairs)
    return pairs[:count]


def load_dataset_workload(
    path: str, encode: Callable[[str], list[int]], count: int, output_len: int | None, seed: int = 0
) -> Workload:
    """Requests from a file. An answer has the length of the file's, or ``output_len`` tokens if that is not None."""
    prompts: list[list[int]] = []
    answers: list[int] = []
    for prompt, answer in read_prompts(path, 1 << 30, seed):
        tokens, length = encode(prompt), output_len or len(encode(answer)) or 128
        if (
            _MIN_TOKENS <= len(tokens) <= _MAX_PROMPT_TOKENS
            and length >= _MIN_TOKENS
            and len(tokens) + length <= _MAX_TOTAL_TOKENS
        ):
            prompts.append(tokens)
            answers.append(length)
        if len(prompts) == count:
            break
    if not prompts:
        raise ConfigError(
            f"--dataset {path} has no prompt of {_MIN_TOKENS} to {_MAX_PROMPT_TOKENS} tokens with an answer "
            f"of {_MIN_TOKENS} or more; give --output-len, or another file"
        )
    return Workload(Path(path).stem, prompts, answers)


def _read_pairs(path: Path) -> Iterator[tuple[str, str]]:
    try:
        text = path.read_text("utf-8")
        if path.suffix == ".json":
            for entry in json.loads(text):
                turns = [str(turn["value"]) for turn in entry.get("conversations") or ()]
                if len(turns) >= 2:
                    yield turns[0], turns[1]
        elif path.suffix == ".jsonl":
            for line in filter(str.strip, text.splitlines()):
                entry = json.loads(line)
                prompt = entry["prompt"] if "prompt" in entry else entry["question"]
                yield str(prompt), str(entry.get("completion") or entry.get("answer") or "")
        else:
            yield from ((line, "") for line in text.splitlines() if line.strip())
    except OSError as error:
        raise ConfigError(f"--dataset {path} cannot be read: {error.strerror}") from None
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"--dataset {path} does not have the layout of {path.suffix} files: {error!r}") from None
