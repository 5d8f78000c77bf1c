"""What keeps guided steps from overlapping the model, without a GPU: the engine with an emulated device.

    PYTHONPATH=src:benchmarks python benchmarks/structured_output.py prepare FOLDER    # trains the tokenizer, ~1 min
    PYTHONPATH=src:benchmarks python benchmarks/structured_output_overlap.py FOLDER

Requests and schemas are those of ``structured_output.py``, in the same order: guided with new schemas, unguided with
answers as long, guided with schemas that were used before. The clock of the device says how long it waited for the
engine. Each phase of a step in the engine's thread is shown by its processor time, which compares on any machine, and
by the clock, which says something where four processors or more are free: the device and the threads of llguidance take
some. ``--burst N`` shows what N new schemas that compile at once do to steps of others.
"""

from __future__ import annotations

import argparse
import collections
import functools
import gc
import itertools
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from emulated_device import EmulatedExecutor, StepTimes
from structured_output import WARM_UP, make_prompts, make_workload

from quire import LLM, SamplingParams
from quire.core.engine.llm_engine import LLMEngine
from quire.core.engine.output_processor import OutputProcessor
from quire.core.sched.scheduler import Scheduler
from quire.core.structured_output.manager import StructuredOutputManager
from quire.core.structured_output.mask_filler import MaskFiller

_PHASES = (
    (Scheduler, "schedule", "schedule"),
    (EmulatedExecutor, "execute_model", "launch"),
    (Scheduler, "update_from_output", "update"),
    (StructuredOutputManager, "make_masks", "masks"),
    (MaskFiller, "fill_masks", "fill"),
    (EmulatedExecutor, "sample_tokens", "sampling"),
    (OutputProcessor, "process_outputs", "outputs"),
    (LLMEngine, "process_step", "turn"),
)
"""Calls of the engine's thread. ``fill`` is a part of ``masks``, and ``turn`` is all of a step, waiting included."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--burst", type=int, default=0, metavar="N", help="new schemas beside --requests unguided ones")
    args = parser.parse_args()
    max_num_seqs = args.requests + args.burst
    clock = PhaseClock()
    llm = LLM(str(args.folder), load_format="dummy", max_model_len=4096, device="cpu", max_num_seqs=max_num_seqs,
              executor=EmulatedExecutor)  # fmt: skip
    llm.generate(*make_workload(args, WARM_UP))
    gc.collect()
    gc.freeze()  # as a server does after its start
    if args.burst:
        measure_burst(llm, args)
    else:
        measure_arms(llm, args, clock)
    llm.shutdown()


class PhaseClock:
    """Times the phases of a step in the thread that constructs it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, tuple[float, float]]] = []
        """By phase: seconds by the clock, and of the processor."""
        self._current: dict[str, tuple[float, float]] = collections.defaultdict(lambda: (0.0, 0.0))
        self._thread = threading.get_ident()
        for owner, method, name in _PHASES:
            self._wrap(owner, method, name)

    def _wrap(self, owner: Any, method: str, name: str) -> None:
        call = getattr(owner, method)

        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return call(*args, **kwargs)
            start = time.perf_counter(), time.thread_time()
            result = call(*args, **kwargs)
            spent, processor = self._current[name]
            self._current[name] = spent + time.perf_counter() - start[0], processor + time.thread_time() - start[1]
            if name == "turn":
                self.steps.append(dict(self._current))
                self._current.clear()
            return result

        setattr(owner, method, timed)


