"""Speculative proposer: drafts the next tokens of a request, which the target model then verifies in one step.

Verification is the engine's. It samples the target's token at each drafted position, by the same rule and the same
noise as without speculation, and accepts drafts as long as they are equal. So a proposer changes how many tokens a step
gives, and never which tokens (docs/decisions/0005-speculation.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from quire.core.contracts.attention import AttentionBackend, AttentionBatch, AttentionSpec, LayerKV
from quire.core.contracts.model import Model
from quire.core.contracts.sampler import Sampler, SamplingTable
from quire.core.request import Request

if TYPE_CHECKING:
    from quire.core.layers.builder import LayerBuilder

__all__ = [
    "DeviceProposer",
    "DraftSource",
    "DraftTokens",
    "HostProposer",
    "SpeculativeProposer",
    "StepTokens",
    "TargetState",
]


class SpeculativeProposer(ABC):
    """Derive from ``HostProposer`` or ``DeviceProposer``. A proposer that raises in a step is switched off for the rest
    of the engine's life, and requests go on without drafts."""

    needs_model: bool = False
    """Whether ``--speculative-model`` is required."""
    default_num_tokens: int = 4
    """``--num-speculative-tokens`` where it is not given."""
    serves_model: bool = False
    """Whether its folder holds a model that could be served alone (``DraftSource.load_model``)."""

    def __init__(self, num_tokens: int, options: Any = None) -> None:
        self.num_tokens = num_tokens
        """The most draft tokens per request and step that will be asked for."""
        self.options = options
        """An instance of the class's ``Options`` dataclass, None without one."""

    @classmethod
    def unsupported(cls, target_config: Any, draft_config: Any, draft_path: Path | None) -> list[str]:
        """Reasons why this proposer cannot draft for the model with the ``config.json`` ``target_config``, given that
        of ``--speculative-model`` and its folder; an empty list means that it can. Called before weights are read."""
        return []

    @classmethod
    def save_example_model(cls, target: Path, folder: Path) -> None:
        """Where ``needs_model``: save a tiny random draft to ``folder`` for the model in the folder ``target``, so that
        the conformance checks can run it. One that ``serves_model`` may leave this out: it gets a small model."""
        raise NotImplementedError

    @abstractmethod
    def propose(self, *args: Any, **kwargs: Any) -> Any:
        """Draft tokens: see ``HostProposer.propose`` and ``DeviceProposer.propose``."""


class HostProposer(SpeculativeProposer):
    """Works on the host while the device runs, from tokens that are a step old: no step waits for it.

    Its drafts follow the tokens that it was shown. When they are used, the device has sampled more tokens: the engine
    drops drafts that disagree with those, and the part of the others that the new tokens have overtaken.
    """

    @abstractmethod
    def propose(self, request: Request, num_tokens: int) -> Sequence[int]:
        """Up to ``num_tokens`` tokens that may follow ``request.token_ids``, which only ever grows; neither it nor
        anything else of the request may be changed.

        Called for decoding requests in every step, between two launches: it may take some microseconds. If all calls of
        a step take more than 50 ms together, three steps in a row, the proposer is quarantined. Not called for a
        request whose grammar forces its next tokens, which are drafted then (``GrammarState.forced_tokens``). Tokens of
        one request may be used for another only if their ``extra_keys`` are the same. Tokens outside the vocabulary end
        the draft.
        """

    def request_finished(self, request: Request) -> None:
        """The request has finished or was aborted: free what is kept for it. Also called for requests that ``propose``
        has never seen. No later request has its ``request_id``, a number."""


@dataclass(frozen=True, slots=True)
class DraftSource:
    """What a device proposer loads its weights from."""

    path: Path | None
    """Folder of ``--speculative-model``."""
    target: Model
    target_config: Any
    """The target's ``config.json``."""
    make_builder: Callable[[Any], LayerBuilder]
    """Makes layers for this rank in the target's precision, quantized as the ``config.json`` that it is given says."""
    load_model: Callable[[], Model]
    """Loads ``path`` as a model of its own, of any architecture and quantization that can be served."""
    load_format: str
    """Of ``--load-format``; ``dummy``: weights are random, and nothing is read."""
    config: Any
    """``path``'s ``config.json``; None without a path."""
    max_num_tokens: int
    """Tokens of the target's largest forward pass, padding included: rows that ``AuxHiddenStates`` needs."""


