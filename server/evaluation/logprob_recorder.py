"""The distribution of a model at each token of a text: a logits processor that records it and forces the text."""

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

__all__ = ["ARGUMENT", "SCORES", "LogprobRecorder"]

#: Key of ``SamplingParams.extra_args`` that names what to record for a request.
ARGUMENT = "quire_eval"

#: Columns of the scores, float64: log-probability of the text's own token, the most likely token, and the
#: Kullback-Leibler divergence (nats) from the reference to this model, NaN without a reference.
SCORES = ("logprob", "top", "kl")


@dataclass(slots=True)
class _ScoredText:
    tokens: list[int]
    begin: int  # position of the first of them in the sequence
    file_row: int  # of its first token
    scores: NDArray[np.float64]  # (file rows, 3)
    logprobs: NDArray[np.float32]  # (file rows, vocab)
    has_reference: bool


@dataclass(slots=True)
class _StepRows:
    logits_rows: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    file_rows: list[int] = field(default_factory=list)
    text: _ScoredText | None = None


class LogprobRecorder(LogitsProcessor):
    """Forces the output of a request to a text (teacher forcing), and writes the model's own distributions to files.

    So the distributions come from the steps that serve users: decoding in a batch, through the KV cache as it is
    configured. ``extra_args[ARGUMENT]`` holds ``tokens`` (the text after the prompt), ``row`` (of its first token in
    the files), ``scores`` and ``logprobs`` (paths of ``.npy`` files, see ``server/evaluation/text.py``) and
    ``has_reference``: False fills ``logprobs`` with the whole distribution, True compares with what is there.
    """

    @dataclass(frozen=True)
    class Arguments:
        """What a request may say."""

        quire_eval: dict[str, Any] | None = None

    def __init__(self, vocab_size: int, device: torch.device, options: Any = None) -> None:
        super().__init__(vocab_size, device, options)
        self._texts: dict[int, _ScoredText] = {}
        self._files: dict[str, NDArray[Any]] = {}

    def add_row(self, request: NewRequest) -> bool:
        """Remember the text of the row."""
        task = self.read_arguments(request.params).quire_eval
        if task is None:
            return False
        self._texts[request.row] = _ScoredText(
            task["tokens"],
            request.prompt_len,
            task["row"],
            self._open_file(task["scores"]),
            self._open_file(task["logprobs"]),
            task["has_reference"],
        )
        return True

    def remove_row(self, row: int) -> None:
        """Forget the row."""
        del self._texts[row]

    def apply(self, logits: Tensor, batch: LogitsBatch) -> None:
        """Record the logits rows of requests with a text, and leave only the text's token possible there."""
        step = _StepRows()
        for logits_row, (row, position) in enumerate(zip(batch.rows, batch.max_positions, strict=True)):
            text = self._texts.get(row)
            if text is not None and 0 <= (i := position - text.begin) < len(text.tokens):
                step.logits_rows.append(logits_row)
                step.tokens.append(text.tokens[i])
                step.file_rows.append(text.file_row + i)
                step.text = text
        if step.text is None:
            return
        self._write_scores(logits[step.logits_rows].double().log_softmax(-1), step, step.text)
        forced = torch.tensor(step.tokens, device=logits.device)
        logits[step.logits_rows] = float("-inf")
        logits[torch.tensor(step.logits_rows, device=logits.device), forced] = 0.0

    def _write_scores(self, logprobs: Tensor, step: _StepRows, text: _ScoredText) -> None:
        forced = torch.tensor(step.tokens, device=logprobs.device)
        scores = torch.full((len(step.logits_rows), 3), float("nan"), dtype=torch.float64, device=logprobs.device)
        scores[:, 0] = logprobs.gather(-1, forced[:, None])[:, 0]
        scores[:, 1] = logprobs.argmax(-1).double()
        if text.has_reference:
            reference = torch.from_numpy(text.logprobs[step.file_rows]).to(logprobs.device).double()
            reference = reference - reference.logsumexp(-1, keepdim=True)  # what float32 rounded away
            terms = reference.exp() * (reference - logprobs)
            scores[:, 2] = torch.where(reference > float("-inf"), terms, 0.0).sum(-1)
        else:
            text.logprobs[step.file_rows] = logprobs.float().cpu().numpy()
        text.scores[step.file_rows] = scores.cpu().numpy()

    def _open_file(self, path: str) -> NDArray[Any]:
        if path not in self._files:
            self._files[path] = open_memmap(path, mode="r+")
        return self._files[path]
