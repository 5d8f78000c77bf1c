"""Proposers for tests: some do harm, and one knows the answer. Under each, tokens are those without speculation."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quire.core.contracts.spec_decode import DeviceProposer, DraftTokens, HostProposer, TargetState
from quire.core.request import Request

__all__ = [
    "AdversarialDeviceProposer",
    "AdversarialHostProposer",
    "FailingProposer",
    "KnownAnswerProposer",
    "LastTokenProposer",
    "SlowHostProposer",
]


class AdversarialDeviceProposer(DeviceProposer):
    """Drafts at random, outside the vocabulary, too much or too little."""

    @dataclass(frozen=True)
    class Options:
        """Options of the proposer."""

        kind: str = "random"
        """``random``, ``outside`` (ids that no token has), ``long`` (more than asked for) or ``short``."""
        vocab: int = 64

    def attach_target(self, target: TargetState) -> None:
        """Remember the table."""
        self._target = target
        self._chance = torch.Generator().manual_seed(0)

    def propose(self, rows: Tensor, num_tokens: int, *, greedy: bool = False) -> DraftTokens:
        """Tokens that break what a proposer promises."""
        kind, vocab = self.options.kind, self.options.vocab
        width = num_tokens + 3 if kind == "long" else num_tokens
        low, high = (-(2**31), 2**31 - 1) if kind == "outside" else (0, vocab)
        tokens = torch.randint(low, high, (len(rows), width), generator=self._chance, dtype=torch.int64).int()
        lengths = None
        if kind == "short":
            lengths = torch.randint(-2, num_tokens + 1, (len(rows),), generator=self._chance).int()
        return DraftTokens(tokens.to(rows.device), lengths)


class FailingProposer(AdversarialDeviceProposer):
    """Drafts a few times, then raises."""

    def propose(self, rows: Tensor, num_tokens: int, *, greedy: bool = False) -> DraftTokens:
        """Raise at the third call."""
        self._calls = getattr(self, "_calls", 0) + 1
        if self._calls > 2:
            raise RuntimeError("out of ideas")
        return super().propose(rows, num_tokens, greedy=greedy)


class LastTokenProposer(HostProposer):
    """Drafts the last token again and again."""

    def propose(self, request: Request, num_tokens: int) -> Sequence[int]:
        """The last token, ``num_tokens`` times."""
        return [request.token_ids[-1]] * num_tokens


class SlowHostProposer(LastTokenProposer):
    """Takes longer than a step may wait for it."""

    def propose(self, request: Request, num_tokens: int) -> Sequence[int]:
        """As ``LastTokenProposer``, late."""
        time.sleep(0.06)
        return super().propose(request, num_tokens)


class AdversarialHostProposer(HostProposer):
    """Right, wrong, too long, too short and out of range by turns."""

    def propose(self, request: Request, num_tokens: int) -> Sequence[int]:
        """By the request's length."""
        last = request.token_ids[-1]
        return ([], [-5, 2**40], [last] * 3, list(range(num_tokens + 9)), [last, -1, last])[request.num_tokens % 5]


class KnownAnswerProposer(HostProposer):
    """Drafts the answer, from a file of ``{"prompt tokens": answer}`` with keys like ``1,2,3``.

    Each token is right with the probability ``skill``.
    """

    @dataclass(frozen=True)
    class Options:
        """Options of the proposer."""

        answers: Path = Path("answers.json")
        skill: float = 1.0

    def propose(self, request: Request, num_tokens: int) -> Sequence[int]:
        """The answer's next tokens."""
        if not hasattr(self, "_answers"):
            self._answers = json.loads(self.options.answers.read_text())
        answer = self._answers[",".join(map(str, request.token_ids[: request.prompt_len]))]
        start = request.num_output_tokens
        chance = torch.Generator().manual_seed(start)
        right = (torch.rand(num_tokens, generator=chance) < self.options.skill).tolist()
        return [
            token if is_right else token + 1
            for token, is_right in zip(answer[start : start + num_tokens], right, strict=False)
        ]
