"""Which tokens of a step have which adapter: sorted once a step, for every layer of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.sdk import AdapterLimits, ShrinkInProduct
from quire.sdk.ops import copy_to_device

__all__ = ["FEW_SLOTS", "MAX_FEW_TOKENS", "MAX_SUMMED_TOKENS", "AdapterBatch", "SegmentShape", "TokenTiles"]

MAX_FEW_TOKENS = 8
"""Tokens of a step whose slots are uploaded one by one, for kernels that add what adapters make of them."""
MAX_SUMMED_TOKENS = 256
"""Tokens of a step up to which both products are done where a layer's partial sums are added up."""
_MAX_WORDS = 17 * MAX_SUMMED_TOKENS * 3 * 64
"""Numbers that one launch hands over: of each part of the inputs and their sum, token, fused part of the layer and
rank."""
_MAX_POLLS = 1 << 21
"""Looks of a program for what another one of its launch hands over, about two seconds of them: if that ever failed, the
step's logits would not be numbers, which ends its requests with an error, and no step would hang."""
_MAX_LAYERS = 4096
"""Whose kernels may do the first product: each has a number of its own."""
_SHORT_SEGMENT_TOKENS = 512
"""Tokens of a step up to which segments are short: most hold decodes, which rarely share an adapter with 16 others."""


FEW_SLOTS = 8
"""Of so many slots, or fewer, the tokens of a tile share most."""
_TILE_ROWS = (16, 32, 64)
_MAX_TILE_ROWS = _TILE_ROWS[-1]
"""Tokens of a tile, in their order in the step, whose adapters are multiplied together."""
_MIXED_TILE_ROWS, _MAX_MIXED_TOKENS = 32, 256
"""Tokens of a tile that may have more slots than ``FEW_SLOTS``, in steps of up to so many tokens: each token is
multiplied by every slot of its tile, so small tiles waste less."""


@dataclass(frozen=True, slots=True)
class SegmentShape:
    """How the tokens of a step are cut."""

    num_tokens: int
    num_segments: int
    """Of a captured step as many as there may be for any slots; those behind the last are empty."""
    max_rows: int
    """Tokens of the longest segment."""


