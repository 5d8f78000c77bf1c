"""Drafts in the simulator: as many are right as was said, and the scheduler does with them what the engine does."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from quire.core.errors import ConfigError
from quire.plugins.kv.paged import PagedAllocator
from quire.plugins.sched.fcfs import FCFSPolicy
from quire.server.cli.main import main
from quire.server.simulate.drafts import SimulatedDrafts, measure_acceptance
from quire.server.simulate.replay import replay_recording
from quire.server.simulate.simulation import run_simulation
from quire.server.traces.recording import read_recording


def test_as_many_drafts_are_right_as_was_said():
    numbers, lengths = np.arange(20_000), np.arange(20_000) % 700
    accepted = SimulatedDrafts(4, 0.7).count_accepted(numbers, lengths, np.full(20_000, 4))
    expected = sum(0.7**k for k in range(1, 5))  # Leviathan et al. 2023, equation 1
    assert accepted.mean() == pytest.approx(expected, rel=0.02)
    again = SimulatedDrafts(4, 0.7).count_accepted(numbers[::-1], lengths[::-1], np.full(20_000, 4))
    assert (again[::-1] == accepted).all(), "what runs beside a request changes nothing"
    assert SimulatedDrafts(4, 1.0).count_accepted(numbers, lengths, numbers % 5).tolist() == (numbers % 5).tolist()
    assert not SimulatedDrafts(4, 0.0).count_accepted(numbers, lengths, numbers % 5).any()


@pytest.mark.parametrize("turns", [False, True])
def test_drafts_that_are_right_save_steps_and_change_no_answer(make_setup, make_trace, turns, tmp_path):
    trace = make_trace(60, rate=4.0, turns=turns)
    plain = run_simulation(trace, make_setup(skip=False))
    for acceptance, least, most in ((0.0, 0.9, 1.1), (0.95, 0.3, 0.7)):
        setup = dataclasses.replace(make_setup(), drafts=SimulatedDrafts(4, acceptance))
        drafted = run_simulation(trace, setup)
        assert drafted.times.output_len.tolist() == plain.times.output_len.tolist()
        assert least < drafted.num_steps / plain.num_steps < most
        assert run_simulation(trace, setup).times.e2e_s.tolist() == drafted.times.e2e_s.tolist()


def test_a_recording_tells_the_acceptance_and_is_replayed(make_setup, make_trace, tmp_path, capsys):
    setup = dataclasses.replace(make_setup(), drafts=SimulatedDrafts(3, 0.8))
    run_simulation(make_trace(60, rate=4.0), setup, record_to=tmp_path / "drafts.jsonl.zst")
    recording = read_recording(tmp_path / "drafts.jsonl.zst")
    assert measure_acceptance(recording) == pytest.approx(0.8, abs=0.03)
    assert all(
        isinstance(each, int) for each in replay_recording(recording, FCFSPolicy(), FCFSPolicy(), PagedAllocator)
    )
    words = [
        "simulate",
        "--trace",
        str(tmp_path / "drafts.jsonl.zst"),
        "--no-capacity",
        "--num-speculative-tokens",
        "3",
    ]
    assert main(words) == 0 and "drafts: 3 at most" in capsys.readouterr().out

    run_simulation(make_trace(5), make_setup(), record_to=tmp_path / "plain.jsonl.zst")
    with pytest.raises(ConfigError, match="has no drafts"):
        measure_acceptance(read_recording(tmp_path / "plain.jsonl.zst"))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--num-speculative-tokens", "3"], "--draft-acceptance is missing"),
        (["--draft-acceptance", "0.5"], "say how many with --num-speculative-tokens"),
        (["--num-speculative-tokens", "3", "--draft-acceptance", "70"], "a share, 0 to 1, got 70"),
        (["--num-speculative-tokens", "0", "--draft-acceptance", "0.5"], "between 1 and 64, got 0"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(words, text, capsys):
    assert main(["simulate", "--trace", "synthetic:requests=5", "--arrivals", "poisson:rate=2", *words]) == 2
    assert text in (error := capsys.readouterr().err) and error.count("\n") == 1
