"""What ``quire.sdk.layers`` offers beside Llama's layers, in a model of another family."""

from __future__ import annotations

import pytest
import torch

from quire.sdk import CheckpointError
from quire.sdk.layers import make_split_loader, make_transposed_loader
from quire.testing import parametrize_with_checks

from .gpt2 import GPT2LMHeadModel


@parametrize_with_checks(GPT2LMHeadModel)
def test_gpt2_is_that_of_transformers(check):
    check()


def test_a_tensor_that_cannot_be_split_is_refused():
    load = make_split_loader([lambda tensor: None] * 3, [2, 2, 2])
    with pytest.raises(CheckpointError, match=r"shape \[7, 4\] cannot be split into 3 parts of \[2, 2, 2\] rows"):
        load(torch.zeros(7, 4))


def test_parts_are_taken_out_of_the_features_of_a_transposed_matrix():
    parts = []
    load = make_transposed_loader(make_split_loader([parts.append] * 2))
    load(torch.arange(8.0).view(2, 4))  # (inputs, features)
    assert [part.tolist() for part in parts] == [[[0, 4], [1, 5]], [[2, 6], [3, 7]]]
