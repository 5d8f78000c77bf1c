"""Traces are read, shaped and made up; what cannot be read is refused in one line that says what to do."""

from __future__ import annotations

import json

import numpy as np
import pytest
import zstandard

from quire.core.errors import ConfigError
from quire.server.traces.read import read_trace
from quire.server.traces.synthetic import ARRIVALS, make_arrivals, make_synthetic_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:03.0319600,3180,8
2024-05-10 00:00:00.009930+00:00,110,27
"""
BURSTGPT = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
5,1,2.5,ChatGPT,472,18,490,Conversation log
45,1,2.5,ChatGPT,1087,0,1087,Conversation log
118,,1.0,GPT-4,417,276,693,API log
"""
MOONCAKE = "\n".join(
    json.dumps(row)
    for row in (
        {"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": list(range(14))},
        {"timestamp": 3052, "input_length": 1030, "output_length": 0, "hash_ids": [0, 1, 99]},
    )
)
SHAREGPT = json.dumps(
    [
        {"conversations": [{"from": "human", "value": "x" * 40}, {"from": "gpt", "value": "y" * 9}]},
        {"conversations": [{"from": "human", "value": "alone"}]},
    ]
)


@pytest.fixture
def write(tmp_path):
    def to_file(text: str, name: str = "trace", compressed: bool = False) -> str:
        data = text.encode()
        (tmp_path / name).write_bytes(zstandard.compress(data) if compressed else data)
        return str(tmp_path / name)

    return to_file


def lengths(trace):
    return [(request.prompt_len, request.output_len) for request in trace.requests]


def test_azure(write):
    trace = read_trace(write(AZURE))
    assert lengths(trace) == [(3180, 8), (4808, 10), (110, 27)]
    assert [request.arrival_s for request in trace.requests][:2] == [0.0, pytest.approx(0.948)]
    assert trace.hash_block_size == 0


@pytest.mark.parametrize("compressed", [False, True])
def test_mooncake(write, compressed):
    trace = read_trace(write(MOONCAKE, compressed=compressed))
    assert lengths(trace) == [(6758, 500), (1030, 1)]
    assert trace.requests[1].arrival_s == pytest.approx(3.052)
    assert trace.hash_block_size == 512
    assert trace.requests[0].block_hashes == tuple(range(13))  # 13 full blocks of 512 in 6,758 tokens
    assert trace.requests[1].block_hashes == (0, 1)


def test_burstgpt(write):
    trace = read_trace(write(BURSTGPT))
    assert lengths(trace) == [(472, 18), (417, 276)]
    assert trace.duration_s == 113
    assert "1 rows without a response" in trace.notes[0]


