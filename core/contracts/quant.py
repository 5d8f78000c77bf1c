"""Quantization loader: how a layer's weights are stored, loaded and multiplied."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = [
    "ActivationFormat",
    "AppendedTerm",
    "InputFormat",
    "LayerInfo",
    "LinearMethod",
    "LowRankShrink",
    "LowRankTerm",
    "QuantActivation",
    "QuantizationLoader",
    "ShrinkInProduct",
    "StoredWeight",
    "get_native_activation",
]

InputFormat = Literal["native", "fp8_token", "fp8_tensor", "fp8_group", "int8_token"]


@dataclass(frozen=True, slots=True)
class ActivationFormat:
    """What an operation is asked to emit."""

    kind: InputFormat = "native"
    scale: Tensor | None = None
    """Of ``fp8_tensor``: (1,) float32, from the checkpoint. The others make one for each token, or of ``fp8_group`` for
    each 128 features of a token: ``max|x|`` over the largest number of the format: 448, or 127."""


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One linear layer of the model, as it is on this rank."""

    name: str
    """Name of the merged module, e.g. ``model.layers.0.self_attn.qkv_proj``."""
    kind: Literal["linear", "embedding", "lm_head"]
    in_features: int
    """Of this rank's shard."""
    out_features: int
    """Of this rank's shard: the sum of ``part_sizes``."""
    part_names: tuple[str, ...]
    """Checkpoint names of the fused parts, e.g. ``...q_proj, ...k_proj, ...v_proj``; one where nothing is fused."""
    part_sizes: tuple[int, ...]
    """Output rows of each part on this rank."""
    part_totals: tuple[int, ...]
    """Output rows of each part in the checkpoint. KV heads fewer than the ranks are held by several: then
    ``part_sizes`` times the ranks is more than the total. A padded vocabulary is the other case of that."""
    in_total: int
    """Input features in the checkpoint."""
    shard: Literal["column", "row", "replicated"]
    dtype: torch.dtype
    bias: bool

    def out_range(self, part: int, rank: int, world_size: int) -> tuple[int, int]:
        """(first row, number of rows) of ``part``'s checkpoint tensor that belong to ``rank``."""
        size, total = self.part_sizes[part], self.part_totals[part]
        if self.shard != "column" or world_size == 1:
            return 0, total
        replicas = max(1, size * world_size // total) if self.kind != "lm_head" else 1
        first = min(rank // replicas * size, total)
        return first, min(size, total - first)

    def in_range(self, rank: int) -> tuple[int, int]:
        """(first, number) of the checkpoint's input features that belong to ``rank``."""
        return (rank * self.in_features, self.in_features) if self.shard == "row" else (0, self.in_features)

    def select_part(self, part: int) -> LayerInfo:
        """``part`` as a layer of its own."""
        name, size, total = self.part_names[part], self.part_sizes[part], self.part_totals[part]
        return replace(self, name=name, out_features=size, part_names=(name,), part_sizes=(size,), part_totals=(total,))


@dataclass(slots=True)
class QuantActivation:
    """An activation that the operation before already quantized."""

    values: Tensor  # (num_tokens, features)
    scale: Tensor  # (num_tokens, 1), (1,) or (num_tokens, features / 128), float32
    """Of groups on a GPU, a group's tokens lie side by side, and both tensors have room for whole fours of tokens."""
    native: Tensor | None = None
    """The same activation unquantized, where it is also needed."""
    dtype: torch.dtype = torch.bfloat16
    """Of the activation before it was quantized."""


def get_native_activation(x: Tensor | QuantActivation) -> Tensor:
    """``x`` unquantized, as a layer of the input format ``native`` gets it."""
    native = x.native if isinstance(x, QuantActivation) else x
    assert native is not None, "the operation before emitted it quantized alone"
    return native


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """One part of a layer as a checkpoint stores it, and the weight that it stands for."""

    tensors: Mapping[str, Tensor]
    """By suffix: ``LinearMethod.tensor_names``."""
    weight: Tensor  # (outputs, inputs)


@dataclass(frozen=True, slots=True)
class ShrinkInProduct:
    """The first product of a layer's adapters as the layer's own kernel does it; see ``shrink_in_product``."""

    a: Tensor
    """(slots, parts, max_rank, in_features)."""
    words: Tensor
    """int64: what programs hand to each other. All layers of a stream may share it."""
    number: Tensor
    """(1,) int32, other than in any launch before that used ``words``."""
    segments: Tensor
    """(3, max_segments) int32: of tokens of one adapter each, the slot, the first sorted token and the number of them,
    16 at most. Those of one adapter follow each other."""
    num_live: Tensor
    """(1,) int32: the segments that are not empty."""
    token_indices: Tensor
    """(num_tokens,) int32: the sorted tokens, of which the segments are parts."""
    active_slots: Tensor
    """(1 + adapters,) int32: how many slots the step's tokens have, and then these, each once."""
    max_polls: int = 0
    """After how many looks a program gives up waiting, and the result is not a number; 0: never."""


@dataclass(frozen=True, slots=True)
class LowRankTerm:
    """What adapters add to a layer's output, short of the product with their second matrix: to token ``m`` whose
    adapter is in slot ``s``, ``sum of v[:, m] times b[s]``, part by part of the layer's fused parts."""

    v: Tensor | None
    """(splits, num_tokens, parts * max_rank) float32, to be summed over the splits. What lies beyond an adapter's rank,
    and rows of tokens without one, hold anything. None: the layer's kernel makes it, see ``shrink``."""
    b: Tensor
    """(slots, max_rank, out_features)."""
    ranks: Tensor
    """(slots, parts) int32."""
    slots: Tensor
    """(num_tokens,) int32, at least: each token's slot, -1 where it has no adapter."""
    part_sizes: tuple[int, ...]
    """Features of each part, three parts at most."""
    shrink: ShrinkInProduct | None = None
    """What programs of the layer's kernel multiply beside the others, where ``v`` is None."""


@dataclass(frozen=True, slots=True)
class AppendedTerm:
    """What adapters add to a layer's output, for an operation behind it to add: to part ``p`` of a token whose adapter
    is in slot ``s``, ``v[token, s, p] times b[s]``."""

    v: Tensor
    """(num_tokens, slots * parts * max_rank or more), rows strided: made by the layer's own product."""
    b: Tensor
    """(slots, max_rank, out_features)."""
    ranks: Tensor
    """(slots, parts) int32."""
    token_slots: Tensor
    """(num_tokens,) int32, at least: each token's slot, -1 where it has no adapter."""


@dataclass(frozen=True, slots=True)
class LowRankShrink:
    """The first product of a layer's adapters: launched in front of the layer's kernel, or part of it."""

    launch: Callable[[Tensor, tuple[Tensor, float] | None], LowRankTerm]
    """Launches it: of the layer's input (num_tokens, in_features), and the norm before it or None. With a norm (weight
    and epsilon), ``v`` lacks the division by the root of the mean square, as ``W (g * x)``."""
    describe_in_product: Callable[[], LowRankTerm] | None = None
    """For kernels that can do it themselves, in place of ``launch``, and likewise once a launch."""
    formats: Collection[str] = ()
    """Of weights whose kernels shall, as launch tables name them: ``bf16``, ``fp8``, ``int8``, ``w4a16``."""

    def get_in_product(self, weight_format: str) -> LowRankTerm | None:
        """For a kernel that can do it itself; None: ``launch`` it."""
        return self.describe_in_product() if self.describe_in_product and weight_format in self.formats else None


class LinearMethod(ABC):
    """How one layer multiplies. Stateless beyond its settings: weights live on the module as parameters."""

    input_format: InputFormat = "native"
    """What the fused norm or activation before the layer should emit."""
    batch_invariant: bool = False
    """Whether a token's product has the same bits whatever tokens are beside it."""

    def input_scale(self, layer: nn.Module) -> Tensor | None:
        """The scale (1,) float32 of an input in the format ``fp8_tensor``."""
        return None

    @abstractmethod
    def create_weights(self, layer: nn.Module, info: LayerInfo, device: torch.device) -> None:
        """Register the parameters that a checkpoint fills, with their final shapes on this rank; or wait for
        ``load_tensor``, and register in ``process_weights_after_loading`` what ``load_tensor`` was never called for
        (``--load-format dummy``)."""

    def tensor_names(self, info: LayerInfo) -> tuple[str, ...]:
        """Suffixes of the tensors a checkpoint holds for a part; ``load_tensor`` is called once for each. ``info``
        has that part alone."""
        return ("weight", "bias") if info.bias else ("weight",)

    def optional_names(self, info: LayerInfo) -> tuple[str, ...]:
        """Those of ``tensor_names`` that a checkpoint may lack. ``info`` has one part alone."""
        return ()

    def alias_names(self, info: LayerInfo) -> Mapping[str, str]:
        """Other suffixes that tools write, and which of ``tensor_names`` each means; ``load_tensor`` gets the latter.
        ``info`` has one part alone."""
        return {}

    @abstractmethod
    def load_tensor(
        self, layer: nn.Module, info: LayerInfo, part: int, tensor_name: str, tensor: Tensor, rank: int, world_size: int
    ) -> None:
        """Copy one checkpoint tensor (``weight``, ``bias``, ``qweight`` ...) of part ``part`` into place, taking this
        rank's shard. Raises ``CheckpointError`` naming the tensor if its shape is wrong.

        ``tensor`` is whole, and mapped from a file: slice it first, and no more than the slice is read."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Repack after everything is loaded."""

    @abstractmethod
    def apply(self, layer: nn.Module, x: Tensor | QuantActivation, bias: Tensor | None = None) -> Tensor:
        """``x`` (num_tokens, in_features) -> (num_tokens, out_features). Graph-safe, fixed reduction order.

        A row of the result depends on that row of ``x`` alone, whatever the others hold, infinite numbers included:
        some are padding, and ranks multiply a step's rows in parts. The result is a tensor of its own, which the caller
        may keep and overwrite, and never a buffer that another call writes to: the products of several calls are in use
        at a time. Both hold for the other products of this class, too.
        """

    def apply_fused(
        self,
        layer: nn.Module,
        x: Tensor | QuantActivation,
        bias: Tensor | None = None,
        *,
        norm: tuple[Tensor, float] | None = None,
        activation: str | None = None,
        residual: Tensor | None = None,
    ) -> Tensor | None:
        """``apply`` with what stands beside the layer in the same kernel; None where that is not offered, or would not
        be faster: then the caller does one after the other.

        In this order: an RMS norm of ``x`` with ``norm``'s weight (in_features,) and epsilon; the layer; a gated
        ``activation`` by name (``silu``: ``silu(first half) * second half``), which halves the features; ``residual``
        added. Unlike ``apply`` it may leave out every rounding but the last.
        """
        return None

    def apply_with_adapters(
        self,
        layer: nn.Module,
        x: Tensor,
        bias: Tensor | None,
        shrink: LowRankShrink,
        *,
        norm: tuple[Tensor, float] | None = None,
        activation: str | None = None,
        residual: Tensor | None = None,
    ) -> Tensor | None:
        """``apply_fused`` with what adapters add to the layer's own output in the same kernel; None where that is not
        offered for so many tokens: then the caller adds it behind the layer. Calls ``shrink`` once, or not at all.

        Rows of tokens without an adapter have the bits of ``apply_fused``.
        """
        return None

    def apply_partial(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """The product without its bias as partial sums, for an operation behind it to add up and go on from: (splits,
        num_tokens, out_features), float32; a single one may be in the dtype of ``x``. None where that is not offered
        for so many tokens.

        The kernel behind it may start, where the GPU has programmatic dependent launch, as soon as this one's programs
        run and ``x`` is whole: it reads ``x`` without a wait of its own.
        """
        return None

    def append_rows(self, layer: nn.Module, num_rows: int) -> Tensor | None:
        """Room for ``num_rows`` more rows behind the layer's weight, which ``apply_appended`` multiplies with it:
        (num_rows, in_features), zero, and where it is as long as the layer. Adapters keep their first matrices there.
        None where that is not offered, as of weights in another format. Called once, after ``create_weights``."""
        return None

    def apply_appended(
        self,
        layer: nn.Module,
        x: Tensor,
        bias: Tensor | None,
        num_rows: int,
        *,
        norm: tuple[Tensor, float] | None = None,
    ) -> Tensor | None:
        """The layer and behind its output the first ``num_rows`` of the rows that were appended, in one product:
        (num_tokens, out_features + num_rows). With ``norm``, as of ``apply_fused``, None where that is not faster."""
        return None


class QuantizationLoader(ABC):
    """Chooses a method for every layer. ``none`` is one of these."""

    def __init__(self, quant_config: Mapping[str, Any], options: Any = None) -> None:
        self.quant_config = dict(quant_config)
        """The checkpoint's ``quantization_config``, empty if it has none."""
        self.options = options
        """An instance of the class's ``Options`` dataclass, None without one."""

    @classmethod
    @abstractmethod
    def unsupported(cls, quant_config: Mapping[str, Any], device: torch.device) -> list[str]:
        """Reasons why this checkpoint cannot be loaded on ``device``; empty means it can."""

    @classmethod
    def example_config(cls) -> Mapping[str, Any]:
        """A ``quantization_config`` that it reads, for the conformance checks; of a plain checkpoint where it can."""
        return {}

    @classmethod
    def example_tensors(cls, outputs: int, inputs: int) -> StoredWeight | None:
        """Random tensors of a layer as ``example_config`` stores them, for the conformance checks: made without the
        code that loads them, or the checks find nothing. None where it reads plain checkpoints alone."""
        return None

    @abstractmethod
    def get_linear_method(self, info: LayerInfo) -> LinearMethod:
        """The method for one layer."""
