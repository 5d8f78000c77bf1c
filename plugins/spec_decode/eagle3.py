"""EAGLE-3 proposer (Li et al., 2025, arXiv:2503.01840): a head of one layer over hidden states of the target."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quire.plugins.spec_decode.draft_inputs import (
    DraftPassInputs,
    build_forward_context,
    build_pass_inputs,
    gather_next_tokens,
    prepare_draft_pass,
)
from quire.plugins.spec_decode.eagle3_head import Eagle3Config, Eagle3Head
from quire.plugins.spec_decode.eagle3_weights import (
    init_dummy_weights,
    load_head_weights,
    read_head_tensors,
    save_random_head,
)
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
from quire.sdk.layers import VocabEmbedding

__all__ = ["Eagle3Proposer"]


class Eagle3Proposer(DeviceProposer):
    """At each position the head takes the target's hidden states there and the token after it, and predicts the one
    after that; for the next draft its own output stands for the target's hidden states.

    Every step writes the keys and values of its tokens, which is all that later tokens need of a single layer, and
    keeps for each request the fused hidden state of its last token but one, from which drafting starts.
    """

    needs_model = True
    capturable = observes_every_step = True

    def __init__(self, num_tokens: int, options: Any = None) -> None:
        super().__init__(num_tokens, options)
        self._config: Eagle3Config
        self._aux_hidden_states: AuxHiddenStates
        self._head: Eagle3Head
        self._target: TargetState

    @property
    def head(self) -> Eagle3Head:
        """The head that is loaded."""
        return self._head

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
            reasons = Eagle3Config.from_hf_config(draft_config, target).find_mismatches(target)
        except CheckpointError as error:
            reasons = [str(error)]
        return [f"{draft_path.name!r} {reason}" for reason in reasons]

    @classmethod
    def save_example_model(cls, target: Path, folder: Path) -> None:
        """A random head, untrained."""
        save_random_head(target, folder)

    def load_weights(self, source: DraftSource) -> None:
        """The head, with the target's embedding unless it has one of its own that differs."""
        assert source.path is not None
        if not (model := source.target).supports_aux_hidden_states:
            raise ConfigError(f"{type(model).__name__} hands out no hidden states; choose another --spec-method")
        target = source.target_config.get_text_config()
        self._config = config = Eagle3Config.from_hf_config(source.config, target)
        is_dummy = source.load_format == "dummy"
        tensors = {} if is_dummy else read_head_tensors(source.path)
        builder, shared_embedding = source.make_builder(source.config), _find_embedding(model)
        head_embedding = tensors.get("embed_tokens.weight")
        if head_embedding is not None and (
            shared_embedding is None or not _is_same_embedding(head_embedding, shared_embedding)
        ):
            shared_embedding = None
        elif shared_embedding is None or shared_embedding.weight.shape[1] != config.layer_config.hidden_size:
            raise CheckpointError(
                f"{str(source.path)!r} has no embed_tokens.weight, and the target has no embedding of "
                f"{config.layer_config.hidden_size} features to share; give a head that brings its own"
            )
        with torch.inference_mode(False):
            self._head = Eagle3Head(config, builder, shared_embedding)
            if is_dummy:
                init_dummy_weights(self._head, seed=0)
            else:
                load_head_weights(self._head, config, tensors, str(source.path))
        states = torch.zeros(source.max_num_tokens, config.aux_hidden_size, dtype=builder.dtype, device=builder.device)
        self._aux_hidden_states = AuxHiddenStates(config.aux_hidden_state_layer_ids, states)
        model.aux_hidden_states = self._aux_hidden_states

    def parameters(self) -> Iterable[Tensor]:
        """The head's own."""
        return self._head.parameters()

    def attention_specs(self) -> list[AttentionSpec]:
        """One layer."""
        return [self._head.spec]

    def attach_target(self, target: TargetState) -> None:
        """Allocate what captured passes share, and each request's hidden state."""
        if any(backend.writes_kv for backend in target.backends):
            raise ConfigError("spec_method 'eagle3' writes keys and values itself; choose another --attention-backend")
        self._target = target
        device, hidden = target.num_computed_tokens.device, self._config.layer_config.hidden_size
        self._query_start_loc = torch.arange(target.max_num_reqs + 2, dtype=torch.int32, device=device)
        # By table row: the fused hidden state of the request's last token but one.
        self._hidden_states = torch.zeros(
            len(target.num_computed_tokens), hidden, dtype=self._head.spec.dtype, device=device
        )

    def observe_step(self, step: StepTokens) -> None:
        """Write keys and values of every token, with the token sampled after it, and keep each request's hidden
        state."""
        hidden = self._head.fc(self._aux_hidden_states.states[: len(step.positions)])  # (num_tokens, hidden)
        next_tokens = gather_next_tokens(step, self._target.table)
        context = build_forward_context(self._target, step.slot_mapping)
        self._head.write_kv(next_tokens.token_ids, hidden, step.positions, context)
        self._hidden_states[step.rows] = hidden[next_tokens.last_token_indices]

    def propose(self, rows: Tensor, num_tokens: int, *, greedy: bool = False) -> DraftTokens:
        """One draft a pass: from the hidden state of the last token but one and the token after it, then from the
        head's own output and the last draft."""
        target = self._target
        table, block_table, hidden = target.table, target.block_table[rows], self._hidden_states[rows]
        token_ids = table.token_ids[rows, table.num_tokens[rows].long().clamp(min=2) - 1]
        drafts: list[Tensor] = []
        for num_drafted in range(num_tokens):
            # A token's keys lie at the position of the hidden state that it is combined with: one before its own.
            inputs = build_pass_inputs(
                target, rows, block_table, num_ahead=num_drafted - 1, query_len=1, draft_token_ids=token_ids
            )
            if not drafts:
                sampling = SamplingBatch.from_table(table, rows, inputs.next_positions, not greedy)
            sampling.position = inputs.next_positions + 1
            normed, hidden = self._run_pass(inputs, hidden, block_table)
            token_ids = self._sample_drafts(normed, sampling, greedy)
            drafts.append(token_ids)
        return DraftTokens(torch.stack(drafts, 1))

    def _sample_drafts(self, normed: Tensor, sampling: SamplingBatch, greedy: bool) -> Tensor:
        """Tokens (n,) int32 of the target's vocabulary, with the noise that the target will use for them."""
        head, sampler = self._head, self._target.sampler
        draft_logits = head.compute_logits(normed)  # (n, draft_vocab_size)
        if greedy:
            return head.draft_to_target_ids[draft_logits.argmax(-1)].int()
        logits = draft_logits.new_full((len(draft_logits), sampler.vocab_size), float("-inf"))
        logits.index_copy_(1, head.draft_to_target_ids, draft_logits)
        return sampler.sample(logits if logits.is_cuda else logits.float(), sampling)

    def _run_pass(self, inputs: DraftPassInputs, hidden: Tensor, block_table: Tensor) -> tuple[Tensor, Tensor]:
        """The head over one token of each request: see ``Eagle3Head.forward``."""
        context = prepare_draft_pass(self._target, inputs, block_table, self._query_start_loc, 1)
        return self._head(inputs.input_ids, hidden, inputs.positions, context)


def _find_embedding(target: Model) -> VocabEmbedding | None:
    return next((module for module in target.modules() if isinstance(module, VocabEmbedding)), None)


def _is_same_embedding(head_weight: Tensor, target: VocabEmbedding) -> bool:
    """Whether every rank's tokens have the same embedding: the ranks agree, since they look tokens up together."""
    if head_weight.shape != (target.vocab_size, target.weight.shape[1]):
        return False
    shard = head_weight[target.vocab_start_index :][: len(target.weight)]
    is_same = torch.equal(shard.to(target.weight.dtype), target.weight[: len(shard)].cpu())
    return bool(target.parallel.stack(target.weight.new_full((1,), is_same)).all())
