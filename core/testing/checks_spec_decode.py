"""Conformance of speculative proposers. How many of their drafts are accepted is not checked."""

from __future__ import annotations

import tempfile
import unittest
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from quire.core.contracts.spec_decode import DeviceProposer, DraftTokens, HostProposer, SpeculativeProposer
from quire.core.messages import EngineCoreRequest
from quire.core.plugin.options import parse_options
from quire.core.plugin.quarantine import class_path
from quire.core.request import Request
from quire.core.sampling_params import SamplingParams
from quire.core.testing.example_engine import CONFIG, example_engine, example_model
from quire.core.testing.tiny_models import make_example_model, save_example_model

__all__ = [
    "check_any_request_may_finish",
    "check_at_most_num_tokens_drafts",
    "check_device_proposer_drafts_for_every_row",
    "check_proposer_derives_from_host_or_device_proposer",
    "check_request_is_not_changed",
    "check_tokens_are_those_of_transformers",
]


def check_proposer_derives_from_host_or_device_proposer(cls: type[SpeculativeProposer]) -> None:
    """It derives from ``HostProposer`` or ``DeviceProposer``."""
    assert issubclass(cls, HostProposer | DeviceProposer), "derive it from HostProposer or DeviceProposer"


def check_at_most_num_tokens_drafts(cls: type[SpeculativeProposer]) -> None:
    """A host proposer returns integers, at most ``num_tokens`` of them, for prompts of any length."""
    proposer = _make_host_proposer(cls)
    for length in (1, 2, 3, 17, 300):
        drafts = proposer.propose(_make_request(length, length), 3)
        assert len(drafts) <= 3, f"{len(drafts)} drafts, it was asked for 3"
        assert all(isinstance(token, int) for token in drafts), f"drafts are no integers: {drafts!r}"


def check_request_is_not_changed(cls: type[SpeculativeProposer]) -> None:
    """A host proposer changes nothing of the request, while it grows."""
    proposer, request = _make_host_proposer(cls), _make_request(1, 40)
    for step in range(20):
        before = list(request.token_ids)
        drafts = proposer.propose(request, 4)
        assert request.token_ids == before, "propose changed the request's tokens"
        assert drafts is not request.token_ids, "propose returned the request's own list"
        request.token_ids.append(step % 3)


def check_any_request_may_finish(cls: type[SpeculativeProposer]) -> None:
    """``request_finished`` may be called for any request, also for one that ``propose`` has never seen."""
    proposer = _make_host_proposer(cls)
    proposer.request_finished(_make_request(1, 4))
    for length in (30, 5):
        request = _make_request(2, length)
        proposer.propose(request, 2)
        proposer.request_finished(request)


def check_device_proposer_drafts_for_every_row(cls: type[SpeculativeProposer]) -> None:
    """(n, num_tokens) integers for n rows, without a model where it needs none."""
    if not issubclass(cls, DeviceProposer) or cls.needs_model or cls.attach_target is not DeviceProposer.attach_target:
        raise unittest.SkipTest("is no device proposer, or needs an engine around it")
    proposer = cls(4, parse_options(cls, {}))
    for n, count in ((1, 1), (5, 4)):
        drafts = proposer.propose(torch.arange(n), count, greedy=True)
        assert isinstance(drafts, DraftTokens), f"propose returned {type(drafts).__name__}"
        token_ids = drafts.token_ids
        assert token_ids.shape == (n, count) and not token_ids.is_floating_point(), "not (n, count) integers"


def check_tokens_are_those_of_transformers(cls: type[SpeculativeProposer]) -> None:
    """An engine that drafts with it gives the tokens that it gives without, greedy and at random, in any batch, and
    quarantines nothing."""
    with example_model(repetitive=True) as (folder, reference), _example_draft(cls, folder) as draft:
        config = {"method": class_path(cls), "num_speculative_tokens": 3, "adaptive": False}
        config |= {} if draft is None else {"model": str(draft)}
        with example_engine(folder, reference, speculative_config=config) as engine:
            engine.assert_traffic_is_served(num_tokens=39)
            if not engine.llm.get_stats()["spec_decode_num_draft_tokens_total"]:
                raise unittest.SkipTest("it drafted nothing, although texts repeat themselves")


@contextmanager
def _example_draft(cls: type[SpeculativeProposer], target: Path) -> Iterator[Path | None]:
    """A folder with a draft model, if ``cls`` needs one; SkipTest where there is none to be had."""
    if not cls.needs_model:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="quire-check-") as name:
        try:
            cls.save_example_model(target, Path(name))
        except NotImplementedError:
            if not cls.serves_model:
                raise unittest.SkipTest("save_example_model names no draft model to try it with") from None
            save_example_model(make_example_model(CONFIG, seed=1), Path(name))
        yield Path(name)


def _make_host_proposer(cls: type[SpeculativeProposer]) -> HostProposer:
    if not issubclass(cls, HostProposer):
        raise unittest.SkipTest("is not a HostProposer")
    return cls(4, parse_options(cls, {}))


def _make_request(number: int, length: int) -> Request:
    tokens = [5 + i % 7 for i in range(length)]
    return Request(EngineCoreRequest(number, tokens, SamplingParams(seed=0), 0), 4096)
