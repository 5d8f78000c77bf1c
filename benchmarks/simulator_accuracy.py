"""How far the simulator is from a server: fit a step model on one recording, predict others, and compare.

    quire serve MODEL --record both70.jsonl.zst --no-enable-prefix-caching &
    python benchmarks/simulator_accuracy.py send --trace azure-conv.csv --rate 15.7 --minutes 4 --out conv70.json
    python benchmarks/simulator_accuracy.py send --trace azure-code.csv --rate 13.3 --minutes 4 --out code70.json
    python benchmarks/simulator_accuracy.py split both70.jsonl.zst conv70 code70       # once the server has ended
    python benchmarks/simulator_accuracy.py compare --fit conv70 --predict conv90 code70 code90

``send`` plays the beginning of a trace against a server and keeps what its clients saw. ``split`` makes a recording of
each part of what one server served, one after the other, by the number of requests in NAME.json. ``compare`` reads
NAME.jsonl.zst, which the server recorded, and NAME.json, fits a step model to the first, simulates the others, and
prints the errors as shares. Goals: median end to end 5 %, median time to first token 10 %, its p99 15 %, throughput
3 %. A recording says little of a p99 below 1,000 requests, and then the table says so.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import msgspec
import numpy as np
import zstandard

from quire.core.errors import ConfigError
from quire.plugins.kv.paged import PagedAllocator
from quire.plugins.sched.fcfs import FCFSPolicy
from quire.server.ab.live import send_trace
from quire.server.simulate.fit import fit_step_model, measure_errors
from quire.server.simulate.simulation import EngineSetup, run_simulation
from quire.server.traces.read import read_trace
from quire.server.traces.recording import open_text, read_recording

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
    served = measure_clients(args.fit)
    # What clients see beyond the engine, from the recording that is fitted alone.
    output_us = 1e6 * max(served["ttft_p50"] - simulate(model, fitted)["ttft_p50"], 0.0)
    model = with_output_delay(model, output_us)
    print(f"{'':12} {'requests':>9} {'steps':>8} " + " ".join(f"{name:>12}" for name in FIGURES))
    for name in (args.fit, *args.predict):
        recording = read_recording(Path(f"{name}.jsonl.zst"))
        real, predicted = measure_clients(name), simulate(model, recording)
        steps = measure_errors(model, [recording]).median_error
        errors = " ".join(f"{predicted[figure] / real[figure] - 1:>+12.1%}" for figure in FIGURES)
        short = "" if real["requests"] >= 1000 else "  (too short for p99)"
        print(f"{name:12} {real['requests']:>9,.0f} {steps:>8.1%} {errors}{short}", flush=True)


def with_output_delay(model, output_us):
    return msgspec.structs.replace(model, host=msgspec.structs.replace(model.host, output_us=output_us))


def simulate(model, recording) -> dict[str, float]:
    setup = EngineSetup(model, model.limits, FCFSPolicy, FCFSPolicy, PagedAllocator, "fcfs")
    result = run_simulation(recording.make_trace(), setup)
    return summarize(result.times.arrival_s, result.times.ttft_s, result.times.e2e_s, result.times.output_len)


def measure_clients(name: str) -> dict[str, float]:
    columns = json.loads(Path(f"{name}.json").read_text())
    return summarize(*(np.array(columns[key], float) for key in ("arrival_s", "ttft_s", "e2e_s", "output_len")))


def summarize(arrival_s, ttft_s, e2e_s, output_len) -> dict[str, float]:
    ends = arrival_s + e2e_s
    return {
        "requests": len(arrival_s),
        "e2e_p50": float(np.nanmedian(e2e_s)),
        "ttft_p50": float(np.nanmedian(ttft_s)),
        "ttft_p99": float(np.nanpercentile(ttft_s, 99)),
        "throughput": float(np.nansum(output_len) / (np.nanmax(ends) - arrival_s.min())),
    }


if __name__ == "__main__":
    main()
