"""What a model would have said at each token of a text: a logits processor that writes it down and says the text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor

from quire.core.contracts.logits_processor import LogitsBatch, LogitsProcessor
from quire.core.messages import NewRequest

__all__ = ["ARGUMENT", "SCORES", "Recorder"]

#: Key of ``SamplingParams.extra_args`` under which a request says what to record.
ARGUMENT = "quire_eval"

#: Columns of the scores, float64: log-probability of the text's own token, the most likely token, and the
#: Kullback-Leibler divergence (nats) from the reference to this model, NaN without a reference.
SCORES = ("logprob", "top", "kl")


@dataclass(slots=True)
class _Task:
    tokens: list[int]
    begin: int  # position of the first of them in the sequence
    line: int  # of the files
    scores: NDArray[np.float64]  # (lines, 3)
    logprobs: NDArray[np.float32]  # (lines, vocab)
    refers: bool


@dataclass(slots=True)
class _Work:
    lines: list[int] = field(default_factory=list)  # of the logits
    tokens: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)  # of the files
    task: _Task | None = None


class Recorder(LogitsProcessor):
    """Makes a request say a given text (teacher forcing), and writes what the model's own distribution was.

    So the distributions come from the steps that serve users: decoding in a batch, through the KV cache as it is
    configured. ``extra_args[ARGUMENT]`` holds ``tokens`` (the text after the prompt), ``line`` (of its first token in
    the files), ``scores`` and ``logprobs`` (paths of ``.npy`` files, see ``server/evaluation/text.py``) and ``refers``:
    False fills ``logprobs`` with the whole distribution, True compares with what is there.
    """

    def __init__(self, vocab_size: int, device: torch.device, options: Any = None) -> None:
        super().__init__(vocab_size, device, options)
        self._tasks: dict[int, _Task] = {}
        self._open: dict[str, NDArray[Any]] = {}

    def add_row(self, request: NewRequest) -> bool:
        """Remember the text of the row."""
        asked = (request.params.extra_args or {}).get(ARGUMENT)
        if asked is None:
            return False
        self._tasks[request.row] = _Task(
            asked["tokens"],
            request.prompt_len,
            asked["line"],
            self._file(asked["scores"]),
            self._file(asked["logprobs"]),
            asked["refers"],
        )
        return True

    def remove_row(self, row: int) -> None:
        """Forget the row."""
        del self._tasks[row]

    def apply(self, logits: Tensor, batch: LogitsBatch) -> None:
        """Record the lines of the rows that asked, and leave only the text's token possible there."""
        work = _Work()
        for line, (row, position) in enumerate(zip(batch.rows, batch.positions, strict=True)):
            task = self._tasks.get(row)
            if task is not None and 0 <= (i := position - task.begin) < len(task.tokens):
                work.lines.append(line)
                work.tokens.append(task.tokens[i])
                work.places.append(task.line + i)
                work.task = task
        if work.task is None:
            return
        self._record(logits[work.lines].double().log_softmax(-1), work, work.task)
        chosen = torch.tensor(work.tokens, device=logits.device)
        logits[work.lines] = float("-inf")
        logits[torch.tensor(work.lines, device=logits.device), chosen] = 0.0

    def _record(self, logprobs: Tensor, work: _Work, task: _Task) -> None:
        chosen = torch.tensor(work.tokens, device=logprobs.device)
        found = torch.full((len(work.lines), 3), float("nan"), dtype=torch.float64, device=logprobs.device)
        found[:, 0] = logprobs.gather(-1, chosen[:, None])[:, 0]
        found[:, 1] = logprobs.argmax(-1).double()
        if task.refers:
            reference = torch.from_numpy(task.logprobs[work.places]).to(logprobs.device).double()
            reference = reference - reference.logsumexp(-1, keepdim=True)  # what float32 rounded away
            terms = reference.exp() * (reference - logprobs)
            found[:, 2] = torch.where(reference > float("-inf"), terms, 0.0).sum(-1)
        else:
            task.logprobs[work.places] = logprobs.float().cpu().numpy()
        task.scores[work.places] = found.cpu().numpy()

    def _file(self, path: str) -> NDArray[Any]:
        if path not in self._open:
            self._open[path] = open_memmap(path, mode="r+")
        return self._open[path]