class TokenTiles:
    """The tokens of a step in their order, in tiles, and the slots that each tile's tokens have: for kernels that find
    ``v`` behind a layer's product.

    Device tensors are int32 and stay where they are: ``token_slots`` (max_num_tokens,) the slot of each token, -1 where
    it has no adapter; ``lists`` (max_tiles, list_width) how many slots a tile's tokens have, each of them once,
    and -2 behind them.
    """

    def __init__(self, limits: AdapterLimits) -> None:
        max_tokens = limits.max_num_tokens
        num_tiles = max(-(-max_tokens // _MAX_TILE_ROWS), -(-min(max_tokens, _MAX_MIXED_TOKENS) // _MIXED_TILE_ROWS))
        shape = num_tiles, 1 + min(limits.num_slots, _MAX_TILE_ROWS)
        self._packed = torch.zeros(shape[0] * shape[1] + max_tokens, dtype=torch.int32, device=limits.device)
        lists, self.token_slots = self._packed.split([shape[0] * shape[1], max_tokens])
        self.lists = lists.view(shape)
        self.has_appended_rows = False
        """Whether a layer's A lies behind its weight."""
        self.rows = _MAX_TILE_ROWS
        """Tokens of a tile."""
        self.is_mixed = False
        """Whether tiles are small because their tokens may have many slots."""
        self.num_slots = limits.num_slots
        """The step's slots are of the first so many."""

    def update(self, token_slots: NDArray[np.int32], num_slots: int) -> None:
        """For a step whose tokens have these slots, of the first ``num_slots``."""
        self.num_slots = num_slots
        num_tokens = len(token_slots)
        self.is_mixed = num_slots > FEW_SLOTS and num_tokens <= _MAX_MIXED_TOKENS
        most = _MIXED_TILE_ROWS if self.is_mixed else _MAX_TILE_ROWS
        self.rows = next(rows for rows in _TILE_ROWS if num_tokens <= rows or rows == most)
        host = np.zeros(self.lists.numel() + num_tokens, np.int32)
        host[self.lists.numel() :] = token_slots
        lists = host[: self.lists.numel()].reshape(self.lists.shape)
        lists[:] = -2
        tokens = np.flatnonzero(token_slots >= 0)
        tiles, slots = np.divmod(np.unique(tokens // self.rows * num_slots + token_slots[tokens]), num_slots)
        lists[:, 0] = counts = np.bincount(tiles, minlength=len(lists))
        lists[tiles, 1 + np.arange(len(tiles)) - (counts.cumsum() - counts)[tiles]] = slots
        self._packed[: len(host)] = copy_to_device(host, torch.int32, self._packed.device)


class AdapterBatch:
    """The tokens of a step that have an adapter, sorted by slot, and cut into segments of one slot each.

    Device tensors are int32 and stay where they are: ``segments`` (3, max_segments) has the slot, the first sorted
    token and the number of tokens of each segment, ``token_indices`` (max_num_tokens,) the sorted tokens,
    ``slots`` (MAX_FEW_TOKENS,) the slot of each token in the order of the step, -1 where it has none,
    ``active_slots`` (1 + MAX_FEW_TOKENS,) how many slots these have and each of them once, ``num_live`` (1,) the
    segments that are not empty.
    """

    def __init__(self, limits: AdapterLimits) -> None:
        self._limits = limits
        max_tokens = limits.max_num_tokens
        largest = (max_tokens, min(max_tokens, _SHORT_SEGMENT_TOKENS))  # of each length of segments
        self._max_segments = max(self._choose_shape(num_tokens).num_segments for num_tokens in largest)
        sizes = [3 * self._max_segments, MAX_FEW_TOKENS, 1 + MAX_FEW_TOKENS, 1, max_tokens]
        self._starts = list(accumulate(sizes[:-1]))
        self._packed = torch.zeros(sum(sizes), dtype=torch.int32, device=limits.device)  # so that one copy brings all
        segments, self.slots, self.active_slots, self.num_live, self.token_indices = self._packed.split(sizes)
        self.segments = segments.view(3, -1)
        self.words = torch.zeros(_MAX_WORDS, dtype=torch.int64, device=limits.device)
        """What programs of a layer's kernel hand to each other: one launch follows another, so layers share it."""
        self._numbers = torch.arange(1, 1 + _MAX_LAYERS, dtype=torch.int32, device=limits.device)[:, None].repeat(1, 4)
        self._last_layer, self._is_described = _MAX_LAYERS, False
        self.tiles = TokenTiles(limits)
        self.shape = SegmentShape(0, 0, 16)
        self.single_slot: int | None = None
        """The slot of every token of the step, where that is one and the step is not captured."""
        self._sorted = np.zeros(0, np.int64)
        self._slots = np.zeros(0, np.int32)  # of the sorted tokens

    def update(self, token_slots: NDArray[np.int32], *, is_captured: bool) -> None:
        """Sort the tokens of a step: ``token_slots`` (num_tokens,) is the slot of each, -1 where it has no adapter."""
        num_tokens = len(token_slots)
        self._last_layer = _MAX_LAYERS
        has_adapter = np.flatnonzero(token_slots >= 0)
        slots = token_slots[has_adapter]
        self.single_slot = None
        if not is_captured and len(has_adapter) == num_tokens and (slots == slots[0]).all():
            self.single_slot = int(slots[0])
            return
        order = np.argsort(slots, kind="stable")
        self._sorted, self._slots = has_adapter[order], slots[order]
        self.shape = shape = self._choose_shape(num_tokens)
        counts = np.bincount(slots, minlength=self._limits.num_slots)
        segments_of_slot = -(-counts // shape.max_rows)
        num_segments = int(segments_of_slot.sum())
        if not is_captured:
            self.shape = shape = SegmentShape(num_tokens, num_segments, shape.max_rows)
        host = np.zeros(len(self._packed) - self._limits.max_num_tokens + num_tokens, np.int32)
        segments = host[: 3 * self._max_segments].reshape(3, -1)[:, :num_segments]
        segments[0] = segment_slots = np.repeat(np.arange(len(counts)), segments_of_slot)
        first_of_slot = (segments_of_slot.cumsum() - segments_of_slot)[segment_slots]
        offsets = (np.arange(num_segments) - first_of_slot) * shape.max_rows  # within the slot's tokens
        segments[1] = (counts.cumsum() - counts)[segment_slots] + offsets
        segments[2] = np.minimum(counts[segment_slots] - offsets, shape.max_rows)
        _, slots_of_tokens, active_slots, num_live, token_indices = np.split(host, self._starts)
        num_live[:] = num_segments
        few = token_slots[:MAX_FEW_TOKENS]
        slots_of_tokens[: len(few)] = few
        active = np.flatnonzero(counts)[:MAX_FEW_TOKENS]
        active_slots[: 1 + len(active)] = len(active), *active
        token_indices[: len(order)] = self._sorted
        self._packed[: len(host)] = copy_to_device(host, torch.int32, self._packed.device)

    def begin_layer(self, layer: int) -> None:
        """The ``layer``-th layer's product is launched next. Layers whose numbers rise are of one forward pass; others,
        and the first after ``update``, begin the next one, and so does a layer that was described already."""
        if layer < self._last_layer or (layer == self._last_layer and self._is_described):
            self._numbers.add_(_MAX_LAYERS)  # where a pass is captured this is, too: it has new numbers when replayed
        self._last_layer, self._is_described = layer, False

    def describe_shrink(self, a: Tensor, layer: int, max_polls: int = _MAX_POLLS) -> ShrinkInProduct:
        """The step's first product with ``a`` (slots, parts, max_rank, in_features), for a kernel of the ``layer``-th
        layer that is launched now; ``begin_layer`` was called before its product."""
        self._is_described = True
        return ShrinkInProduct(
            a,
            self.words,
            self._numbers[layer, :1],
            self.segments,
            self.num_live,
            self.token_indices,
            self.active_slots,
            max_polls,
        )

    def iter_slots(self) -> Iterator[tuple[int, Tensor]]:
        """Each slot and its tokens' indices, for the CPU."""
        for slot in np.unique(self._slots):
            yield int(slot), torch.from_numpy(self._sorted[self._slots == slot])

    def _choose_shape(self, num_tokens: int) -> SegmentShape:
        """The most segments: all are full but the last of each slot, and none is empty."""
        max_rows = 16 if num_tokens <= _SHORT_SEGMENT_TOKENS else 64
        most = num_tokens // max_rows + min(self._limits.num_slots, num_tokens)
        return SegmentShape(num_tokens, min(most, num_tokens), max_rows)
