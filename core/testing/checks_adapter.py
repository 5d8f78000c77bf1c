"""What every adapter method must keep: each token gets its own adapter's part of a layer's output, and no other's.

They run on the CPU: kernels of a method need tests of their own beside their CPU form.
"""

from __future__ import annotations

import tempfile
import unittest
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quire.core.contracts.adapter import AdapterLayer, AdapterLimits, AdapterMethod
from quire.core.contracts.quant import LayerInfo
from quire.core.errors import CheckpointError
from quire.core.loading.peft_adapter import compute_content_hash
from quire.core.plugin.options import parse_options
from quire.core.testing.capture_rules import assert_can_be_captured

__all__ = [
    "check_a_captured_step_can_be_captured",
    "check_a_captured_step_computes_the_same",
    "check_a_cleared_slot_adds_nothing",
    "check_a_missing_folder_is_refused",
    "check_a_token_does_not_depend_on_others",
    "check_an_adapter_has_changed_or_is_read",
    "check_an_adapter_is_that_of_its_weights",
    "check_modules_left_alone_get_nothing",
    "check_other_modules_are_refused_by_name",
    "check_rows_without_an_adapter_keep_their_bits",
    "check_shards_make_up_the_whole",
    "check_slots_hold_other_adapters",
    "check_tensors_fit_their_slot",
]

_CPU = torch.device("cpu")
_INPUTS, _PARTS, _NUM_SLOTS, _MAX_TOKENS = 32, (24, 8, 8), 3, 64
_QKV = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj")
_OUT = "model.layers.0.self_attn.o_proj"
_SHAPES = {**{name: (size, _INPUTS) for name, size in zip(_QKV, _PARTS, strict=True)}, _OUT: (40, _INPUTS)}


def check_a_missing_folder_is_refused(cls: type[AdapterMethod]) -> None:
    """``read_adapter`` raises ``CheckpointError`` of one line for a folder that is not there, or empty."""
    with tempfile.TemporaryDirectory(prefix="quire-check-") as folder:
        for path in (Path(folder), Path(folder, "none")):
            _assert_refused(cls, path, _SHAPES, str(path))


def check_other_modules_are_refused_by_name(cls: type[AdapterMethod]) -> None:
    """An adapter with a module that is none of ``module_shapes`` is refused with its name, and so is one of another
    shape."""
    with tempfile.TemporaryDirectory(prefix="quire-check-") as name:
        path = Path(name, "adapter")
        _save(cls, path, {**_SHAPES, "model.layers.7.mlp.down_proj": (40, _INPUTS)})
        _assert_refused(cls, path, _SHAPES, "model.layers.7.mlp.down_proj")
        _assert_refused(cls, path, {**_SHAPES, "model.layers.7.mlp.down_proj": (48, _INPUTS)}, "down_proj")


def check_an_adapter_has_changed_or_is_read(cls: type[AdapterMethod]) -> None:
    """The engine can take the hash of an adapter's files, and ``read_adapter`` refuses those of another hash."""
    with tempfile.TemporaryDirectory(prefix="quire-check-") as name:
        path = Path(name, "adapter")
        _save(cls, path, _SHAPES)
        content_hash = compute_content_hash(path)
        read = partial(cls.read_adapter, path, max_rank=16, module_shapes=_SHAPES, dtype=torch.float32)
        read(content_hash=content_hash)
        try:
            read(content_hash=content_hash[::-1])
        except CheckpointError as error:
            assert str(path) in str(error), f"the error does not name {path}: {error}"
        else:
            raise AssertionError("read an adapter whose files have another hash than when it was registered")


def check_an_adapter_is_that_of_its_weights(cls: type[AdapterMethod]) -> None:
    """What a layer adds is its input times what the adapter adds to its weights: for fused layers, for one token, for
    many, and where all have one adapter."""
    example = _Example(cls)
    for slots in ([0], [0, 0, 0], [0, -1, 1], [-1, 2] * 20 + [0] * 9):
        example.assert_adds(slots)