@pytest.mark.parametrize("as_lines", [False, True])
def test_sharegpt(write, as_lines):
    text = "\n".join(map(json.dumps, json.loads(SHAREGPT))) if as_lines else SHAREGPT
    trace = read_trace(write(text))
    assert lengths(trace) == [(10, 3)]
    assert "arrivals" in trace.notes[0] and "tokenizer" in trace.notes[1]
    assert trace.replace_arrivals([1.0]).notes == trace.notes[1:]
    assert lengths(read_trace(write(text), count_tokens=len)) == [(40, 9)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,b\n1,2\n", "no known format"),
        ("", "no known format"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "has no requests"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", "yesterday"),
        ('{"timestamp": 0, "input_length": 1}\n', "output_length"),
        ('{"timestamp": 0, "input_length": 1, "output_length": 1}\n{"time\n', "line 2"),
        ('[{"conversations": []}]', "no conversation"),
        ("[1, 2]", "; it may be a recording"),
        ("[" * 100_000, "nested too deeply"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46," + "9" * 20 + ",2\n", "mend or remove it"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "1" * 200_000 + ",1,2\n", "field larger than field limit"),
        ('{"timestamp": 0, "input_length": -3, "output_length": 1}\n', "a prompt of -3 tokens"),
        ('{"timestamp": 0, "input_length": 100000000000, "output_length": 1}\n', "mend or remove it"),
        ('{"timestamp": NaN, "input_length": 1, "output_length": 1}\n', "arrives after nan s"),
        ('{"timestamp": 0, "input_length": Infinity, "output_length": 1}\n', "cannot convert float infinity"),
        ('{"event":"header","schema":9,"quire":"9.1","started":"","origin_ns":0,"model":"","device":"","dtype":"",'
         '"engine":{},"policy":{}}\n', "schema 9"),
        ('{"event":"header","schema":1}\n', "line 1 is not one of a recording"),
    ],
)  # fmt: skip
def test_what_is_no_trace_is_refused_in_one_line(write, text, says):
    with pytest.raises(ConfigError, match=says) as caught:
        read_trace(write(text))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_missing_file_and_foreign_bytes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read_trace("no-such-trace.csv")
    (tmp_path / "a.bin").write_bytes(bytes(range(256)))
    with pytest.raises(ConfigError, match="is not a trace"):
        read_trace(str(tmp_path / "a.bin"))


def test_scaling_in_time_and_size_keeps_prefixes_shared(write):
    trace = read_trace(write(MOONCAKE)).scale_time(2).scale_lengths(0.5)
    assert [request.arrival_s for request in trace.requests] == [0.0, pytest.approx(1.526)]
    assert lengths(trace) == [(3379, 250), (515, 1)]
    assert trace.hash_block_size == 256
    for request in trace.requests:
        assert len(request.block_hashes) * trace.hash_block_size <= request.prompt_len
    assert len(trace.cut_window(0, 1)) == 1 == len(trace.limit_requests(1))
    with pytest.raises(ConfigError, match="no request arrives"):
        trace.cut_window(50, 60)
    with pytest.raises(ConfigError, match="above 0"):
        trace.scale_time(0)
    with pytest.raises(ConfigError, match="name a smaller factor"):
        trace.scale_lengths(1e6)


@pytest.mark.parametrize("name", sorted(ARRIVALS))
def test_arrivals_ascend_and_repeat_by_seed(name):
    spec = name if name == "burst" else f"{name}:rate=10"
    times = make_arrivals(spec, 500, seed=3)
    assert times == make_arrivals(spec, 500, seed=3) == sorted(times) and len(times) == 500


def test_arrivals_have_the_rate_and_the_bursts_that_were_asked_for():
    def gaps(spec):
        return np.diff(make_arrivals(spec, 20_000))

    for spec, cv in (("poisson:rate=10", 1.0), ("gamma:rate=10,cv=3", 3.0), ("uniform:rate=10", 0.0)):
        assert gaps(spec).mean() == pytest.approx(0.1, rel=0.1)
        assert gaps(spec).std() / gaps(spec).mean() == pytest.approx(cv, rel=0.1, abs=1e-9)
    silent = [time % 20 for time in make_arrivals("onoff:rate=10,on=5,off=15", 2000)]
    assert max(silent) <= 5
    day = np.array(make_arrivals("diurnal:rate=10,period=100,swing=1", 10_000)) % 100
    assert np.count_nonzero(day < 50) > 3 * np.count_nonzero(day >= 50)


def test_a_synthetic_trace_has_the_lengths_that_were_asked_for():
    spec = "synthetic:requests=4000,input=lognormal/1000/0.5,output=exponential/200,prefixes=4,prefix_len=64"
    trace = make_synthetic_trace(spec, seed=1)
    assert trace == make_synthetic_trace(spec, seed=1) != make_synthetic_trace(spec, seed=2)
    assert np.median([request.prompt_len - 64 for request in trace.requests]) == pytest.approx(1000, rel=0.1)
    assert np.mean([request.output_len for request in trace.requests]) == pytest.approx(200, rel=0.1)
    assert {request.block_hashes for request in trace.requests} == {(0,), (1,), (2,), (3,)}


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("posson:rate=1", "did you mean poisson"),
        ("poisson", "poisson:rate=8"),
        ("poisson:rate=-1", "above 0"),
        ("poisson:rate=fast", "must be a number"),
        ("poisson:rate=1,cv=2", "'cv' is not a parameter"),
        ("gamma:rate", "key=value"),
        ("diurnal:rate=1,swing=2", "at most 1"),
    ],
)
def test_bad_arrivals_are_refused_in_one_line(spec, says):
    with pytest.raises(ConfigError, match=says):
        make_arrivals(spec, 3)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("synthetic:requests=0", "at least 1"),
        ("synthetic:inputs=fixed/3", "did you mean input"),
        ("synthetic:input=normal/3", "did you mean lognormal"),
        ("synthetic:input=fixed", "write fixed/N"),
        ("synthetic:requests=1e12", "requests must be at most"),
        ("synthetic:output=fixed/1e12", "name shorter lengths"),
        ("synthetic:output=uniform/1/1e30", "name shorter lengths"),
    ],
)
def test_bad_specs_are_refused_in_one_line(spec, says):
    with pytest.raises(ConfigError, match=says):
        make_synthetic_trace(spec)
