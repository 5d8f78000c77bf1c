"""How the Triton decode splits a request: parts that grow, an ordered merge, nothing learnt from the neighbours."""

from __future__ import annotations

import pytest
import torch

from quire.core.testing.attention_problem import Problem, attend, compare, make_spec
from quire.plugins.attention.triton import decode
from quire.plugins.attention.triton.backend import TritonBackend

pytestmark = pytest.mark.skipif(
    bool(TritonBackend.unsupported(make_spec(), torch.device("cuda" if torch.cuda.is_available() else "cpu"))),
    reason="neither a GPU nor TRITON_INTERPRET=1",
)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "SPLIT", 32)
    monkeypatch.setattr(decode, "MAX_SPLITS", 3)


def test_parts_grow_when_there_are_no_more(small_parts: None) -> None:
    """Lengths of 1, 3, 4 and 7 times the smallest part, on at most three parts."""
    compare(TritonBackend, make_spec(), [(1, 32), (1, 96), (1, 97), (1, 210), (1, 1)], lse=True)
    compare(TritonBackend, make_spec(kind="sliding", window=130), [(1, 210), (1, 150), (1, 20)], lse=True)


def test_neighbours_change_no_bit(small_parts: None) -> None:
    spec = make_spec()
    requests = [(1, 140), (1, 20), (9, 70)]
    together = Problem.random(spec, requests)
    outs = attend(TritonBackend, spec, together)[0].split([1, 1, 9])
    for i, start in enumerate((0, 1, 2)):
        alone = Problem(
            spec=spec,
            requests=[requests[i]],
            num_decodes=int(requests[i][0] == 1),
            q=together.q[start : start + requests[i][0]],
            keys=[together.keys[i]],
            values=[together.values[i]],
            table=together.table[i : i + 1],
        )
        assert torch.equal(attend(TritonBackend, spec, alone)[0], outs[i])


def test_refusals_name_the_reason() -> None:
    cpu = torch.device("cpu")
    assert "attention sinks" in TritonBackend.unsupported(make_spec(sinks=True), cpu)
    assert any("bfloat16" in reason for reason in TritonBackend.unsupported(make_spec(dtype=torch.bfloat16), cpu))
    wide = make_spec(qk_head_dim=512, v_head_dim=512)
    assert any("512 features" in reason for reason in TritonBackend.unsupported(wide, cpu))


def test_a_cpu_is_refused_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert TritonBackend.unsupported(make_spec(), torch.device("cpu")) == [
        "a CPU (set TRITON_INTERPRET=1 to run kernels in the interpreter)"
    ]
