"""Proposers that try to do harm, and one that knows the answer: speculation must survive them all unchanged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quire.core.contracts.spec_decode import DeviceProposer, DraftTokens, HostProposer, Target
from quire.core.request import Request

__all__ = ["Adversary", "Failing", "HostAdversary", "Oracle", "Repeater"]


class Adversary(DeviceProposer):
    """Drafts noise in every way that a proposer can be wrong, and now and then what is right."""

    @dataclass(frozen=True)
    class Options:
        """Options of the proposer."""

        kind: str = "random"
        """``random``, ``outside`` (ids that no token has), ``long`` (more than asked for) or ``short``."""
        vocab: int = 64

    def prepare(self, target: Target) -> None:
        """Remember the table."""
        self._target = target
        self._chance = torch.Generator().manual_seed(0)

    def propose(self, who: Tensor, count: int, *, greedy: bool = False) -> DraftTokens:
        """Nonsense."""
        kind, vocab = self.options.kind, self.options.vocab
        width = count + 3 if kind == "long" else count
        low, high = (-(2**31), 2**31 - 1) if kind == "outside" else (0, vocab)
        tokens = torch.randint(low, high, (len(who), width), generator=self._chance, dtype=torch.int64).int()
        lengths = None
        if kind == "short":
            lengths = torch.randint(-2, count + 1, (len(who),), generator=self._chance).int()
        return DraftTokens(tokens.to(who.device), lengths)


class Failing(Adversary):
    """Drafts a few times, then raises."""

    def propose(self, who: Tensor, count: int, *, greedy: bool = False) -> DraftTokens:
        """Raise at the third call."""
        self._calls = getattr(self, "_calls", 0) + 1
        if self._calls > 2:
            raise RuntimeError("out of ideas")
        return super().propose(who, count, greedy=greedy)


class Repeater(HostProposer):
    """Expects the last token to repeat, for ever."""

    def propose(self, who: Request, count: int) -> Sequence[int]:
        """The last token, ``count`` times."""
        return [who.token_ids[-1]] * count


class HostAdversary(HostProposer):
    """Right, wrong, too long, too short and out of range by turns."""

    def propose(self, who: Request, count: int) -> Sequence[int]:
        """By the request's length."""
        last = who.token_ids[-1]
        return ([], [-5, 2**40], [last] * 3, list(range(count + 9)), [last, -1, last])[who.num_tokens % 5]


class Oracle(HostProposer):
    """Knows every answer, from a file of ``{"prompt tokens": answer}`` with keys like ``1,2,3``, and errs as told."""

    @dataclass(frozen=True)
    class Options:
        """Options of the proposer."""

        answers: Path = Path("answers.json")
        skill: float = 1.0

    def propose(self, who: Request, count: int) -> Sequence[int]:
        """The answer's next tokens."""
        if not hasattr(self, "_answers"):
            self._answers = json.loads(self.options.answers.read_text())
        answer = self._answers[",".join(map(str, who.token_ids[: who.prompt_len]))]
        made = who.num_output_tokens
        chance = torch.Generator().manual_seed(made)
        right = (torch.rand(count, generator=chance) < self.options.skill).tolist()
        return [token if good else token + 1 for token, good in zip(answer[made : made + count], right, strict=False)]
