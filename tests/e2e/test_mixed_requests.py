"""Requests under pressure get what they get alone; ``make fuzz`` runs this with new seeds for an hour."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .mixed_requests import Answer, assert_same_answer, make_models, run_scenario


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_models(Path(tmp_path_factory.mktemp("models")))


@pytest.mark.parametrize("seed", [1, 2, 3, 2967550316, 3392363129])
def test_requests_under_pressure_get_what_they_get_alone(models: dict[str, str], seed: int) -> None:
    happened = run_scenario(seed, models)
    assert happened["finished"] > 0, json.dumps(happened)


def test_another_token_is_a_failure_and_says_which() -> None:
    with pytest.raises(AssertionError, match=r"r1: \[5, 7\] instead of \[5, 6\]"):
        assert_same_answer("r1", Answer(token_ids=[5, 7]), Answer(token_ids=[5, 6]))
