"""A rank's share of a weight, and how to cut the stored tensors to it before anything of them is read or moved."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

__all__ = ["COLUMNS", "ROWS", "Axis", "CutPart", "Dimension", "Shard", "cut_to_shard"]

Dimension: TypeAlias = Literal["rows", "columns"]
"""Of a weight: its rows are outputs, its columns inputs."""


@dataclass(frozen=True, slots=True)
class Shard:
    """The rows and columns of one part's whole weight that belong to this rank."""

    first_row: int
    num_rows: int
    first_column: int
    num_columns: int
    rows: int
    """Rows that the layer keeps for the part: more than ``num_rows`` where a vocabulary is padded."""
    whole_shape: tuple[int, int]
    """Rows and columns of the weight that the tensors hold: the part's, or what they were cut to."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One dimension of a stored tensor: every ``entries`` of it belong to ``features`` rows or columns."""

    dimension: Dimension
    features: int = 1
    entries: int = 1


ROWS, COLUMNS = Axis("rows"), Axis("columns")


@dataclass(frozen=True, slots=True)
class CutPart:
    """A part's tensors, and this rank's share of the weight that they hold."""

    tensors: Mapping[str, Tensor]
    shard: Shard


def cut_to_shard(
    tensors: Mapping[str, Tensor],
    axes: Mapping[str, tuple[Axis | None, ...]],
    shard: Shard,
    dimensions: Collection[Dimension],
) -> CutPart:
    """Views of ``tensors`` with the smallest whole words, groups and blocks that hold the shard, along ``dimensions``.

    ``axes`` names each dimension of a tensor; None: it is not of the weight, and stays whole.
    """
    spans: dict[Dimension, tuple[int, int]] = {}
    wanted: tuple[tuple[Dimension, int, int, int], ...] = (
        ("rows", shard.first_row, shard.num_rows, shard.whole_shape[0]),
        ("columns", shard.first_column, shard.num_columns, shard.whole_shape[1]),
    )
    for dimension, first, count, total in wanted:
        if dimension not in dimensions:
            spans[dimension] = 0, total
            continue
        unit = math.lcm(*(a.features for each in axes.values() for a in each if a and a.dimension == dimension))
        if count == 0:  # of a padded vocabulary: something to read, none of which is kept
            first = 0
        spans[dimension] = first // unit * unit, min(total, -(-max(first + count, 1) // unit) * unit)
    cut = {}
    for name, tensor in tensors.items():
        for at, axis in enumerate(axes[name]):
            if axis is not None and axis.dimension in dimensions:
                start, stop = spans[axis.dimension]
                low, high = start // axis.features * axis.entries, -(-stop // axis.features) * axis.entries
                tensor = tensor[(slice(None),) * at + (slice(low, high),)]
        cut[name] = tensor
    (row, last_row), (column, last_column) = spans["rows"], spans["columns"]
    return CutPart(
        cut,
        Shard(
            first_row=shard.first_row - row if shard.num_rows else 0,
            num_rows=shard.num_rows,
            first_column=shard.first_column - column,
            num_columns=shard.num_columns,
            rows=shard.rows,
            whole_shape=(last_row - row, last_column - column),
        ),
    )
