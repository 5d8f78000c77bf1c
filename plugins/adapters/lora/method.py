"""LoRA (Hu et al., 2021, arXiv:2106.09685): a layer's output plus ``scaling * B A x``, for many adapters at once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from quire.plugins.adapters.lora.batch import FEW_SLOTS, MAX_FEW_TOKENS, MAX_SUMMED_TOKENS, AdapterBatch
from quire.plugins.adapters.lora.reference import add_appended, apply_lora, apply_one_adapter
from quire.sdk import (
    ActivationFormat,
    AdapterLayer,
    AdapterLimits,
    AdapterMethod,
    AdapterTensors,
    AppendedTerm,
    LayerInfo,
    LoraWeights,
    LowRankShrink,
    LowRankTerm,
    PeftAdapter,
    QuantActivation,
    read_adapter,
)
from quire.sdk.ops import DeviceProfile, rms_norm, silu_and_mul

__all__ = ["Lora", "LoraLayer"]

_FORMATS = ("bf16", "fp8", "int8", "w4a16")
"""Of weights whose kernels can do the first product too."""
_RANK_MULTIPLE = 16
"""Ranks are padded to what a tensor core multiplies at a time."""
_SLOT_COUNTS = (1, FEW_SLOTS)
"""Steps whose adapters are in the first so many slots read the A of these alone."""
_APPENDED_MULTIPLE = 64
"""Rows behind a weight are as many as whole tiles of a product have."""
_MAX_KERNEL_TOKENS = 64
"""Up to so many the layers' own kernels multiply, of which each number of rows is another."""
_MAX_PARTS = 3
"""Most fused parts of a layer that the kernels know."""
_MAX_FEW_SHARE = 2
"""Rows behind a weight that are more than this part of it are not multiplied, and"""
_MAX_APPENDED_SHARE = 16
"""beyond ``_MANY_TOKENS``, where products are bound by arithmetic, not those that are more than this part."""
_MANY_TOKENS = 512
_MAX_FUSED_RANK = 64
"""Most ranks that the kernel of a layer's own product adds: its programs hold them in registers."""


