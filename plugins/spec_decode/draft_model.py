"""A smaller draft model of the same vocabulary (Leviathan et al., 2023, arXiv:2211.17192), with the target's noise."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.plugins.spec_decode.draft_inputs import (
    DraftPassInputs,
    build_pass_inputs,
    prepare_draft_pass,
    prepare_forward,
)
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

__all__ = ["DraftModelProposer"]


class DraftModelProposer(DeviceProposer):
    """Computes the tokens that the target computes, and continues them by one forward pass per draft token.

    A draft is sampled with the noise that the target will use at that position, so the two agree more often than by
    chance, also at high temperatures. The first pass computes a request's last two tokens: after a step whose drafts
    were all accepted the draft model's KV cache lacks the last draft; after any other step one of them is computed
    again.
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
        draft_vocab, target_vocab = (int(c.get_text_config().vocab_size) for c in (draft_config, target_config))
        if draft_vocab != target_vocab:
            return [f"{draft_path.name!r} has a vocabulary of {draft_vocab} tokens, the target one of {target_vocab}"]
        if not _have_same_vocabulary(draft_path, Path(str(getattr(target_config, "name_or_path", "")))):
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
        """Allocate what captured passes share."""
        self._target = target
        device = target.num_computed_tokens.device
        query_start_loc = torch.arange(0, target.max_num_reqs + 1, dtype=torch.int32, device=device)
        self._query_start_loc = {1: query_start_loc, 2: 2 * query_start_loc}

    def observe_step(self, step: StepTokens) -> None:
        """Compute prompts, and whatever is in the step beside them."""
        context = prepare_forward(self._target, step.slot_mapping, step.batch)
        self._model(step.input_ids, step.positions, context)

    def backfill(self, spans: Tensor, host_spans: NDArray[np.int64]) -> None:
        """Compute the spans as one step of prompts."""
        target, (rows, first, end) = self._target, spans.unbind()
        query_lens = host_spans[2] - host_spans[1]
        num_tokens, device = int(query_lens.sum()), rows.device
        query_start_loc = torch.zeros(len(rows) + 1, dtype=torch.int64, device=device)
        torch.cumsum(end - first, 0, out=query_start_loc[1:])
        # output_size is known on the host: nothing waits for the device.
        request = torch.repeat_interleave(torch.arange(len(rows), device=device), end - first, output_size=num_tokens)
        positions = (first - query_start_loc[:-1])[request] + torch.arange(num_tokens, device=device)
        blocks = target.block_table[rows[request], positions // target.block_size].long()
        max_seq_len = int(host_spans[2].max())
        batch = AttentionBatch(
            query_start_loc=query_start_loc.int(),
            seq_lens=end.int(),
            block_table=target.block_table[rows, : -(-max_seq_len // target.block_size)],
            num_reqs=len(rows),
            num_tokens=num_tokens,
            max_query_len=int(query_lens.max()),
            max_seq_len=max_seq_len,
            num_decodes=0,
        )
        slot_mapping = blocks * target.block_size + positions % target.block_size
        context = prepare_forward(target, slot_mapping, batch)
        self._model(target.table.token_ids[rows[request], positions], positions, context)

    def propose(self, rows: Tensor, num_tokens: int, *, greedy: bool = False) -> DraftTokens:
        """The first pass over two tokens a request, the others over the last draft."""
        target = self._target
        block_table = target.block_table[rows]
        inputs = build_pass_inputs(target, rows, block_table, num_ahead=0, query_len=2)
        sampling = SamplingBatch.from_table(target.table, rows, inputs.next_positions, not greedy)
        hidden = self._run_pass(inputs, block_table, 2)[1::2].contiguous()
        drafts: list[Tensor] = []
        while True:
            logits = self._model.compute_logits(hidden)
            sampled = target.sampler.sample(logits if logits.is_cuda else logits.float(), sampling)
            drafts.append(sampled)
            if len(drafts) == num_tokens:
                return DraftTokens(torch.stack(drafts, 1))
            inputs = build_pass_inputs(
                target, rows, block_table, num_ahead=len(drafts), query_len=1, draft_token_ids=sampled
            )
            sampling.position = inputs.next_positions
            hidden = self._run_pass(inputs, block_table, 1)

    def _run_pass(self, inputs: DraftPassInputs, block_table: Tensor, query_len: int) -> Tensor:
        """(n * query_len, hidden) of ``query_len`` tokens of each request."""
        context = prepare_draft_pass(self._target, inputs, block_table, self._query_start_loc[query_len], query_len)
        return self._model(inputs.input_ids, inputs.positions, context)


def _have_same_vocabulary(draft_folder: Path, target_folder: Path) -> bool:
    """Whether the two folders' tokenizers give ids to the same tokens. True where one of them does not say."""
    files = [folder / "tokenizer.json" for folder in (draft_folder, target_folder)]
    if not all(file.is_file() for file in files):
        return True
    try:
        vocabularies = [json.loads(file.read_text("utf-8"))["model"]["vocab"] for file in files]
    except (ValueError, KeyError, TypeError):
        return True
    return bool(vocabularies[0] == vocabularies[1])
