"""The exchange of a row-parallel layer is left to the norm that follows, which may do it in its own kernel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.models.paged import PagedRunner, load
from torch import Tensor

from quire.core.contracts.model import AuxHiddenStates
from quire.core.layers.parallel import NormedSum, TensorParallel
from quire.core.ops.norm import rms_norm_quantized
from quire.core.testing.thread_ranks import ThreadRank, run_on_ranks
from quire.core.testing.tiny_models import make_tiny_model

PROMPT = torch.randint(0, 256, (20,), generator=torch.Generator().manual_seed(0)).tolist()


class FusingRank(ThreadRank):
    """Offers one operation for the exchange and the norm, and counts which are asked for."""

    def __init__(self, parallel: TensorParallel, counts: dict[str, int]) -> None:
        assert isinstance(parallel, ThreadRank)
        super().__init__(parallel.rank, parallel.size, parallel.rank_group)
        object.__setattr__(self, "counts", counts)

    def all_reduce(self, x: Tensor) -> Tensor:
        self.counts["all_reduce"] = self.counts.get("all_reduce", 0) + 1
        return super().all_reduce(x)

    def all_reduce_add_norm(self, part, residual, weight, eps, output_format) -> NormedSum:
        self.counts["fused"] = self.counts.get("fused", 0) + 1
        normed, stream = rms_norm_quantized(self.stack(part).sum(0), weight, eps, residual, output_format)
        return NormedSum(normed, stream)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=3)


def run_fused(path: Path, counts: dict[str, int], states: dict[int, Tensor] | None = None) -> list[Tensor]:
    def run(parallel: TensorParallel) -> Tensor:
        model = load(path, parallel=FusingRank(parallel, counts if parallel.rank == 0 else {}))
        if states is not None:
            states[parallel.rank] = torch.zeros(len(PROMPT), 64)
            model.aux_hidden_states = AuxHiddenStates((2,), states[parallel.rank])
        return PagedRunner(model, 1).step({0: PROMPT})[0]

    return run_on_ranks(2, run)


def test_every_norm_takes_the_exchange_before_it(llama: Path) -> None:
    """Two a layer, the last of them in the norm before the head; the embedding's exchange has no norm with a
    residual."""
    counts: dict[str, int] = {}
    expected = PagedRunner(load(llama), 1).step({0: PROMPT})[0]
    for logits in run_fused(llama, counts):
        torch.testing.assert_close(logits, expected, atol=5e-5, rtol=0)
    assert counts == {"fused": 6, "all_reduce": 1}


def test_hidden_states_for_a_proposer_are_whole(llama: Path) -> None:
    """A layer whose input is captured takes the exchange as a step of its own."""
    counts: dict[str, int] = {}
    states: dict[int, Tensor] = {}
    whole = load(llama)
    whole.aux_hidden_states = AuxHiddenStates((2,), torch.zeros(len(PROMPT), 64))
    expected = PagedRunner(whole, 1).step({0: PROMPT})[0]
    for logits in run_fused(llama, counts, states):
        torch.testing.assert_close(logits, expected, atol=5e-5, rtol=0)
    for captured in states.values():
        torch.testing.assert_close(captured, whole.aux_hidden_states.states, atol=5e-5, rtol=0)
    assert counts == {"fused": 5, "all_reduce": 2}


def test_a_layer_with_a_bias_exchanges_by_itself(tmp_path: Path) -> None:
    """The bias belongs to the sum, and comes after it."""
    path, counts = make_tiny_model("llama", tmp_path, attention_bias=True, mlp_bias=True), {}
    expected = PagedRunner(load(path), 1).step({0: PROMPT})[0]
    for logits in run_fused(path, counts):
        torch.testing.assert_close(logits, expected, atol=5e-5, rtol=0)
    assert counts == {"all_reduce": 5}