def measure_arms(llm: LLM, args: argparse.Namespace, clock: PhaseClock) -> None:
    """Guided beside unguided requests, in turn."""
    rates: dict[str, list[float]] = collections.defaultdict(list)
    p99s: dict[str, list[float]] = collections.defaultdict(list)

    def measure(name: str, prompts: list[list[int]], params: list[SamplingParams]) -> list[int]:
        times = get_step_times(llm)
        times.clear()
        clock.steps.clear()
        start = time.perf_counter()
        lengths = [len(output.outputs[0].token_ids) for output in llm.generate(prompts, params)]
        rates[name].append(sum(lengths) / (time.perf_counter() - start))
        gaps = find_gaps(times)
        p99s[name].append(float(np.percentile(gaps, 99)))
        idle = 1e3 * np.array([(step.idle_before, step.idle_for_masks) for step in times if is_decode(step)])
        p50, p99 = np.percentile(gaps, 50), p99s[name][-1]
        print(f"{name}: {rates[name][-1]:.0f} tokens/s, step p50 {p50:.2f}, p99 {p99:.2f} ms")
        print("    the device waited for steps and masks, mean: {:.3f}, {:.3f} ms".format(*idle.mean(0)))
        whole = [phases for phases, step in zip(clock.steps, times, strict=False) if step.num_reqs == args.requests]
        for label, column in (("processor", 1), ("clock", 0)):
            cells = []
            for *_, phase in _PHASES:
                values = 1e3 * np.array([phases.get(phase, (0, 0))[column] for phases in whole])
                cells.append("{} {:.2f} {:.2f}".format(phase, *np.percentile(values, [50, 99])))
            print(f"    {label}, p50 and p99 in ms: {', '.join(cells)}")
        return lengths

    for number in range(args.repeats):
        prompts, guided = make_workload(args, number)
        start = time.perf_counter()
        for params in guided:
            assert params.structured_outputs is not None
            llm.engine_core._structured_outputs.compile_and_wait(params.structured_outputs)
        print(f"{args.requests} schemas compiled in {time.perf_counter() - start:.1f} s")
        lengths = measure("guided", prompts, guided)
        unguided = [SamplingParams(temperature=1, seed=i, max_tokens=n, ignore_eos=True) for i, n in enumerate(lengths)]
        measure("unguided", make_prompts(args), unguided)
        measure("guided, schemas used before", make_prompts(args), guided)
    for name in ("guided", "guided, schemas used before"):
        ratio = statistics.median(a / b for a, b in zip(rates[name], rates["unguided"], strict=True))
        difference = statistics.median(a - b for a, b in zip(p99s[name], p99s["unguided"], strict=True))
        print(f"{name}: {100 * ratio:.1f} % of the tokens/s of unguided, p99 step {difference:+.2f} ms")


def measure_burst(llm: LLM, args: argparse.Namespace) -> None:
    """Steps of requests without a grammar while new schemas compile in the engine's process, as over HTTP."""
    core, times = llm.engine_core, get_step_times(llm)
    for number in range(args.repeats):
        running = [
            SamplingParams(temperature=1, seed=i, max_tokens=1000, ignore_eos=True) for i in range(args.requests)
        ]
        request_ids = add_requests(llm, f"running-{number}", make_prompts(args), running)
        for _ in range(30):
            llm.llm_engine.step()
        burst = argparse.Namespace(requests=args.burst)
        times.clear()
        start = time.perf_counter()
        request_ids += add_requests(llm, f"burst-{number}", *make_workload(burst, 1000 + number))
        while core._structured_outputs.num_waiting:
            llm.llm_engine.step()
        seconds = time.perf_counter() - start
        p50, p90, p99 = np.percentile(find_gaps(times), [50, 90, 99])
        print(f"{args.burst} schemas started in {seconds:.2f} s; steps p50 {p50:.2f}, p90 {p90:.2f}, p99 {p99:.2f} ms")
        llm.llm_engine.abort_request(request_ids)
        while core.has_work:
            llm.llm_engine.step()


def add_requests(llm: LLM, name: str, prompts: list[list[int]], all_params: list[SamplingParams]) -> list[str]:
    """Queue requests, which wait for their grammars where ``LLMEngine.add_request`` would. Returns their ids."""
    request_ids = []
    for number, (prompt, params) in enumerate(zip(prompts, all_params, strict=True)):
        request_ids.append(f"{name}-{number}")
        requests = llm.input_processor.process_inputs(request_ids[-1], prompt, params)
        llm.llm_engine.queue_requests(request_ids[-1], prompt, requests, "final")
    return request_ids


def get_step_times(llm: LLM) -> list[StepTimes]:
    """Of the emulated device."""
    executor: Any = llm.engine_core.executor
    times: list[StepTimes] = executor.step_times
    return times


def is_decode(step: StepTimes) -> bool:
    """Whether no request of the step computes its prompt."""
    return step.num_decodes == step.num_reqs


def find_gaps(times: list[StepTimes]) -> list[float]:
    """Milliseconds between the ends of two steps, of decodes alone."""
    return [1e3 * (step.end - before.end) for before, step in itertools.pairwise(times) if is_decode(step)]


if __name__ == "__main__":
    main()
