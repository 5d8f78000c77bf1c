"""A smaller model of the same vocabulary drafts (Leviathan et al., 2023, arXiv:2211.17192), with the target's noise."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.plugins.spec_decode.pass_inputs import PassInputs, pass_inputs, planned, planned_pass
from quire.sdk import (
    AttentionBatch,
    AttentionSpec,
    DeviceProposer,
    DraftSource,
    DraftTokens,
    Model,
    SamplingBatch,
    StepTokens,
    TargetState,
)

__all__ = ["DraftModel"]


class DraftModel(DeviceProposer):
    """Reads the tokens that the target reads, and continues them by ``count`` forward passes of its own.

    A token is drawn with the noise that the target will use at that position, so the two agree more often than by
    chance, also at high temperatures. The first pass reads a request's last two tokens: after a step whose drafts were
    all right the cache lacks the last draft, after any other it computes a token again.
    """

    needs_model = serves_model = True
    capturable = supports_backfill = True

    def __init__(self, num_tokens: int, options: Any = None) -> None:
        super().__init__(num_tokens, options)
        self._model: Model
        self._target: TargetState

    @classmethod
    def unsupported(cls, target_config: Any, draft_config: Any, draft_path: Path | None) -> list[str]:
        """The vocabulary must be the target's."""
        assert draft_path is not None
        if any("eagle" in str(name).lower() for name in getattr(draft_config, "architectures", None) or ()):
            return [f"{draft_path.name!r} is an EAGLE head, no whole model; EAGLE-3 heads need --spec-method eagle3"]
        mine, theirs = (int(c.get_text_config().vocab_size) for c in (draft_config, target_config))
        if mine != theirs:
            return [f"{draft_path.name!r} has a vocabulary of {mine} tokens, the target one of {theirs}"]
        if not _same_tokens(draft_path, Path(str(getattr(target_config, "name_or_path", "")))):
            return [f"the tokens of {draft_path.name!r} are not those of the target, though as many"]
        return []

    def load_weights(self, source: DraftSource) -> None:
        """The whole folder, as a model of its own."""
        self._model = source.load_model()

    def parameters(self) -> Iterable[Tensor]:
        """The model's."""
        return self._model.parameters()

    def attention_specs(self) -> list[AttentionSpec]:
        """The model's."""
        return self._model.attention_specs()

    def attach_target(self, target: TargetState) -> None:
        """Buffers that captured passes share."""
        self._target = target
        device = target.num_computed_tokens.device
        starts = torch.arange(0, target.max_num_reqs + 1, dtype=torch.int32, device=device)
        self._starts = {1: starts, 2: 2 * starts}

    def observe_step(self, step: StepTokens) -> None:
        """Prompts, and whatever is in the step beside them."""
        self._model(step.input_ids, step.positions, planned(self._target, step.slots, step.batch))

    def backfill(self, spans: Tensor, host_spans: NDArray[np.int64]) -> None:
        """As a step of prompts."""
        target, (rows, first, last) = self._target, spans.unbind()
        counts = host_spans[2] - host_spans[1]
        total, device = int(counts.sum()), rows.device
        start = torch.zeros(len(rows) + 1, dtype=torch.int64, device=device)
        torch.cumsum(last - first, 0, out=start[1:])
        owner = torch.repeat_interleave(torch.arange(len(rows), device=device), last - first, output_size=total)
        positions = (first - start[:-1])[owner] + torch.arange(total, device=device)
        pages = target.block_table[rows[owner], positions // target.block_size].long()
        longest = int(host_spans[2].max())
        batch = AttentionBatch(
            query_start_loc=start.int(),
            seq_lens=last.int(),
            block_table=target.block_table[rows, : -(-longest // target.block_size)],
            num_reqs=len(rows),
            num_tokens=total,
            max_query_len=int(counts.max()),
            max_seq_len=longest,
            num_decodes=0,
        )
        slots = pages * target.block_size + positions % target.block_size
        self._model(target.table.token_ids[rows[owner], positions], positions, planned(target, slots, batch))

    def propose(self, rows: Tensor, num_tokens: int, *, greedy: bool = False) -> DraftTokens:
        """Two tokens a row, then one a pass."""
        target = self._target
        blocks = target.block_table[rows]
        inputs = pass_inputs(target, rows, blocks, ahead=0, queries=2)
        sampling = SamplingBatch.from_table(target.table, rows, inputs.next, not greedy)
        hidden = self._pass(inputs, blocks, 2)[1::2].contiguous()
        drafts = []
        while True:
            logits = self._model.compute_logits(hidden)
            drawn = target.sampler.sample(logits if logits.is_cuda else logits.float(), sampling)
            drafts.append(drawn)
            if len(drafts) == num_tokens:
                return DraftTokens(torch.stack(drafts, 1))
            inputs = pass_inputs(target, rows, blocks, ahead=len(drafts), queries=1, drawn=drawn)
            sampling.position = inputs.next
            hidden = self._pass(inputs, blocks, 1)

    def _pass(self, inputs: PassInputs, blocks: Tensor, queries: int) -> Tensor:
        """``queries`` tokens of each request."""
        context = planned_pass(self._target, inputs, blocks, self._starts[queries], queries)
        return self._model(inputs.tokens, inputs.positions, context)


def _same_tokens(mine: Path, theirs: Path) -> bool:
    """Whether two folders' tokenizers give ids to the same tokens, as far as they say."""
    files = [folder / "tokenizer.json" for folder in (mine, theirs)]
    if not all(file.is_file() for file in files):
        return True
    try:
        vocabularies = [json.loads(file.read_text("utf-8"))["model"]["vocab"] for file in files]
    except (ValueError, KeyError, TypeError):
        return True
    return bool(vocabularies[0] == vocabularies[1])
