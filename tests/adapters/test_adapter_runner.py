"""Adapters are staged in a thread and copied in parts between steps; a step uses what was loaded before it, whole."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from quire.core.contracts.adapter import AdapterLimits
from quire.core.errors import CheckpointError, InvalidRequestError
from quire.core.layers import LayerBuilder
from quire.core.layers.adapters import ModelAdapters
from quire.core.messages import NewRequest, SchedulerOutput
from quire.core.sampling_params import SamplingParams
from quire.core.worker.adapter_runner import AdapterRunner, CopyLimits
from quire.plugins.adapters.lora.method import Lora
from quire.plugins.quant.none import Unquantized

CPU = torch.device("cpu")
SHAPES = {f"layers.{layer}.q": (16, 32) for layer in range(6)}


class Gate(Lora):
    """Reads when it is told to."""

    opened = threading.Event()

    @classmethod
    def read_adapter(cls, path, **arguments):
        assert cls.opened.wait(60)
        return super().read_adapter(path, **arguments)


class Rig:
    """A runner with three slots, over six layers."""

    def __init__(self, folder: Path, limits: CopyLimits | None, method: type[Lora] = Lora) -> None:
        self.folder = folder
        self.method = method(AdapterLimits(3, 16, 32, torch.float32, CPU))
        self.adapters = ModelAdapters(self.method)
        builder = LayerBuilder(torch.float32, CPU, torch.float32, 4, Unquantized({}), adapters=self.adapters)
        for name, (outputs, inputs) in SHAPES.items():
            builder.make_column_parallel_linear(name, inputs, {name: outputs})
        self.runner = AdapterRunner(self.adapters, 8, CPU, limits)

    def stage(self, adapter_id: int) -> dict[str, torch.Tensor]:
        """What the adapter adds to each weight."""
        path = self.folder / str(adapter_id)
        deltas = Lora.save_example_adapter(path, SHAPES, adapter_id)
        assert not self.runner.stage_adapter(adapter_id, str(path))
        while not self.runner.stage_adapter(adapter_id, str(path)):
            pass
        return deltas

    def read_slot(self, slot: int, layer: int) -> torch.Tensor:
        """What the slot adds to a layer's weight."""
        self.method.prepare_metadata(np.full(32, slot, np.int32))
        out = torch.zeros(32, 16)
        self.adapters.layers[f"layers.{layer}.q"].apply(torch.eye(32), out)
        return out.T

    def count_layers(self, slot: int, deltas: dict[str, torch.Tensor]) -> int:
        """In how many the slot holds the adapter, from the first on."""
        is_there = [torch.allclose(self.read_slot(slot, i), deltas[name], atol=1e-5) for i, name in enumerate(SHAPES)]
        assert is_there == sorted(is_there, reverse=True), "copied out of order"
        return sum(is_there)

    def run_step(self, slots: dict[int, int], *, enter: bool = True) -> None:
        """A step of these rows, one token each; they enter with these slots."""
        rows = np.array(list(slots), np.int32)
        new = [NewRequest(row, row, [1], 1, 0, SamplingParams(), 0, adapter_slot=slot) for row, slot in slots.items()]
        ones = np.ones(len(rows), np.int32)
        self.runner.begin_step(
            SchedulerOutput(0, rows, ones, ones.astype(bool), 0, len(rows), 1, ones, new if enter else [])
        )


def test_a_load_is_spread_over_steps(tmp_path: Path) -> None:
    rig = Rig(tmp_path, CopyLimits(num_tensors=6))
    first, second = rig.stage(1), rig.stage(2)
    assert not rig.runner.load_adapter(0, 1)
    assert rig.count_layers(0, first) == 0
    progress = []
    for _ in range(3):  # 18 tensors; to ask queues nothing where steps do
        rig.run_step({3: -1})
        progress.append(rig.count_layers(0, first))
        assert rig.runner.load_adapter(0, 1) == (len(progress) == 3)
    assert progress == [2, 4, 6]
    assert not rig.runner.load_adapter(1, 2)
    rig.run_step({4: 0})  # another slot: nothing waits
    assert 0 < rig.count_layers(1, second) < 6
    rig.run_step({5: 1})  # the slot itself: the rest comes first
    assert rig.count_layers(1, second) == 6 and rig.count_layers(0, first) == 6


