"""Adapter method: how fine-tunes that are stored apart from their base model change what its layers compute."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.core.contracts.quant import ActivationFormat, AppendedTerm, LayerInfo, LowRankShrink, QuantActivation
from quire.core.ops.norm import rms_norm

__all__ = ["AdapterLayer", "AdapterLimits", "AdapterMethod", "AdapterTensors"]

AdapterTensors = Sequence[Tensor | None]
"""What is copied into a slot: one for each of ``slot_buffers``, of its dtype and of its shape but for the first
dimension, which may be shorter: the rest of the buffer stays as it is. None: all of it does."""


@dataclass(frozen=True, slots=True)
class AdapterLimits:
    """What an adapter method is made for."""

    num_slots: int
    """Adapters that a step can use: each has a slot, 0 to ``num_slots - 1``."""
    max_rank: int
    max_num_tokens: int
    """Tokens of the largest step, padding included."""
    dtype: torch.dtype
    """In which adapters are kept and multiplied."""
    device: torch.device


class AdapterLayer(ABC):
    """One linear layer's part of every adapter, on one rank: its slots' buffers, and how they change its output."""

    @abstractmethod
    def slot_buffers(self, slot: int) -> Sequence[Tensor]:
        """The slot's tensors on the device, dense, which live as long as the layer. The engine copies into them what
        ``make_tensors`` returns, between steps, in parts and in this order."""

    @abstractmethod
    def make_tensors(self, adapter: Any) -> AdapterTensors:
        """Of ``adapter``, which ``read_adapter`` returned, this rank's share of the layer, on the host and in the form
        of ``slot_buffers``. An adapter that leaves the layer alone has some too, which say so. Called in a thread of
        its own while steps run. Raises ``CheckpointError`` naming the module."""

    @abstractmethod
    def apply(self, x: Tensor, out: Tensor) -> None:
        """Add to ``out`` what the adapter of each token makes of ``x``, for the slots that ``prepare_metadata`` was
        called with last.

        ``x`` (num_tokens, in_features) is the layer's input as it was before any quantization, ``out`` (num_tokens,
        out_features) the layer's output, both dense, in the model's dtype. Rows of tokens without an adapter keep
        their bits. Of a row-sharded layer both are this rank's share, and ``out`` is summed over the ranks later.
        Allocates no memory that must outlive the step, and reads no device tensor on the host: it may be captured.
        """

    def apply_after_norm(self, x: Tensor, norm: tuple[Tensor, float], out: Tensor) -> None:
        """``apply`` of the RMS norm of ``x``, with ``norm``'s weight (in_features,) and epsilon: where a layer's own
        kernel norms its input, and does not show it."""
        self.apply(rms_norm(x, *norm)[0], out)

    def get_shrink(self, num_tokens: int) -> LowRankShrink | None:
        """For methods that multiply by a matrix of few rows and one of few columns: what launches the first of the two
        products, where a layer's own kernel may do the second and add it, in place of ``apply``. None: ``apply``."""
        return None

    def adds_to_partial(self, num_tokens: int) -> bool:
        """Whether ``add_to_partial`` is offered of so many tokens; asked before the layer's product is launched."""
        return False

    def add_to_partial(
        self, x: Tensor, partial: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None
    ) -> Tensor:
        """The layer's output with what adapters make of ``x`` (num_tokens, in_features), dense, from the partial sums
        that ``LinearMethod.apply_partial`` returned of the same ``x`` as the last kernel before; then ``bias``, and
        ``activation`` and ``residual``, dense, as in ``apply_fused``."""
        raise NotImplementedError

    # For methods that multiply by a matrix of few rows first: the layer's own product may do that for every slot, if
    # the rows lie behind its weight's. Methods that do not want it leave these as they are.

    def count_appended_rows(self) -> int:
        """How many rows to make room for behind the layer's weight; 0: none."""
        return 0

    def place_appended_rows(self, rows: Tensor) -> None:
        """The room (count_appended_rows, in_features), zero, where the layer offers it: the slots' buffers may be there
        from now on. Called once, before the first slot is filled."""

    def count_active_rows(self, num_tokens: int) -> int:
        """How many of the rows, from the first, the layer is to multiply in the next step; 0: none, and what adapters
        add comes by the other ways."""
        return 0

    def add_appended(self, wide: Tensor, activation: str | None, residual: Tensor | None) -> Tensor:
        """The layer's output with what adapters add, dense; ``wide`` (num_tokens, out_features + count_active_rows) has
        the layer's product and the rows' behind it. Then ``activation`` and ``residual``, dense, as in
        ``LinearMethod.apply_fused``."""
        raise NotImplementedError

    def describe_appended(self, wide: Tensor) -> AppendedTerm | None:
        """What an operation behind the layer is to add itself, token by token; None: ``add_appended`` comes between."""
        return None

    def add_appended_and_norm(
        self, wide: Tensor, residual: Tensor, norm: tuple[Tensor, float], output_format: ActivationFormat
    ) -> tuple[Tensor | QuantActivation, Tensor] | None:
        """``(norm(s), s)`` of the sum ``s`` of ``add_appended`` and ``residual``, which is dense, the first in
        ``output_format``; None where one kernel for that is not offered."""
        return None


