"""The workloads of the benchmarks, exactly reproducible, so that figures of different engines can be compared."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from quire.core.errors import ConfigError

__all__ = ["WORKLOADS", "Workload", "make_random_prompts", "make_random_workload", "make_workload"]

_TOKEN_ID_LIMIT = 10_000
"""Token ids are sampled below this; a smaller vocabulary takes them modulo its size."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts as token ids, and how many tokens each answer has (end of text is ignored)."""

    name: str
    prompts: Sequence[list[int]]
    max_tokens: Sequence[int]
    sampled: bool = False
    """Temperature 0.8 and top_p 0.95 instead of greedy."""

    @property
    def input_tokens(self) -> int:
        """Prompt tokens in all."""
        return sum(map(len, self.prompts))

    @property
    def output_tokens(self) -> int:
        """Answer tokens in all."""
        return sum(self.max_tokens)

    def limit_requests(self, count: int | None) -> Workload:
        """Only the first ``count`` requests; None: all."""
        return (
            self if count is None else replace(self, prompts=self.prompts[:count], max_tokens=self.max_tokens[:count])
        )

    def scale_lengths(self, factor: float) -> Workload:
        """Prompt and answer lengths times ``factor``, at least one token each."""
        if factor == 1.0:
            return self
        prompts = [prompt[: max(1, round(len(prompt) * factor))] for prompt in self.prompts]
        return replace(self, prompts=prompts, max_tokens=[max(1, round(n * factor)) for n in self.max_tokens])

    def wrap_token_ids(self, vocab_size: int) -> Workload:
        """Token ids taken modulo the size of the vocabulary."""
        return replace(self, prompts=[[token % vocab_size for token in prompt] for prompt in self.prompts])

    def limit_to_one_token(self) -> Workload:
        """The same prompts, one token each: what a run costs before it decodes."""
        return replace(self, max_tokens=[1] * len(self.prompts))


WORKLOADS = "nano, decode-bsN, decode-bsNxINPUTxOUTPUT, prefill, prefill-NxINPUT, latency-long; each with -sampled"


def make_workload(name: str, seed: int = 0) -> Workload:
    """The workload called ``name``; ``NAME-sampled`` is ``NAME`` with random sampling. Raises ConfigError, with the
    names there are."""
    rng = random.Random(seed)
    if name.endswith("-sampled"):
        return replace(make_workload(name.removesuffix("-sampled"), seed), name=name, sampled=True)
    if name == "nano":
        prompts = [[rng.randint(0, _TOKEN_ID_LIMIT) for _ in range(rng.randint(100, 1024))] for _ in range(256)]
        return Workload(name, prompts, [rng.randint(100, 1024) for _ in range(256)])
    if match := re.fullmatch(r"prefill(?:-([1-9]\d{0,4})x([1-9]\d{0,5}))?", name):
        count, prompt = (int(part or default) for part, default in zip(match.groups(), (64, 2048), strict=True))
        return Workload(name, make_random_prompts(rng, count, prompt), [1] * count)
    if name == "latency-long":
        return Workload(name, make_random_prompts(rng, 1, 8192), [128])
    if match := re.fullmatch(r"decode-bs([1-9]\d{0,4})(?:x([1-9]\d{0,5})x([1-9]\d{0,5}))?", name):
        count, prompt, answer = (
            int(part or default) for part, default in zip(match.groups(), (1, 128, 256), strict=True)
        )
        return Workload(name, make_random_prompts(rng, count, prompt), [answer] * count)
    raise ConfigError(f"workload {name!r} is unknown; choose {WORKLOADS}")


def make_random_workload(count: int, input_len: int, output_len: int, seed: int = 0) -> Workload:
    """Random prompts, all of one length, and answers of another."""
    return Workload("random", make_random_prompts(random.Random(seed), count, input_len), [output_len] * count)


def make_random_prompts(
    rng: random.Random, count: int, length: int, vocab_size: int = _TOKEN_ID_LIMIT
) -> list[list[int]]:
    """``count`` prompts of ``length`` random token ids."""
    return [[rng.randrange(vocab_size) for _ in range(length)] for _ in range(count)]
