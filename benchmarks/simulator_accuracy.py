"""How far the simulator is from a server: fit a step model on one recording, predict others, and compare.

    quire serve MODEL --record both70.jsonl.zst --no-enable-prefix-caching &
    python benchmarks/simulator_accuracy.py send --trace azure-conv.csv --rate 15.7 --minutes 4 --out conv70.json
    python benchmarks/simulator_accuracy.py send --trace azure-code.csv --rate 13.3 --minutes 4 --out code70.json
    python benchmarks/simulator_accuracy.py split both70.jsonl.zst conv70 code70       # once the server has ended
    python benchmarks/simulator_accuracy.py compare --fit conv70 --predict conv90 code70 code90

``send`` plays the beginning of a trace against a server and keeps what its clients saw. ``split`` makes a recording of
each part of what one server served, one after the other, by the number of requests in NAME.json. ``compare`` reads
NAME.jsonl.zst, which the server recorded, and NAME.json, fits a step model to the first, simulates the others, and
prints what was measured (seconds, tokens/s) and by how much the simulation is off. Goals: median end to end 5 %, median
time to first token 10 %, its p99 15 %, throughput 3 %. A recording says little of a p99 below 1,000 requests, and then
the table says so.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import zstandard

from quire.core.errors import ConfigError
from quire.core.traces.records import ArrivalRecord, DoneRecord, EndRecord, StepRecord
from quire.plugins.kv.paged import PagedAllocator
from quire.plugins.sched.fcfs import FCFSPolicy
from quire.server.ab.trace_sender import send_trace
from quire.server.simulate.fit import fit_step_model, measure_errors
from quire.server.simulate.simulation import EngineSetup, run_simulation
from quire.server.traces.read import read_trace
from quire.server.traces.recording import Recording, open_text, read_recording

FIGURES = ("e2e_p50", "ttft_p50", "ttft_p99", "throughput")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    send = commands.add_parser("send")
    send.add_argument("--url", default="http://127.0.0.1:8000")
    send.add_argument("--trace", required=True)
    send.add_argument("--rate", type=float, required=True, help="requests a second, on average")
    send.add_argument("--minutes", type=float, default=4.0)
    send.add_argument("--out", required=True)
    split = commands.add_parser("split")
    split.add_argument("recording")
    split.add_argument("names", nargs="+")
    compare = commands.add_parser("compare")
    compare.add_argument("--fit", required=True)
    compare.add_argument("--predict", nargs="+", required=True)
    args = parser.parse_args()
    try:
        {"send": send_requests, "split": split_recording, "compare": compare_recordings}[args.command](args)
    except ConfigError as error:
        parser.exit(2, f"simulator_accuracy: error: {error}\n")


def send_requests(args: argparse.Namespace) -> None:
    trace = read_trace(args.trace).limit_requests(max(round(60 * args.minutes * args.rate), 2))
    trace = trace.scale_time(args.rate / trace.rate)  # the rate of what is sent, not of the whole trace
    print(trace.describe(), flush=True)
    times = send_trace(trace, args.url)
    print(f"{int(times.is_served.sum()):,} of {len(trace):,} answered", flush=True)
    names = ("arrival_s", "ttft_s", "e2e_s", "output_len")
    columns = {name: np.asarray(getattr(times, name)).tolist() for name in names}
    Path(args.out).write_text(json.dumps(columns).replace("NaN", "null"))


def split_recording(args: argparse.Namespace) -> None:
    lines = open_text(Path(args.recording)).splitlines(keepends=True)
    arrivals = [number for number, line in enumerate(lines) if line.startswith('{"event":"arrival"')]
    starts = np.cumsum([0, *(len(json.loads(Path(f"{name}.json").read_text())["arrival_s"]) for name in args.names)])
    if starts[-1] != len(arrivals):
        raise ConfigError(f"{args.recording} has {len(arrivals)} requests, the parts have {starts[-1]}")
    bounds = [*(arrivals[start] for start in starts[:-1]), len(lines)]
    for name, first, end in zip(args.names, bounds, bounds[1:], strict=False):
        text = "".join((lines[0], *lines[first:end]))
        Path(f"{name}.jsonl.zst").write_bytes(zstandard.compress(text.encode()))


def compare_recordings(args: argparse.Namespace) -> None:
    fitted = read_recording(Path(f"{args.fit}.jsonl.zst"))
    model = fit_step_model([fitted], args.fit, "benchmarks/simulator_accuracy.py")
    output_us = 1e6 * Served.read(args.fit, fitted).output_s
    model = msgspec.structs.replace(model, host=msgspec.structs.replace(model.host, output_us=output_us))
    print(f"{'':12} {'requests':>9} {'steps':>7} {'their sum':>9} " + " ".join(f"{name:>16}" for name in FIGURES))
    for name in (args.fit, *args.predict):
        recording = read_recording(Path(f"{name}.jsonl.zst"))
        served = Served.read(name, recording)
        real, predicted = served.summarize(), simulate(model, recording)
        steps = measure_errors(model, [recording])
        errors = (f"{real[each]:8,.3f} {predicted[each] / real[each] - 1:+7.1%}" for each in FIGURES)
        short = "" if len(served.arrival_s) >= 1000 else "  (too short for p99)"
        print(
            f"{name:12} {len(served.arrival_s):>9,} {steps.median_error:>7.1%} {steps.bias:>+9.1%} "
            + " ".join(errors)
            + short,
            flush=True,
        )


@dataclass(frozen=True)
class Served:
    """What a server did: up to the first token as its clients saw it; up to the last as it was recorded, and the time
    from there to a client."""

    arrival_s: np.ndarray
    ttft_s: np.ndarray
    e2e_s: np.ndarray
    output_len: np.ndarray
    output_s: float
    """From a token on the server's host to its client: the median of first tokens."""

    @classmethod
    def read(cls, name: str, recording: Recording) -> Served:
        clients = {key: np.array(each, float) for key, each in json.loads(Path(f"{name}.json").read_text()).items()}
        arrivals = {each.id: each for each in recording.records if isinstance(each, ArrivalRecord)}
        computed, tokens = dict.fromkeys(arrivals, 0), {number: [] for number in arrivals}
        reaching: dict[int, list[int]] = {}  # step: requests that get a token of it
        numbers: list[int] = []
        for record in recording.records:
            if isinstance(record, StepRecord) and record.step >= 0:
                numbers = numbers if record.ids is None else record.ids
                reaching[record.step] = []
                for number, count in zip(numbers, record.tokens or [1] * len(numbers), strict=True):
                    computed[number] += count
                    if computed[number] >= arrivals[number].prompt_len:
                        reaching[record.step].append(number)
            elif isinstance(record, DoneRecord):
                for number in reaching[record.step]:
                    tokens[number].append(record.end_us / 1e6)
        ends = {each.id: each.output_len for each in recording.records if isinstance(each, EndRecord)}
        began = np.array([arrivals[number].arrival_ns / 1e9 for number in sorted(arrivals)])
        first = np.array([tokens[number][0] for number in sorted(arrivals)]) - began
        last = np.array([tokens[number][ends[number] - 1] for number in sorted(arrivals)]) - began
        output_s = float(np.nanmedian(clients["ttft_s"] - first))
        return cls(clients["arrival_s"], clients["ttft_s"], last + output_s, clients["output_len"], output_s)

    def summarize(self) -> dict[str, float]:
        return summarize(self.arrival_s, self.ttft_s, self.e2e_s, self.output_len)


def simulate(model, recording) -> dict[str, float]:
    setup = EngineSetup(model, model.limits, FCFSPolicy, FCFSPolicy, PagedAllocator, "fcfs")
    result = run_simulation(recording.make_trace(), setup)
    return summarize(result.times.arrival_s, result.times.ttft_s, result.times.e2e_s, result.times.output_len)


def summarize(arrival_s, ttft_s, e2e_s, output_len) -> dict[str, float]:
    ends = arrival_s + e2e_s
    return {
        "e2e_p50": float(np.nanmedian(e2e_s)),
        "ttft_p50": float(np.nanmedian(ttft_s)),
        "ttft_p99": float(np.nanpercentile(ttft_s, 99)),
        "throughput": float(np.nansum(output_len) / (np.nanmax(ends) - arrival_s.min())),
    }


if __name__ == "__main__":
    main()
