"""Small engines with known step times, and small traces."""

from __future__ import annotations

import dataclasses

import msgspec
import numpy as np
import pytest

from quire.core.worker.cuda_graphs.capture_sizes import choose_capture_sizes
from quire.plugins.kv.paged import PagedAllocator
from quire.plugins.sched.fcfs import FCFSPolicy
from quire.server.simulate.simulation import EngineSetup
from quire.server.simulate.step_model import EngineLimits, HostTimes, StepTimeModel
from quire.server.traces.synthetic import make_arrivals, make_synthetic_trace
from quire.server.traces.trace import Trace, TraceRequest

MODEL = StepTimeModel(
    name="test",
    source="made up",
    device="none",
    model="none",
    tokens=(1, 64, 256, 2048),
    tokens_us=(4000.0, 4600.0, 7000.0, 45000.0),
    context_us=0.036,
    pair_us=0.0009,
    prompt_step_us=300.0,
    host=HostTimes(arrival_us=900.0, output_us=300.0, gap_us=15.0),
    limits=EngineLimits(64, 2048, 4096, 16, 4000),
)


@pytest.fixture
def model():
    return MODEL


@pytest.fixture
def padded_model():
    """As of a GPU: decodes are padded to sizes of which a larger one may be faster, prompts are launched slowly."""
    sizes = tuple(choose_capture_sizes(64))
    return msgspec.structs.replace(
        MODEL,
        decodes=sizes,
        decodes_us=tuple(4000.0 + 30 * size + 900 * (size == 8) for size in sizes),
        pads_decodes=True,
        prompt_context_us=0.05,
        mean_keys_us=0.6,
        host=msgspec.structs.replace(MODEL.host, prompt_launch_us=(2000.0, 2000.0, 9000.0, 9000.0), lead_us=200.0),
    )


@pytest.fixture
def make_setup():
    """Makes what replicas are built from; ``limits`` are changes to those of the model."""

    def make(policy=FCFSPolicy, *, model=MODEL, name="fcfs", skip=True, prefix_caching=True, **limits):
        return EngineSetup(
            model,
            msgspec.structs.replace(model.limits, **limits),
            policy,
            FCFSPolicy,
            PagedAllocator,
            name,
            f"{policy.__module__}:{policy.__qualname__}" if isinstance(policy, type) else "",
            {},
            prefix_caching,
            skip,
        )

    return make


@pytest.fixture
def make_trace():
    """Makes traces of random requests; with ``turns``, conversations whose prompts repeat all that was said."""

    def make(count=120, rate=8.0, *, output="exponential/60", seed=0, turns=False, limits=False, **options):
        spec = f"synthetic:requests={count},input=lognormal/300/0.8,output={output}"
        spec += "".join(f",{key}={value}" for key, value in options.items())
        trace = make_synthetic_trace(spec, seed).replace_arrivals(make_arrivals(f"poisson:rate={rate}", count, seed))
        if limits:
            rng = np.random.default_rng(seed)
            requests = [
                dataclasses.replace(request, max_tokens=request.output_len + int(rng.integers(0, 3)))
                for request in trace.requests
            ]
            trace = dataclasses.replace(trace, requests=requests)
        return _make_conversations(trace) if turns else trace

    return make


def _make_conversations(trace: Trace) -> Trace:
    requests: list[TraceRequest] = []
    for number, request in enumerate(trace.requests):
        before = requests[number - 10] if number >= 10 else None
        known = before.prompt_len + before.output_len if before is not None and before.prompt_len < 1500 else 0
        prompt_len = known + request.prompt_len % 200 + 1
        hashes = list(before.block_hashes) if before is not None and known else []
        while (len(hashes) + 1) * 16 <= prompt_len + request.output_len:
            hashes.append(number * 1000 + len(hashes))
        requests.append(dataclasses.replace(request, prompt_len=prompt_len, block_hashes=tuple(hashes)))
    return Trace("conversations", requests, 16)