@dataclass(frozen=True, slots=True)
class TargetState:
    """The engine as a device proposer sees it. Tensors stay where they are for the engine's life; their contents change
    from step to step."""

    sampler: Sampler
    table: SamplingTable
    num_computed_tokens: Tensor
    """(rows of the request table,) int32: tokens whose KV the target has; ``num_tokens - 1`` when proposing."""
    block_table: Tensor
    """(rows of the request table, max_blocks) int32, of a group of layers without a window."""
    kv: list[LayerKV]
    """The KV cache of each of the proposer's layers, under the target's block ids."""
    backends: list[AttentionBackend]
    """By group of the proposer's layers."""
    group_of: list[int]
    """The group of each of the proposer's layers."""
    block_size: int
    max_model_len: int
    max_num_reqs: int

    @property
    def padding_row(self) -> int:
        """The table row of padding requests: their keys and values go to the null block, their drafts are not read."""
        return len(self.num_computed_tokens) - 1


@dataclass(slots=True)
class StepTokens:
    """The tokens that a step has computed, in the order of the target's inputs. Device tensors."""

    input_ids: Tensor  # (num_tokens,) int32
    positions: Tensor  # (num_tokens,) int64
    slot_mapping: Tensor  # (num_tokens,) int64, of the group of ``TargetState.block_table``
    rows: Tensor  # (num_reqs,) int64, of the request table
    batch: AttentionBatch
    """Of the same group."""


@dataclass(slots=True)
class DraftTokens:
    """Drafts of n requests. A token outside the vocabulary ends its request's draft."""

    token_ids: Tensor  # (n, k) int32
    lengths: Tensor | None = None  # (n,) int32: drafts of each request; None: k


class DeviceProposer(SpeculativeProposer):
    """Works on the device, right behind the sampler. Its tensors are exact, and it reads none of them on the host.

    Its life: constructed -> ``load_weights`` -> ``attention_specs`` -> ``attach_target`` once -> in each step
    ``observe_step`` if the step computed prompt tokens (or ``observes_every_step``), then ``propose`` if a request
    sampled a token. While drafting does not pay ``propose`` is not called, and with ``supports_backfill`` neither is
    ``observe_step``.
    """

    capturable: bool = False
    """Whether ``propose`` may be captured in a CUDA graph, with padding rows at the end of ``rows``."""
    supports_backfill: bool = False
    """Whether ``backfill`` can compute tokens later: then steps are not observed while nothing is drafted."""
    observes_every_step: bool = False
    """Whether ``observe_step`` is called for every step, possibly in a CUDA graph: for a proposer that reads hidden
    states of the target, for which its ``load_weights`` sets ``Model.aux_hidden_states``."""

    def load_weights(self, source: DraftSource) -> None:
        """Load weights. Raises a ``QuireError`` that says what is wrong with them."""

    def parameters(self) -> Iterable[Tensor]:
        """The proposer's own weights: their bytes are taken from the KV cache's memory."""
        return ()

    def attention_specs(self) -> list[AttentionSpec]:
        """One for each layer that keeps keys and values. Every layer sees the whole context."""
        return []

    def attach_target(self, target: TargetState) -> None:
        """Keep ``target`` and allocate buffers. Called once; ``target.kv`` is filled later, when the KV cache is
        allocated."""

    def observe_step(self, step: StepTokens) -> None:
        """The target has computed ``step``, prompt tokens among them. Tokens sampled since are in ``TargetState.table``
        behind those of the step."""

    def backfill(self, spans: Tensor, host_spans: NDArray[np.int64]) -> None:
        """Compute tokens of steps that were not observed. ``spans`` (3, n) int64, device: the table row, the first
        position and the end of each request's tokens. ``host_spans``: the same on the host."""

    @abstractmethod
    def propose(self, rows: Tensor, num_tokens: int, *, greedy: bool = False) -> DraftTokens:
        """``num_tokens`` drafts (fewer by ``DraftTokens.lengths``) for each request in table ``rows`` (n,) int64: what
        may follow the tokens that the table has of it. ``greedy``: every request has temperature 0."""
