"""What ``--record`` costs: time of the engine's thread for a step of 256 decoding requests, and of the recorder's.

    PYTHONPATH=src python benchmarks/recording_cost.py

A step takes 9.5 ms on an 8B model and 3.4 ms on a 0.6B at this size (docs/performance.md): below 1 % are 95 and 34 us.
The first figure delays a step. The second is of another thread, which runs while the engine waits for the device.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from quire.core.messages import ModelRunnerOutput, SchedulerOutput
from quire.core.stats import StepStats
from quire.core.traces.recorder import TraceRecorder
from quire.core.traces.records import SCHEMA_VERSION, HeaderRecord


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.jsonl.zst"
        header = HeaderRecord(SCHEMA_VERSION, "", "", 0, "", "", "", {}, {})
        recorder = TraceRecorder(path, header, block_size=16, prefix_caching=True)
        times = [record_one(recorder, step, args.running) for step in range(args.steps)]
        cpu = time.process_time()
        recorder.close()
        print(f"engine's thread: {1e6 * statistics.median(times):.1f} us a step (mean {1e6 * np.mean(times):.1f})")
        print(f"recorder's thread: {1e6 * (time.process_time() - cpu) / args.steps:.1f} us a step at most")
        print(f"file: {path.stat().st_size / args.steps:.1f} bytes a step")


def record_one(recorder: TraceRecorder, number: int, running: int) -> float:
    """Seconds for one step. Every eighth begins with another batch, as at 30 requests a second."""
    rows = np.roll(np.arange(running, dtype=np.int32), number // 8)
    ones = np.ones(running, np.int32)
    step = SchedulerOutput(
        number,
        rows,
        ones,
        ones.astype(bool),
        running,
        running,
        1000 + number,
        np.full(running, 1000 + number, np.int32),
    )
    output = ModelRunnerOutput(number, ones[:, None], ones, device_us=9500.0)
    stats = StepStats(number, running, running, running, 0.0, 36.0, 50.0, 9500.0, 9000.0, 1.0, 30.0)
    ids = np.arange(running, dtype=np.int64)
    start = time.perf_counter()
    recorder.clock()
    recorder.record_step(step, ids[rows])
    recorder.record_output(stats, output)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