def test_a_load_ends_where_no_step_runs(tmp_path: Path) -> None:
    rig = Rig(tmp_path, CopyLimits(num_tensors=6))
    deltas = rig.stage(1)
    assert [rig.runner.load_adapter(0, 1) for _ in range(4)] == [False, False, False, True]
    assert rig.count_layers(0, deltas) == 6


def test_bytes_bound_what_a_step_copies(tmp_path: Path) -> None:
    rig = Rig(tmp_path, CopyLimits(num_bytes=1))
    deltas = rig.stage(1)
    rig.runner.load_adapter(0, 1)
    rig.run_step({0: -1})
    assert rig.count_layers(0, deltas) == 0  # one tensor of its first layer
    rig.run_step({1: 0})
    assert rig.count_layers(0, deltas) == 6


def test_another_adapter_takes_a_slot_and_nothing_of_the_first_stays(tmp_path: Path) -> None:
    rig = Rig(tmp_path, CopyLimits(num_tensors=6))
    first, second = rig.stage(3), rig.stage(2)  # of rank 5, then 3
    rig.runner.load_adapter(0, 3)
    rig.run_step({0: 0})
    assert rig.count_layers(0, first) == 6
    rig.runner.load_adapter(0, 2)
    rig.run_step({0: -1})
    rig.runner.load_adapter(0, 3)  # before the other is whole
    rig.runner.unload_adapter(0)
    assert all(not rig.read_slot(0, layer).any() for layer in range(6))
    rig.runner.load_adapter(0, 2)
    rig.run_step({0: 0}, enter=True)
    assert rig.count_layers(0, second) == 6


def test_an_adapter_is_forgotten_and_its_slots_keep_it(tmp_path: Path) -> None:
    rig = Rig(tmp_path, None)
    deltas = rig.stage(1)
    assert rig.runner.load_adapter(2, 1)
    rig.runner.forget_adapter(1)
    rig.runner.forget_adapter(1)
    assert rig.count_layers(2, deltas) == 6
    with pytest.raises(InvalidRequestError, match="adapter 1 is not staged"):
        rig.runner.load_adapter(0, 1)


def test_rows_keep_the_slot_they_entered_with(tmp_path: Path) -> None:
    rig = Rig(tmp_path, None)
    rig.run_step({0: 1, 1: -1, 2: 0})
    assert rig.runner.is_active
    rig.run_step({1: -1}, enter=False)
    assert not rig.runner.is_active
    rig.run_step({0: -1, 2: -1}, enter=False)  # they do not enter
    assert rig.runner.is_active
    rig.run_step({0: -1})
    assert not rig.runner.is_active


def test_staging_does_not_wait_and_loading_does(tmp_path: Path) -> None:
    Gate.opened.clear()
    rig = Rig(tmp_path, None, Gate)
    deltas = Lora.save_example_adapter(tmp_path / "1", SHAPES, 1)
    assert not rig.runner.stage_adapter(1, str(tmp_path / "1"))
    assert not rig.runner.stage_adapter(1, str(tmp_path / "1"))
    threading.Timer(0.05, Gate.opened.set).start()
    assert rig.runner.load_adapter(0, 1)
    assert rig.count_layers(0, deltas) == 6


def test_what_cannot_be_read_is_said_in_one_line(tmp_path: Path) -> None:
    rig = Rig(tmp_path, None)
    Lora.save_example_adapter(tmp_path / "other", {"layers.9.q": (16, 32)}, 1)
    for path, reason in (("none", "none"), ("other", r"layers\.9\.q")):
        rig.runner.stage_adapter(7, str(tmp_path / path))
        with pytest.raises(CheckpointError, match=reason) as raised:
            while not rig.runner.stage_adapter(7, str(tmp_path / path)):
                pass
        assert "\n" not in str(raised.value)
    rig.stage(7)  # the number is free again
    assert rig.runner.load_adapter(0, 7)
    with pytest.raises(InvalidRequestError, match="slot 3 is none of the 3"):
        rig.runner.load_adapter(3, 7)
    with pytest.raises(InvalidRequestError, match="slot -1"):
        rig.runner.unload_adapter(-1)


def test_files_that_changed_are_refused(tmp_path: Path) -> None:
    rig = Rig(tmp_path, None)
    Lora.save_example_adapter(tmp_path / "a", SHAPES, 1)
    rig.runner.stage_adapter(1, str(tmp_path / "a"), content_hash="0" * 32)
    with pytest.raises(CheckpointError, match="changed"):
        while not rig.runner.stage_adapter(1, str(tmp_path / "a")):
            pass