class Lora(AdapterMethod):
    """Adapters of any rank up to ``max_rank`` beside one another, each from a folder that PEFT wrote."""

    @dataclass(frozen=True)
    class Options:
        """Options of the method."""

        add_in_product: bool = True
        """For a few tokens a layer's own kernel adds the second product; false: a kernel behind it always does."""
        shrink_in_product: bool | None = None
        """There it does the first product as well, where it can. None: where that was measured to be faster."""
        append_to_weight: bool | None = None
        """For more tokens A lies behind the layer's weight, where that is unquantized and the rank's result whole, and
        the layer's product does the first product too; false: kernels behind it do both. True: always.
        None: on a GPU, but for float16, which may not hold v, and where its rows are at most half of the layer's."""
        shrink_beside_product: bool = True
        """Elsewhere, for tens of tokens, both products are one kernel that starts beside the layer's, where that leaves
        partial sums; false: two kernels behind its result."""
        max_normed_tokens: int = 128
        """There up to so many tokens are added by the norm's kernel behind the layer, and"""
        max_rotated_tokens: int = 128
        """up to so many by the rotary embedding's."""

    def __init__(self, limits: AdapterLimits, options: Options | None = None) -> None:
        super().__init__(limits, options)
        self.options = options or self.Options()
        self._batch = AdapterBatch(limits)
        self._layers: list[LoraLayer] = []

    @classmethod
    def unsupported(cls, info: LayerInfo) -> str | None:
        """The kernels know three fused parts."""
        if len(info.part_sizes) > _MAX_PARTS:
            return f"a layer of {len(info.part_sizes)} fused parts"
        return super().unsupported(info)

    @classmethod
    def read_adapter(
        cls,
        path: Path,
        *,
        max_rank: int,
        module_shapes: Mapping[str, tuple[int, int]] | None = None,
        dtype: torch.dtype | None = None,
        content_hash: str | None = None,
    ) -> PeftAdapter:
        """The folder's matrices A and B by module."""
        return read_adapter(
            path, max_rank=max_rank, module_shapes=module_shapes, dtype=dtype, content_hash=content_hash
        )

    @classmethod
    def save_example_adapter(
        cls, path: Path, module_shapes: Mapping[str, tuple[int, int]], seed: int
    ) -> Mapping[str, Tensor]:
        """Ranks of 2 to 5, and a scaling that is no power of two."""
        generator = torch.Generator().manual_seed(seed)
        ranks = {True: 4 - seed % 3, False: 5 - seed % 3}  # of keys' projections and the others
        config = {"peft_type": "LORA", "r": ranks[False], "lora_alpha": 7, "rank_pattern": {"k_proj": ranks[True]}}
        tensors: dict[str, Tensor] = {}
        deltas: dict[str, Tensor] = {}
        for name, (outputs, inputs) in module_shapes.items():
            rank = ranks[name.endswith("k_proj")]
            a, b = (torch.randn(*shape, generator=generator) for shape in ((rank, inputs), (outputs, rank)))
            tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
            deltas[name] = b @ a * (7 / rank)
        path.mkdir()
        save_file(tensors, path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text(json.dumps(config), "utf-8")
        return deltas

    def make_layer(self, info: LayerInfo, rank: int, world_size: int) -> LoraLayer:
        """Room for each slot's A and B."""
        layer = LoraLayer(info, self.limits, self._batch, rank, world_size, self.options, len(self._layers))
        self._layers.append(layer)
        return layer

    def clear_slot(self, slot: int) -> None:
        """Zero all that the slot holds: its ranks, and its weights, of which nothing stays behind."""
        buffers = [buffer for layer in self._layers for buffer in layer.slot_buffers(slot)]
        for dtype in {buffer.dtype for buffer in buffers}:
            torch._foreach_zero_([buffer for buffer in buffers if buffer.dtype == dtype])

    def prepare_metadata(self, token_slots: NDArray[np.int32], *, is_captured: bool = False) -> None:
        """Sort the step's tokens by adapter."""
        self._batch.update(token_slots, is_captured=is_captured)
        if self.options.shrink_beside_product or self._batch.tiles.has_appended_rows:
            self._batch.tiles.update(token_slots, self._choose_slot_count(token_slots, is_captured=is_captured))

    def _choose_slot_count(self, token_slots: NDArray[np.int32], *, is_captured: bool) -> int:
        if is_captured and self.num_named_slots:
            return self.num_named_slots
        if len(token_slots) <= _MAX_KERNEL_TOKENS:  # of other counts the layers' own kernels may not be compiled yet
            return self.limits.num_slots
        most = int(token_slots.max(initial=-1)) + 1
        return next(count for count in self.list_slot_counts(len(token_slots)) if count >= most)

    def list_slot_counts(self, num_tokens: int) -> Sequence[int]:
        """Rows behind the weights are read for every slot that may be named."""
        num_slots = self.limits.num_slots
        if not self._batch.tiles.has_appended_rows or (num_tokens <= MAX_FEW_TOKENS and self._adds_in_product()):
            return (num_slots,)
        return (*(count for count in _SLOT_COUNTS if count < num_slots), num_slots)

    def _adds_in_product(self) -> bool:
        """Whether layers' own kernels add the second product for a few tokens: those of sixteen bits, on Hopper."""
        limits = self.limits
        return (
            self.options.add_in_product
            and limits.device.type == "cuda"
            and limits.dtype != torch.float32
            and _pad_rank(limits.max_rank) <= _MAX_FUSED_RANK
            and DeviceProfile.detect(limits.device).is_hopper
        )


class LoraLayer(AdapterLayer):
    """A and B of every slot for one layer, whose fused parts have matrices of their own.

    Of a column-sharded layer A is whole on every rank and B is this rank's rows; of a row-sharded one A is this rank's
    columns and B is whole. So a rank's result belongs to its share of the layer's output, and no other collective is
    needed than the layer's own.
    """

    def __init__(
        self,
        info: LayerInfo,
        limits: AdapterLimits,
        batch: AdapterBatch,
        rank: int,
        world_size: int,
        options: Lora.Options | None = None,
        index: int = 0,
    ) -> None:
        self._info = info
        self._index = index
        self._options = options = options or Lora.Options()
        formats = {None: DeviceProfile.detect(limits.device).shrinks_in_product, True: _FORMATS, False: ()}
        self._shrinking_formats = formats[options.shrink_in_product]
        self._batch = batch
        self._rank, self._world_size = rank, world_size
        max_rank = _pad_rank(limits.max_rank)
        slots, parts, device = limits.num_slots, len(info.part_sizes), limits.device
        self._a = torch.zeros(slots, parts, max_rank, info.in_features, dtype=limits.dtype, device=device)
        self._b = torch.zeros(slots, max_rank, info.out_features, dtype=limits.dtype, device=device)
        self._ranks = torch.zeros(slots, parts, dtype=torch.int32, device=device)

    def slot_buffers(self, slot: int) -> Sequence[Tensor]:
        """A of each part (max_rank, in_features), B of all (max_rank, out_features), and the parts' ranks."""
        return (*self._a[slot].unbind(0), self._b[slot], self._ranks[slot])

    def make_tensors(self, adapter: PeftAdapter) -> AdapterTensors:
        """As many rows as the adapter's rank; B has the scaling in it."""
        weights = [adapter.modules.get(name) for name in self._info.part_names]
        ranks = [0 if each is None else each.rank for each in weights]
        if not any(ranks):
            return [None] * (len(weights) + 2)
        start, width = self._info.in_range(self._rank)
        a = [None if each is None else each.a[:, start : start + width].to(self._a.dtype) for each in weights]
        b = torch.zeros(max(ranks), self._info.out_features, dtype=self._b.dtype)
        at = 0
        for part, (each, size) in enumerate(zip(weights, self._info.part_sizes, strict=True)):
            if each is not None:
                b[: each.rank, at : at + size] = self._take_rows(each, part)
            at += size
        return [*(each if each is None else each.contiguous() for each in a), b, torch.tensor(ranks, dtype=torch.int32)]

    def apply(self, x: Tensor, out: Tensor) -> None:
        """By the kernels on a GPU; where all tokens have one adapter and the step is not captured, by the library."""
        self._apply(x, out, None)

    def apply_after_norm(self, x: Tensor, norm: tuple[Tensor, float], out: Tensor) -> None:
        """In the same kernels; float16 would not hold the product of ``x`` and the norm's weight."""
        if self._batch.single_slot is not None or x.dtype == torch.float16:
            x, norm_in_kernel = rms_norm(x, *norm)[0], None
        else:
            norm_in_kernel = norm
        self._apply(x, out, norm_in_kernel)

    def get_shrink(self, num_tokens: int) -> LowRankShrink | None:
        """For few tokens and few ranks on a GPU: the layer's own kernel does the rest, or all of it."""
        has_few = num_tokens <= MAX_FEW_TOKENS and self._a.shape[2] <= _MAX_FUSED_RANK
        if not (self._options.add_in_product and self._a.is_cuda and has_few and self._batch.single_slot is None):
            return None
        return LowRankShrink(self.shrink, self._describe_in_product, self._shrinking_formats)

    def shrink(self, x: Tensor, norm: tuple[Tensor, float] | None) -> LowRankTerm:
        """By its kernel, for the step's sorted tokens."""
        from quire.plugins.adapters.lora.kernels import launch_shrink

        return self._make_term(launch_shrink(x, self._a, self._ranks, self._batch, norm)[0])

    def _describe_in_product(self) -> LowRankTerm:
        self._batch.begin_layer(self._index)
        return self._make_term(None)

    def _make_term(self, v: Tensor | None) -> LowRankTerm:
        """With the first product ``v``; None: the layer's kernel, which is launched next, does it."""
        shrink = self._batch.describe_shrink(self._a, self._index) if v is None else None
        return LowRankTerm(v, self._b, self._ranks, self._batch.slots, self._info.part_sizes, shrink)

    def adds_to_partial(self, num_tokens: int) -> bool:
        """For more than few tokens on a GPU, and few ranks."""
        is_offered = (
            self._options.shrink_beside_product
            and self._a.is_cuda
            and MAX_FEW_TOKENS < num_tokens <= MAX_SUMMED_TOKENS
            and self._a.shape[2] <= _MAX_FUSED_RANK
            and self._batch.single_slot is None
        )
        if is_offered:
            self._batch.begin_layer(self._index)  # in front of the product: what starts beside it waits for nothing
        return is_offered

    def add_to_partial(
        self, x: Tensor, partial: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None
    ) -> Tensor:
        """By one kernel, with the activation function in it where two parts of one size are its halves."""
        from quire.plugins.adapters.lora.partial_kernels import launch_add_to_partial

        assert activation in (None, "silu")
        sizes, term = self._info.part_sizes, self._make_term(None)
        if activation is not None and (len(sizes) != 2 or sizes[0] != sizes[1]):
            out = silu_and_mul(launch_add_to_partial(x, partial, bias, term, self._batch))
            return out if residual is None else out + residual
        gated = activation is not None
        return launch_add_to_partial(x, partial, bias, term, self._batch, gated=gated, residual=residual)

    def count_appended_rows(self) -> int:
        """A of every slot, where this rank's result is whole and A has the weight's type."""
        if len(self._info.part_sizes) > _MAX_PARTS:
            return 0
        info = self._info
        is_whole = info.shard != "row" or self._world_size == 1
        is_wanted = self._options.append_to_weight
        if is_wanted is None:
            is_wanted = self._a.is_cuda and self._a.dtype != torch.float16
        return self._round_up(self._a.shape[0]) if is_wanted and is_whole and self._a.dtype == info.dtype else 0

    def place_appended_rows(self, rows: Tensor) -> None:
        """A moves there."""
        size = self._a.shape[:3].numel()
        self._a = rows[:size].view(self._a.shape)
        self._batch.tiles.has_appended_rows = True

    def count_active_rows(self, num_tokens: int) -> int:
        """Of the slots that the step may name, unless these rows are so many, for the layer and as many tokens, that
        segments are faster."""
        num_rows = self._round_up(self._batch.tiles.num_slots)
        if num_tokens > _MANY_TOKENS:
            share = _MAX_APPENDED_SHARE
        else:
            share = 0 if self._options.append_to_weight else _MAX_FEW_SHARE
        return 0 if num_rows * share > self._info.out_features else num_rows

    def add_appended(self, wide: Tensor, activation: str | None, residual: Tensor | None) -> Tensor:
        """By the kernel on a GPU, with the activation function in it where two parts of one size are its halves."""
        assert activation in (None, "silu")
        sizes = self._info.part_sizes
        if activation is not None and (len(sizes) != 2 or sizes[0] != sizes[1]):
            out = silu_and_mul(self.add_appended(wide, None, None))
            return out if residual is None else out + residual
        arguments: dict[str, Any] = {"gated": activation is not None, "residual": residual}
        if not wide.is_cuda:
            return add_appended(wide, self._b, sizes, self._batch, **arguments)
        from quire.plugins.adapters.lora.appended_kernels import launch_add_appended

        return launch_add_appended(wide, self._b, self._ranks, sizes, self._batch, **arguments)

    def describe_appended(self, wide: Tensor) -> AppendedTerm | None:
        """For few tokens on a GPU: each reads its B whole."""
        if not wide.is_cuda or len(wide) > self._options.max_rotated_tokens:
            return None
        v = wide[:, self._info.out_features :]
        return AppendedTerm(v, self._b, self._ranks, self._batch.tiles.token_slots)

    def add_appended_and_norm(
        self, wide: Tensor, residual: Tensor, norm: tuple[Tensor, float], output_format: ActivationFormat
    ) -> tuple[Tensor | QuantActivation, Tensor] | None:
        """For few tokens on a GPU: each reads its B whole."""
        if not wide.is_cuda or len(wide) > self._options.max_normed_tokens or len(self._info.part_sizes) > 1:
            return None
        from quire.plugins.adapters.lora.appended_kernels import launch_add_appended_and_norm

        return launch_add_appended_and_norm(wide, self._b, self._ranks, self._batch, residual, norm, output_format)

    def _round_up(self, num_slots: int) -> int:
        """Rows of A of the first so many slots, and those behind them that fill a tile of a product."""
        num_rows = num_slots * self._a.shape[1:3].numel()
        return -(-num_rows // _APPENDED_MULTIPLE) * _APPENDED_MULTIPLE

    def _apply(self, x: Tensor, out: Tensor, norm: tuple[Tensor, float] | None) -> None:
        sizes, slot = self._info.part_sizes, self._batch.single_slot
        if slot is not None:
            apply_one_adapter(x, out, self._a[slot], self._b[slot], sizes)
        elif x.is_cuda:
            from quire.plugins.adapters.lora.kernels import launch_lora

            launch_lora(x, out, self._a, self._b, self._ranks, sizes, self._batch, norm)
        else:
            apply_lora(x, out, self._a, self._b, self._ranks, sizes, self._batch, norm)

    def _take_rows(self, weights: LoraWeights, part: int) -> Tensor:
        """This rank's share of B of ``part``, times the scaling: (rank, rows)."""
        first, count = self._info.out_range(part, self._rank, self._world_size)
        return (weights.b[first : first + count].float() * weights.scaling).T


def _pad_rank(rank: int) -> int:
    """To a whole number of what a tensor core multiplies."""
    return -(-rank // _RANK_MULTIPLE) * _RANK_MULTIPLE
