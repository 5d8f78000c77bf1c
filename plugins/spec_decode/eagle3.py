"""An EAGLE-3 head drafts (Li et al., 2025, arXiv:2503.01840): one layer over hidden states of the target."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quire.core.layers.embedding import VocabEmbedding
from quire.plugins.spec_decode.eagle3_head import Eagle3Head, HeadConfig
from quire.plugins.spec_decode.eagle3_weights import fill, fill_randomly, read_tensors
from quire.plugins.spec_decode.observed import observed
from quire.plugins.spec_decode.pass_inputs import PassInputs, context_of, pass_inputs, planned_pass
from quire.sdk import (
    AttentionSpec,
    AuxHiddenStates,
    CheckpointError,
    ConfigError,
    DeviceProposer,
    DraftSource,
    DraftTokens,
    Model,
    SamplingBatch,
    StepTokens,
    TargetState,
)

__all__ = ["Eagle3"]


class Eagle3(DeviceProposer):
    """At each position the head sees the target's hidden states there and the token after it, and guesses the one after
    that; for the next guess its own output stands for the hidden states.

    Every step writes the keys and values of its tokens, which is all that later tokens need of a single layer, and
    keeps for each request the state of its last token but one, from which drafting starts.
    """

    needs_model = True
    capturable = observes_every_step = True

    def __init__(self, num_tokens: int, options: Any = None) -> None:
        super().__init__(num_tokens, options)
        self._config: HeadConfig
        self._taps: AuxHiddenStates
        self._head: Eagle3Head
        self._target: TargetState

    @classmethod
    def unsupported(cls, target_config: Any, draft_config: Any, draft_path: Path | None) -> list[str]:
        """The folder must hold a head that was trained for a model of these sizes."""
        assert draft_path is not None
        names = [str(name) for name in getattr(draft_config, "architectures", None) or ()]
        kind = str(getattr(draft_config, "speculators_model_type", ""))
        if not any("eagle3" in name.lower() for name in (*names, kind)):
            return [f"{draft_path.name!r} is no EAGLE-3 head but {', '.join(names) or 'nameless'}; try draft_model"]
        target = target_config.get_text_config()
        try:
            reasons = HeadConfig.read(draft_config, target).misfits(target)
        except CheckpointError as error:
            reasons = [str(error)]
        return [f"{draft_path.name!r} {reason}" for reason in reasons]

    def load_weights(self, source: DraftSource) -> None:
        """The head, with the target's embedding unless it has one of its own that differs."""
        assert source.path is not None
        if not (model := source.target).supports_aux_hidden_states:
            raise ConfigError(f"{type(model).__name__} hands out no hidden states; choose another --spec-method")
        target = source.target_config.get_text_config()
        self._config = config = HeadConfig.read(source.config, target)
        dummy = source.load_format == "dummy"
        tensors = {} if dummy else read_tensors(source.path)
        builder, theirs = source.make_builder(source.config), _embedding(model)
        own = tensors.get("embed_tokens.weight")
        if own is not None and (theirs is None or not _same(own, theirs.weight)):
            theirs = None
        elif theirs is None or theirs.weight.shape[1] != config.layer.hidden_size:
            raise CheckpointError(
                f"{str(source.path)!r} has no embed_tokens.weight, and the target has no embedding of "
                f"{config.layer.hidden_size} features to share; give a head that brings its own"
            )
        with torch.inference_mode(False):
            self._head = Eagle3Head(config, builder, theirs)
            if dummy:
                fill_randomly(self._head, seed=0)
            else:
                fill(self._head, config, tensors, str(source.path))
        width = len(config.taps) * config.target_hidden
        states = torch.zeros(source.max_num_tokens, width, dtype=builder.dtype, device=builder.device)
        model.aux_hidden_states = self._taps = AuxHiddenStates(config.taps, states)

    def parameters(self) -> Iterable[Tensor]:
        """The head's own."""
        return self._head.parameters()

    def attention_specs(self) -> list[AttentionSpec]:
        """One layer."""
        return [self._head.spec]

    def attach_target(self, target: TargetState) -> None:
        """Buffers that captured passes share."""
        if any(backend.writes_kv for backend in target.backends):
            raise ConfigError("spec_method 'eagle3' writes keys and values itself; choose another --attention-backend")
        self._target = target
        device, hidden = target.num_computed_tokens.device, self._config.layer.hidden_size
        self._starts = torch.arange(target.max_num_reqs + 2, dtype=torch.int32, device=device)
        self._states = torch.zeros(len(target.num_computed_tokens), hidden, dtype=self._head.spec.dtype, device=device)

    def observe_step(self, step: StepTokens) -> None:
        """Keys and values of every token, with whatever was drawn after it; and each request's state at its last."""
        hidden = self._head.fc(self._taps.states[: len(step.positions)])  # (num_tokens, hidden)
        following, last = observed(step, self._target.table)
        self._head.write(following, hidden, step.positions, context_of(self._target, step.slots))
        self._states[step.rows] = hidden[last]

    def propose(self, rows: Tensor, num_tokens: int, *, greedy: bool = False) -> DraftTokens:
        """One token a pass: from the state of the last token but one and the token after it, then from those drawn."""
        target = self._target
        table, blocks, hidden = target.table, target.block_table[rows], self._states[rows]
        tokens = table.token_ids[rows, table.num_tokens[rows].long().clamp(min=2) - 1]
        drafts: list[Tensor] = []
        for ahead in range(num_tokens):
            inputs = pass_inputs(target, rows, blocks, ahead=ahead - 1, queries=1, drawn=tokens)
            if not drafts:
                sampling = SamplingBatch.from_table(table, rows, inputs.next, not greedy)
            sampling.position = inputs.next + 1
            normed, hidden = self._pass(inputs, hidden, blocks)
            tokens = self._draw(normed, sampling, greedy)
            drafts.append(tokens)
        return DraftTokens(torch.stack(drafts, 1))

    def _draw(self, normed: Tensor, sampling: SamplingBatch, greedy: bool) -> Tensor:
        """Tokens (n,) int32 of the target's vocabulary, with the noise that it will use for them."""
        head, sampler = self._head, self._target.sampler
        logits = head.logits(normed)
        if greedy:
            return head.target_ids[logits.argmax(-1)].int()
        wide = logits.new_full((len(logits), sampler.vocab_size), float("-inf"))
        wide.index_copy_(1, head.target_ids, logits)
        return sampler.sample(wide if wide.is_cuda else wide.float(), sampling)

    def _pass(self, inputs: PassInputs, hidden: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """The head over one token of each request."""
        context = planned_pass(self._target, inputs, blocks, self._starts, 1)
        return self._head(inputs.tokens, hidden, inputs.positions, context)


def _embedding(target: Model) -> VocabEmbedding | None:
    return next((module for module in target.modules() if isinstance(module, VocabEmbedding)), None)


def _same(own: Tensor, theirs: Tensor) -> bool:
    return own.shape == theirs.shape and torch.equal(own.to(theirs.dtype), theirs.cpu())
