"""An adapter method that fails harms the requests of the step or the adapter in which it does, and no others."""

from __future__ import annotations

from typing import ClassVar

import pytest
from tests.adapters.conftest import call_worker, load_adapters
from tests.adapters.test_engine import assert_right, make_prompts

from quire import SamplingParams
from quire.core.errors import QuireError, RequestFailedError
from quire.plugins.adapters.lora.method import Lora, LoraLayer

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


class Failing(Lora):
    """Raises where it is told to."""

    fail_in: ClassVar[str] = ""

    def prepare_metadata(self, token_slots, *, is_captured=False):
        if Failing.fail_in == "prepare_metadata":
            raise ArithmeticError("no metadata")
        super().prepare_metadata(token_slots, is_captured=is_captured)

    def make_layer(self, info, rank, world_size):
        layer = FailingLayer(info, self.limits, self._batch, rank, world_size)
        self._layers.append(layer)
        return layer


class FailingLayer(LoraLayer):
    def make_tensors(self, adapter):
        if Failing.fail_in == "make_tensors":
            raise ArithmeticError("no tensors")
        return super().make_tensors(adapter)

    def apply(self, x, out):
        if Failing.fail_in == "apply":
            raise ArithmeticError("no product")
        super().apply(x, out)


@pytest.fixture(scope="module")
def llm(make_llm, folders):
    engine = make_llm(adapter_method=f"{Failing.__module__}:{Failing.__qualname__}")
    load_adapters(engine, folders)
    return engine


@pytest.mark.parametrize("place", ["prepare_metadata", "apply"])
def test_requests_of_the_step_fail_and_later_ones_do_not(llm, references, monkeypatch, place: str) -> None:
    monkeypatch.setattr(Failing, "fail_in", place)
    with pytest.raises(RequestFailedError, match=r"failed in adapter/.*Failing"):
        llm.generate(make_prompts([0, -1], [9, 5]), GREEDY)
    base = llm.generate(make_prompts([-1, -1], [9, 5]), GREEDY)  # steps without adapters never call it
    assert_right(base, [-1, -1], references, GREEDY)
    monkeypatch.setattr(Failing, "fail_in", "")
    assert_right(llm.generate(make_prompts([1, -1, 3], [9, 5, 30]), GREEDY), [1, -1, 3], references, GREEDY)


def test_an_adapter_that_cannot_be_staged_is_refused_alone(llm, folders, references, monkeypatch) -> None:
    monkeypatch.setattr(Failing, "fail_in", "make_tensors")
    with pytest.raises(QuireError, match="no tensors"):
        while not call_worker(llm, "stage_adapter", adapter_id=99, path=str(folders[0])):
            pass
    monkeypatch.setattr(Failing, "fail_in", "")
    assert_right(llm.generate(make_prompts([0, 2], [9, 5]), GREEDY), [0, 2], references, GREEDY)
