"""Structured-output backends that misbehave, to see that they harm their own request alone."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from quire.core.contracts.structured_output import (
    CompiledGrammar,
    GrammarState,
    StructuredOutputBackend,
    TokenizerInfo,
)
from quire.core.structured_outputs import StructuredOutputsParams

__all__ = ["FaultyBackend", "FaultyBackendWithThread"]


class UnreadableError(asyncio.CancelledError):
    """No ``Exception``, and it cannot say its text."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class FaultyBackend(StructuredOutputBackend):
    """``choice=["ok"]`` allows the tokens 104 to 199; other choices are the fault that is committed: ``raise``,
    ``cancel``, ``hang``, ``burn``, ``allocate`` or ``exit in compile``, ``raise in start``, ``raise in fill``,
    ``cancel in fill``, ``raise in advance``, ``empty mask``, ``refuse what it allowed``, ``hang in fill``."""

    def compile(self, params: StructuredOutputsParams) -> CompiledGrammar:
        """Commits the faults of compiling."""
        (fault,) = params.choice or ["ok"]
        if fault == "raise in compile":
            raise RuntimeError("a fault of the compiler")
        if fault == "cancel in compile":
            raise UnreadableError
        if fault == "hang in compile":
            threading.Event().wait()
        if fault == "burn in compile":
            while True:
                pass
        if fault == "allocate in compile":
            blocks = []
            while True:
                blocks.append(np.empty(1 << 24, np.uint8))
        if fault == "exit in compile":
            os._exit(3)
        return _Grammar(fault)


class FaultyBackendWithThread(FaultyBackend):
    """The same with a thread, which no forked process would have."""

    def __init__(self, tokenizer: TokenizerInfo, options: object = None) -> None:
        super().__init__(tokenizer, options)
        threading.Thread(target=threading.Event().wait, daemon=True).start()


class _Grammar(CompiledGrammar):
    def __init__(self, fault: str) -> None:
        self._fault = fault

    def start(self) -> GrammarState:
        if self._fault == "raise in start":
            raise RuntimeError("a fault of start")
        return _State(self._fault)


class _State(GrammarState):
    def __init__(self, fault: str) -> None:
        self._fault = fault
        self._num_tokens = 0

    def fill_mask(self, mask: NDArray[np.int32]) -> None:
        mask.fill(0)
        late = self._num_tokens >= 2
        if self._fault == "empty mask" and late:
            return
        if self._fault == "raise in fill" and late:
            raise RuntimeError("a fault of fill_mask")
        if self._fault == "cancel in fill" and late:
            raise UnreadableError
        if self._fault == "hang in fill" and late:
            time.sleep(3600)
        mask.view(np.uint8)[13:25] = 255  # tokens 104 to 199

    def advance(self, token_ids: Sequence[int]) -> int:
        if self._fault == "raise in advance" and self._num_tokens >= 2:
            raise RuntimeError("a fault of advance")
        if self._fault == "refuse what it allowed" and self._num_tokens >= 2:
            return 0
        count = next((i for i, token in enumerate(token_ids) if not 104 <= token < 200), len(token_ids))
        self._num_tokens += count
        return count

    def rollback(self, num_tokens: int) -> None:
        self._num_tokens -= num_tokens