def check_rows_without_an_adapter_keep_their_bits(cls: type[AdapterMethod]) -> None:
    """Not even a rounding changes them."""
    example, slots = _Example(cls), [0, -1, 1, -1, -1, 2]
    x, out = example.make_rows(len(slots))
    added = example.apply(slots, x, out)
    base = torch.tensor(slots) < 0
    for name, rows in added.items():
        assert torch.equal(rows[base], out[name][base]), f"{name}: rows without an adapter have changed"


def check_modules_left_alone_get_nothing(cls: type[AdapterMethod]) -> None:
    """An adapter of some of a fused layer's parts changes nothing of the others, nor of other layers."""
    example = _Example(cls, [_SHAPES, {_QKV[1]: _SHAPES[_QKV[1]]}, {_OUT: _SHAPES[_OUT]}])
    example.assert_adds([1, 2, 0, 1, -1, 2])


def check_slots_hold_other_adapters(cls: type[AdapterMethod]) -> None:
    """An adapter that takes a slot replaces what was there, of another rank and other modules too, and changes no other
    slot; what it was copied from may change afterwards."""
    example = _Example(cls)
    for seed, shapes in enumerate((_SHAPES, {_QKV[0]: _SHAPES[_QKV[0]]}, _SHAPES, _SHAPES, {_OUT: _SHAPES[_OUT]})):
        example.load(1, shapes, seed)
        example.assert_adds([0, 1, 1, 2, -1])


def check_a_cleared_slot_adds_nothing(cls: type[AdapterMethod]) -> None:
    """After ``clear_slot`` a slot is as at the beginning, and the others are as before."""
    example = _Example(cls)
    example.method.clear_slot(1)
    example.deltas[1] = {}
    example.assert_adds([1, 0, 2, 1])
    slots = [1, 1]
    x, out = example.make_rows(2)
    for name, rows in example.apply(slots, x, out).items():
        assert torch.equal(rows, out[name]), f"{name}: a slot that was cleared changes rows"


def check_a_token_does_not_depend_on_others(cls: type[AdapterMethod]) -> None:
    """A token has the same result alone, among tokens of other adapters, and in any order."""
    example, slots = _Example(cls), [0, 1, 2, 1, -1, 0, 0]
    x, out = example.make_rows(len(slots))
    together = example.apply(slots, x, out)
    order = [5, 2, 0, 6, 3, 1, 4]
    moved = example.apply([slots[i] for i in order], x[order], {name: rows[order] for name, rows in out.items()})
    for name, rows in together.items():
        _close(moved[name], rows[order], f"{name} in another order")
        for i, slot in enumerate(slots):
            alone = example.apply([slot], x[i : i + 1], {n: r[i : i + 1] for n, r in out.items()})
            _close(alone[name], rows[i : i + 1], f"{name} of a token alone")


def check_a_captured_step_computes_the_same(cls: type[AdapterMethod]) -> None:
    """``is_captured`` with padding tokens gives what the step gives without, for any slots, and slots stay in the same
    memory when an adapter is loaded."""
    example = _Example(cls)
    addresses = [buffer.data_ptr() for buffer in example.list_buffers(1)]
    for slots in ([0, 1, 2, -1], [1, 1, 1, 1], [-1, -1, -1, -1]):
        padded = [*slots, -1, -1]
        example.assert_adds(padded, is_captured=True)
    example.load(1, _SHAPES, seed=20)
    assert [buffer.data_ptr() for buffer in example.list_buffers(1)] == addresses, "a slot has moved"
    example.assert_adds([1, 0, 1, -1], is_captured=True)


def check_a_captured_step_can_be_captured(cls: type[AdapterMethod]) -> None:
    """With ``is_captured`` layers call nothing that a CUDA graph cannot hold: no list as an index, no ``item``. Where
    the code asks for a device, what runs on a CPU says nothing about that."""
    example, slots = _Example(cls), [0, 1, 2, -1, -1]
    x, out = example.make_rows(len(slots))
    example.method.prepare_metadata(np.array(slots, np.int32), is_captured=True)
    assert_can_be_captured(lambda: example.apply_layers(x, out))


