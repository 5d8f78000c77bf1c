"""Speculative proposer: guesses the next tokens of a request, for the target model to verify in one step.

Verification is the core's. It draws the target's token at each drafted position by the one sampling rule and accepts
while draft and token agree, so a proposer can only change how fast a request goes, never what it says.
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
    """Derive from ``HostProposer`` or ``DeviceProposer``. One that raises is switched off, and requests go on."""

    needs_model: bool = False
    """Whether ``--speculative-model`` must name a folder."""
    serves_model: bool = False
    """Whether that folder holds a model that could be served alone (``DraftSource.load_model``)."""

    def __init__(self, num_tokens: int, options: Any = None) -> None:
        self.num_tokens = num_tokens
        """The most drafts that will be asked for."""
        self.options = options

    @classmethod
    def unsupported(cls, target_config: Any, draft_config: Any, draft_path: Path | None) -> list[str]:
        """Reasons why this proposer cannot draft for the model with this ``config.json``, given that of
        ``--speculative-model`` and its folder; empty means it can. Called before any weight is read."""
        return []

    @abstractmethod
    def propose(self, *args: Any, **kwargs: Any) -> Any:
        """Draft tokens: see ``HostProposer.propose`` and ``DeviceProposer.propose``."""


class HostProposer(SpeculativeProposer):
    """Works on the host, from tokens one step old, while the device runs: no step waits for it.

    What it returns is anchored at the end of the tokens it was shown. By the time it is used the device has drawn more;
    the core drops continuations that those contradict and shortens the others.
    """

    @abstractmethod
    def propose(self, request: Request, num_tokens: int) -> Sequence[int]:
        """Up to ``count`` tokens that may follow ``who.token_ids``, which only ever grows. Called for every
        decoding request in every step: some microseconds are all it may take. Tokens of one request may serve another
        only if their ``cache_salt`` is the same."""

    def request_finished(self, request: Request) -> None:
        """The request has ended."""


@dataclass(frozen=True, slots=True)
class DraftSource:
    """From what a device proposer loads its weights."""

    path: Path | None
    """Folder of ``--speculative-model``."""
    target: Model
    target_config: Any
    """The target's ``config.json``."""
    make_builder: Callable[[Any], LayerBuilder]
    """Makes layers for this rank in the target's precision, quantized as the given ``config.json`` says."""
    load_model: Callable[[], Model]
    """Loads ``path`` as a model of its own, of any architecture and quantization that can be served."""
    load_format: str
    config: Any
    """``path``'s ``config.json``; None without a path."""
    max_num_tokens: int
    """Of a forward pass of the target, padding included: so many lines ``AuxHiddenStates`` must have."""


@dataclass(frozen=True, slots=True)
class TargetState:
    """The engine as a device proposer sees it. Tensors are by row of the request table, and stay where they are."""

    sampler: Sampler
    table: SamplingTable
    num_computed_tokens: Tensor  # (rows,) int32: tokens whose KV the target has; when proposing, ``num_tokens - 1``
    block_table: Tensor  # (rows, max_blocks) int32, of the group of layers that keeps every token
    kv: list[LayerKV]
    """One for each of the proposer's layers, under the target's block ids."""
    backends: list[AttentionBackend]
    """By group of the proposer's layers."""
    group_of: list[int]
    """By layer of the proposer."""
    block_size: int
    max_model_len: int
    max_num_reqs: int

    @property
    def padding_row(self) -> int:
        """The row that stands for padding: its tokens are written to block 0, and nobody reads its drafts."""
        return len(self.num_computed_tokens) - 1


@dataclass(slots=True)
class StepTokens:
    """The tokens that a step has computed, in the order of the target's inputs; device tensors."""

    input_ids: Tensor  # (num_tokens,) int32
    positions: Tensor  # (num_tokens,) int64
    slot_mapping: Tensor  # (num_tokens,) int64, of the group of ``TargetState.block_table``
    rows: Tensor  # (num_reqs,) int64
    batch: AttentionBatch
    """Of that group."""


@dataclass(slots=True)
class DraftTokens:
    """Drafts of some requests. A token outside the vocabulary ends its request's draft."""

    token_ids: Tensor  # (n, k) int32
    lengths: Tensor | None = None  # (n,) int32; None: all k


class DeviceProposer(SpeculativeProposer):
    """Works on the device, right behind the sampler: its tensors are exact, and it reads none of them on the host.

    Life: constructed -> ``load_weights`` -> ``attention_specs`` -> ``attach_target`` once -> per step
    ``observe_step`` if the step
    computed prompt tokens, then ``propose`` if anybody drew. ``capturable``: ``propose`` may be captured in a CUDA
    graph, with padding rows at the end of ``rows``.
    """

    capturable: bool = False
    supports_backfill: bool = False
    """Whether ``backfill`` can read tokens later: nothing need be observed then while nothing is drafted."""
    observes_every_step: bool = False
    """Whether ``observe_step`` is called for every step, maybe in a CUDA graph: for one that reads hidden states of the
    target, which its ``load_weights`` makes ``Model.aux_hidden_states`` for."""

    def load_weights(self, source: DraftSource) -> None:
        """Load weights. Raises a ``QuireError`` that says what is wrong with them."""

    def parameters(self) -> Iterable[Tensor]:
        """The weights of its own, to be counted."""
        return ()

    def attention_specs(self) -> list[AttentionSpec]:
        """One per layer that keeps keys and values. Every layer sees the whole context."""
        return []

    def attach_target(self, target: TargetState) -> None:
        """The engine stands, the KV cache is allocated."""

    def observe_step(self, step: StepTokens) -> None:
        """A step computed these tokens, prompts among them. What was drawn since lies behind them in the table."""

    def backfill(self, spans: Tensor, host_spans: NDArray[np.int64]) -> None:
        """Read tokens that were computed while nothing was drafted. ``spans`` (3, n) int64: rows, the first token of
        each and the one behind its last; ``known`` is the same on the host."""

    @abstractmethod
    def propose(self, rows: Tensor, num_tokens: int, *, greedy: bool = False) -> DraftTokens:
        """``num_tokens`` drafts for each of the ``rows`` (n,) int64: what may follow the tokens that the table has
        of it.
        ``greedy``: nobody has a temperature."""
