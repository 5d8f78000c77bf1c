"""Captured steps that verify drafts, without a GPU: a graph is replayed by calling its launch function again.

The kernels run in the interpreter, so this is the code of the GPU but for the capture itself (see ``test_gpu.py``).
"""

from __future__ import annotations

import pytest
import torch

from quire import SamplingParams
from quire.core.config import SchedulerConfig
from quire.core.worker.cuda_graphs.capture_sizes import choose_verify_query_lens
from quire.core.worker.cuda_graphs.decode import DecodeGraphs
from quire.core.worker.request_table import RequestTable
from quire.core.worker.warmup import make_warmup_steps

from .captured_steps import capture_steps
from .conftest import assert_same_outputs, get_model_runner, make_prompts


@pytest.fixture(scope="module", params=["itself", "eagle3"])
def captured(engine, request):
    """An engine that drafts in captured steps: with a model, and with a head that reads every step."""
    llm = engine(request.param, max_num_seqs=3)
    capturer = capture_steps(llm)
    return llm, capturer


SAMPLING_PARAMS = [
    {"temperature": 0},
    {"temperature": 0.9, "seed": 3, "top_p": 0.9},
    {"temperature": 0.8, "seed": 5, "frequency_penalty": 0.8, "logprobs": 2},
    {"temperature": 0.7, "seed": 6, "max_tokens": 6},
]


@pytest.mark.parametrize("first", range(2))
def test_replays_sample_the_same_tokens(engine, captured, first: int) -> None:
    """Verification with as many drafts for all and with fewer for some, alone and beside prompts."""
    llm, capturer = captured
    prompts = make_prompts(4, 4)
    params = [SamplingParams(**({"max_tokens": 14, "ignore_eos": True} | fields)) for fields in SAMPLING_PARAMS]
    pair = slice(2 * first, 2 * first + 2)
    before = sum(graph.count for graph in capturer.graphs)
    actual = llm.generate(prompts[pair], params[pair])
    expected = engine().generate(prompts[pair], params[pair])
    for one, other in zip(actual, expected, strict=True):
        assert_same_outputs(one, other)
    assert sum(graph.count for graph in capturer.graphs) > before + 6
    assert llm.get_stats()["spec_decode_num_accepted_tokens_total"] > 0


@pytest.mark.parametrize("drafts", [0, 1, 4])
def test_every_batch_of_plain_decodes_has_a_graph(engine, drafts):
    """However few of them may also verify drafts."""
    runner = get_model_runner(engine("itself", max_num_seqs=3))
    table = RequestTable(100, 128, runner.block_size, 1, torch.device("cpu"))
    graphs = DecodeGraphs(
        runner.model, runner.backends, runner.kv_cache, table, runner.block_size, num_draft_tokens=drafts
    )
    assert max(size for queries, size in graphs.shapes if queries == 1) == 100


def test_steps_that_verify_and_decodes_are_warmed_up(engine):
    """So that nothing is compiled for them later, also for those that no graph holds."""
    runner = get_model_runner(engine("itself", max_num_seqs=3))
    steps = list(make_warmup_steps(SchedulerConfig(3, 64), 128, choose_verify_query_lens(4), [1, 2, 3]))
    assert {step.num_decodes for step in steps if step.num_decodes == len(step.rows)} == {1, 2, 3}
    widths = {1 + int(step.num_draft_tokens.max()) for step in steps if step.num_draft_tokens is not None}
    assert widths == {2, 3, 5}
    for step in steps:
        result = runner.execute_step(step).result()
        assert (result.num_sampled_tokens >= 1).all()