def check_tensors_fit_their_slot(cls: type[AdapterMethod]) -> None:
    """``make_tensors`` gives a tensor or None for each of ``slot_buffers``, on the CPU, of its dtype, and no longer;
    buffers of two slots do not overlap."""
    example = _Example(cls)
    for shapes in (_SHAPES, {_QKV[2]: _SHAPES[_QKV[2]]}):
        adapter, _ = _read(cls, shapes, 3)
        for owner in example.owners:
            buffers, tensors = owner.slot_buffers(0), owner.make_tensors(adapter)
            assert len(buffers) == len(tensors), f"{len(tensors)} tensors for {len(buffers)} buffers"
            for buffer, tensor in zip(buffers, tensors, strict=True):
                assert buffer.is_contiguous(), "a buffer is not dense"
                if tensor is not None:
                    assert tensor.device == _CPU and tensor.dtype == buffer.dtype, f"{tensor.dtype}, {tensor.device}"
                    fits = tensor.shape[1:] == buffer.shape[1:] and len(tensor) <= len(buffer)
                    assert fits, f"{tuple(tensor.shape)} does not fit into {tuple(buffer.shape)}"
    spans = sorted(
        (buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes)
        for slot in range(_NUM_SLOTS)
        for buffer in example.list_buffers(slot)
    )
    assert all(end <= start for (_, end), (start, _) in pairwise(spans)), "slots overlap"