class AdapterMethod(ABC):
    """How adapters of one type multiply: for the whole model, on one rank. What an adapter adds to a layer's output
    depends on the layer's input alone, and not on its weights.

    What a method may rely on: every layer is made before the first step; slots are filled and cleared between steps,
    in the order of the device's stream; ``prepare_metadata`` is called before each step that has a token with an
    adapter, and for no other; all calls but ``read_adapter`` and ``make_tensors`` come from one thread.
    """

    is_active: bool = False
    """Whether a token of the step that runs has an adapter: layers call ``apply`` in those steps alone. Set by the
    engine."""
    num_named_slots: int = 0
    """The step that runs, and is captured, names none but the first so many slots: one of ``list_slot_counts``. Set by
    the engine before ``prepare_metadata``."""

    def __init__(self, limits: AdapterLimits, options: Any = None) -> None:
        self.limits = limits
        self.options = options
        """An instance of the class's ``Options`` dataclass, None without one."""

    @classmethod
    def unsupported(cls, info: LayerInfo) -> str | None:
        """Why no adapter can change a layer ("a language model's head"), or None. Such a layer has no
        ``AdapterLayer``, and an adapter that names it is refused with this reason."""
        return None if info.kind == "linear" else f"a layer of kind {info.kind}"

    @classmethod
    @abstractmethod
    def read_adapter(
        cls,
        path: Path,
        *,
        max_rank: int,
        module_shapes: Mapping[str, tuple[int, int]] | None = None,
        dtype: torch.dtype | None = None,
        content_hash: str | None = None,
    ) -> Any:
        """Read and check the adapter in the folder ``path``: whatever ``make_tensors`` takes. Of any method it has the
        files ``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT writes them: the engine tells by their
        hash (``quire.sdk.compute_content_hash``) which prefixes adapters share.

        ``module_shapes`` are the layers that can have adapters: name in the base's checkpoint -> (out_features,
        in_features) of the whole layer; None: any. ``dtype`` is that of ``AdapterLimits``; None: as stored.
        ``content_hash`` is what the folder had when it was registered: it is refused if it has changed. Raises
        ``CheckpointError``, one line that names the file, field or tensor.
        """

    @classmethod
    def save_example_adapter(
        cls, path: Path, module_shapes: Mapping[str, tuple[int, int]], seed: int
    ) -> Mapping[str, Tensor]:
        """Save a random adapter of these modules to the new folder ``path``, of a rank of 2 to 16, for the conformance
        checks: what it adds to each module's weight, (out_features, in_features). Made without the code that reads
        adapters, or the checks find nothing."""
        raise NotImplementedError

    @abstractmethod
    def make_layer(self, info: LayerInfo, rank: int, world_size: int) -> AdapterLayer:
        """The slots of one layer, allocated, none of which changes anything yet."""

    def slot_buffers(self, slot: int) -> Sequence[Tensor]:
        """Tensors of a slot that its layers share, as ``AdapterLayer.slot_buffers``."""
        return ()

    def make_tensors(self, adapter: Any) -> AdapterTensors:
        """Of ``adapter`` what its layers share, as ``AdapterLayer.make_tensors``."""
        return ()

    @abstractmethod
    def clear_slot(self, slot: int) -> None:
        """The slot changes nothing any more, until another adapter is copied into it. Called between steps: launches
        little, and waits for nothing."""

    def list_slot_counts(self, num_tokens: int) -> Sequence[int]:
        """Steps of ``num_tokens`` are captured once for each of these numbers, ascending, the last ``num_slots``, and a
        step replays that of the fewest slots, of the first, that hold its adapters. More than one where fewer slots
        launch less."""
        return (self.limits.num_slots,)

    @abstractmethod
    def prepare_metadata(self, token_slots: NDArray[np.int32], *, is_captured: bool = False) -> None:
        """Prepare what every layer of the next step shares, from the slot of each of its tokens (num_tokens,), -1
        where it has no adapter.

        Called outside of a capture. ``is_captured``: the step is captured or replayed as a CUDA graph, so ``apply``
        launches the same for any slots of as many tokens, and reads them from tensors that live as long as this.
        """