def check_shards_make_up_the_whole(cls: type[AdapterMethod]) -> None:
    """Two ranks' columns side by side, or two ranks' rows added up, are what one rank computes."""
    slots = [0, 1, -1, 2, 0]
    whole, ranks = _Example(cls), [_Example(cls, rank=rank, world_size=2) for rank in range(2)]
    x, out = whole.make_rows(len(slots))
    zeros = {name: torch.zeros_like(rows) for name, rows in out.items()}
    expected = whole.apply(slots, x, zeros)
    halves = [
        each.apply(slots, x, {n: torch.zeros(len(slots), i.out_features) for n, i in each.infos.items()})
        for each in ranks
    ]
    sizes = [size // 2 for size in _PARTS]
    parts = [half["qkv_proj"].split(sizes, 1) for half in halves]
    side_by_side = torch.cat([torch.cat([a, b], 1) for a, b in zip(*parts, strict=True)], 1)
    _close(side_by_side, expected["qkv_proj"], "columns of two ranks")
    _close(halves[0]["o_proj"] + halves[1]["o_proj"], expected["o_proj"], "rows of two ranks")


class _Example:
    """A method with a fused column-sharded and a row-sharded layer, and an adapter in each of three slots."""

    def __init__(
        self,
        cls: type[AdapterMethod],
        shapes: Sequence[Mapping[str, tuple[int, int]]] = (_SHAPES, _SHAPES, _SHAPES),
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._class = cls
        limits = AdapterLimits(_NUM_SLOTS, 16, _MAX_TOKENS, torch.float32, _CPU)
        self.method = cls(limits, parse_options(cls, {}))
        self._rank = rank
        sizes = tuple(size // world_size for size in _PARTS)
        self.infos = {
            "qkv_proj": LayerInfo(
                "model.layers.0.self_attn.qkv_proj", "linear", _INPUTS, sum(sizes), _QKV, sizes, _PARTS, _INPUTS,
                "column", torch.float32, False,
            ),
            "o_proj": LayerInfo(
                _OUT, "linear", _INPUTS // world_size, 40, (_OUT,), (40,), (40,), _INPUTS, "row", torch.float32, False
            ),
        }  # fmt: skip
        self.layers: dict[str, AdapterLayer] = {
            name: self.method.make_layer(info, rank, world_size) for name, info in self.infos.items()
        }
        self.owners: list[AdapterMethod | AdapterLayer] = [self.method, *self.layers.values()]
        self.deltas: list[Mapping[str, Tensor]] = [{} for _ in shapes]
        for slot, of_slot in enumerate(shapes):
            self.load(slot, of_slot, seed=slot)

    def load(self, slot: int, shapes: Mapping[str, tuple[int, int]], seed: int) -> None:
        """As the engine does: clear the slot, then copy."""
        adapter, self.deltas[slot] = _read(self._class, shapes, seed)
        self.method.clear_slot(slot)
        for owner in self.owners:
            for buffer, tensor in zip(owner.slot_buffers(slot), owner.make_tensors(adapter), strict=True):
                if tensor is not None:
                    buffer[: len(tensor)].copy_(tensor)
                    tensor.fill_(-1)  # the host's copy may be freed

    def list_buffers(self, slot: int) -> list[Tensor]:
        """Everything that a slot holds."""
        return [buffer for owner in self.owners for buffer in owner.slot_buffers(slot)]

    def make_rows(self, num_tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
        """An input for both layers, and an output of each."""
        generator = torch.Generator().manual_seed(num_tokens)
        x = torch.randn(num_tokens, _INPUTS, generator=generator)
        return x, {n: torch.randn(num_tokens, i.out_features, generator=generator) for n, i in self.infos.items()}

    def apply(
        self, slots: Sequence[int], x: Tensor, out: Mapping[str, Tensor], *, is_captured: bool = False
    ) -> dict[str, Tensor]:
        """What the layers make of ``out`` for tokens of these slots."""
        self.method.prepare_metadata(np.array(slots, np.int32), is_captured=is_captured)
        return self.apply_layers(x, out)

    def apply_layers(self, x: Tensor, out: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same for the tokens that were prepared last."""
        self.method.is_active = True
        changed = {name: rows.clone() for name, rows in out.items()}
        for name, layer in self.layers.items():
            width = self.infos[name].in_features
            layer.apply(x[:, self._rank * width :][:, :width].contiguous() if name == "o_proj" else x, changed[name])
        return changed

    def assert_adds(self, slots: Sequence[int], *, is_captured: bool = False) -> None:
        """The layers add what the weights of each token's adapter add."""
        x, out = self.make_rows(len(slots))
        for name, rows in self.apply(slots, x, out, is_captured=is_captured).items():
            expected = out[name].clone()
            for token, slot in enumerate(slots):
                at = 0
                for part, size in zip(self.infos[name].part_names, self.infos[name].part_sizes, strict=True):
                    if slot >= 0 and part in self.deltas[slot]:
                        expected[token, at : at + size] += self.deltas[slot][part] @ x[token]
                    at += size
            _close(rows, expected, f"{name} of slots {list(slots)[:8]}")


def _save(cls: type[AdapterMethod], path: Path, shapes: Mapping[str, tuple[int, int]], seed: int = 0) -> Any:
    try:
        return cls.save_example_adapter(path, shapes, seed)
    except NotImplementedError:
        raise unittest.SkipTest("save_example_adapter saves nothing to try it with") from None


def _read(cls: type[AdapterMethod], shapes: Mapping[str, tuple[int, int]], seed: int) -> tuple[Any, dict[str, Tensor]]:
    """An adapter, and what it adds to each module's weight."""
    with tempfile.TemporaryDirectory(prefix="quire-check-") as name:
        deltas = _save(cls, Path(name, "adapter"), shapes, seed)
        assert deltas.keys() == shapes.keys(), f"save_example_adapter saved {sorted(deltas)}"
        dtype = torch.float32
        adapter = cls.read_adapter(Path(name, "adapter"), max_rank=16, module_shapes=_SHAPES, dtype=dtype)
    return adapter, {module: delta.float() for module, delta in deltas.items()}


def _assert_refused(cls: type[AdapterMethod], path: Path, shapes: Mapping[str, tuple[int, int]], expected: str) -> None:
    try:
        cls.read_adapter(path, max_rank=16, module_shapes=shapes, dtype=torch.float32)
    except CheckpointError as error:
        assert expected in str(error), f"the error does not name {expected}: {error}"
        assert "\n" not in str(error), "the error has several lines"
        return
    raise AssertionError(f"read an adapter that is none of this model's ({expected})")


def _close(got: Tensor, expected: Tensor, what: str) -> None:
    assert got.shape == expected.shape, f"{what}: got {tuple(got.shape)}"
    error = float((got - expected).norm() / expected.norm().clamp(min=1e-6))
    assert error < 1e-4, f"{what}: off by {error:.3g} of its size"
