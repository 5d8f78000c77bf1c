"""``quire bench steps``: times a grid of steps, of decodes and of prompts, and fits a step model to them."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import msgspec

from quire.core.engine.args import EngineArgs
from quire.core.engine.llm import LLM
from quire.core.errors import ConfigError
from quire.core.sampling_params import SamplingParams
from quire.core.worker.cuda_graphs.capture_sizes import choose_capture_sizes
from quire.server.bench.report import get_device_name, print_json
from quire.server.simulate.fit import MIN_STEPS, fit_step_model, import_scipy
from quire.server.simulate.step_model import check_writable, save_step_model
from quire.server.traces.recording import read_recording

__all__ = ["GridPoint", "list_grid_points", "run"]

_CONTEXTS = (128, 1024, 4096, 16384)
_PROMPTS = (16, 64, 256, 512, 1024, 1536, 2048, 4096, 8192)
_MAX_POINT_TOKENS = 80_000
_STEPS_A_SIZE = 6
_UNRECORDED = 8  # steps that were not timed, or are still in flight, at most


class GridPoint(NamedTuple):
    """Requests that are sent at once: with answers of several lengths, it is decodes of as many batch sizes."""

    prompt_len: int
    output_lens: tuple[int, ...]
    """Of each request, ascending."""


def run(engine_args: EngineArgs, args: argparse.Namespace) -> int:
    """Time the grid, fit, and write the step model."""
    import_scipy("optimize", "quire bench steps")
    out = Path(args.out)
    check_writable(out)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(engine_args.record or Path(folder) / "steps.jsonl.zst")
        llm = LLM(**vars(dataclasses.replace(engine_args, enable_prefix_caching=False, record=str(path))))
        try:
            device, core = get_device_name(llm.config.model.device), llm.engine_core
            num_slots = (core.capacity.num_blocks - 1) * llm.config.cache.block_size
            limits = llm.config.scheduler
            points = list_grid_points(
                limits.max_num_seqs, limits.max_num_batched_tokens, llm.config.model.max_model_len, num_slots
            )
            num_timed = _run_points(llm, points, args.seconds)
        finally:
            llm.shutdown()
        recording = read_recording(path)
    recording.header.device = device
    source = f"timed by quire bench steps on {recording.header.started}: {num_timed} grid points"
    model = fit_step_model([recording], out.stem, source)
    # Nothing arrived over HTTP: the requests of a point reach the engine core while it computes the first of them.
    model = msgspec.structs.replace(model, host=msgspec.structs.replace(model.host, arrival_us=0.0))
    save_step_model(model, out)
    fit = model.fit
    print(
        f"{device}, {model.model}: {fit['num_steps']:,.0f} steps, median error {fit['median_error']:.1%}, p95 "
        f"{fit['p95_error']:.1%}\nwrote {args.out}; use it with quire simulate --step-model {args.out}"
    )
    if args.json:
        print_json({"step_model": args.out, "device": device, **fit})
    return 0


def list_grid_points(
    max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, num_slots: int
) -> list[GridPoint]:
    """Batches of decodes by context, which shrink from the most requests to one through all sizes of CUDA graphs, and
    prompts by length, as far as the engine holds them."""
    points: list[GridPoint] = []
    most = min(num_slots, _MAX_POINT_TOKENS)
    for context in _CONTEXTS:
        length = min(context, max_model_len * 3 // 4)
        if length < context // 2 or length < 1:
            break
        num_reqs = min(max_num_seqs, most // length)
        while num_reqs:
            num_prompt_steps = 2 * -(-num_reqs * length // max_num_batched_tokens)
            point = GridPoint(length, _shrink_batch(num_reqs, num_prompt_steps))
            if length + point.output_lens[-1] <= max_model_len and _count_tokens(point) <= most:
                points.append(point)
                break
            num_reqs = num_reqs * 7 // 8
    for length in _PROMPTS:
        if length < max_model_len and length <= min(max_num_batched_tokens, most):
            points += [GridPoint(length, (1,))] * 4
    if not points:
        raise ConfigError("the engine holds no step of the grid: raise --max-model-len or the memory of its cache")
    return points


def _shrink_batch(num_reqs: int, num_prompt_steps: int) -> tuple[int, ...]:
    """Lengths of answers, so that some steps run with each size of a graph up to ``num_reqs`` requests.
    ``num_prompt_steps``: those in which the first requests decode already."""
    lens: list[int] = []
    for number, size in enumerate(choose_capture_sizes(num_reqs)):
        lens += [number] * (size - len(lens))
    longest = lens[-1]
    return tuple(num_prompt_steps + _STEPS_A_SIZE * (longest - number + 1) for number in reversed(lens))


def _count_tokens(point: GridPoint) -> int:
    return len(point.output_lens) * point.prompt_len + sum(point.output_lens)


def _run_points(llm: LLM, points: list[GridPoint], seconds: float) -> int:
    """As many points as the time allows, prompts and decodes in turn, and again while a fit needs more steps. How
    many."""
    start, done = time.monotonic(), 0
    for number, point in enumerate(cycle(_interleave(points))):
        has_enough = llm.engine_core.scheduler.stats()["steps_total"] > MIN_STEPS + _UNRECORDED
        if has_enough and (done >= len(points) or time.monotonic() - start > seconds):
            break
        vocab_size = llm.config.model.vocab_size
        prompts = [
            [(number * 7919 + i * 104729 + j) % (vocab_size - 8) + 4 for j in range(point.prompt_len)]
            for i in range(len(point.output_lens))
        ]
        params = [SamplingParams(temperature=0.0, max_tokens=each, ignore_eos=True) for each in point.output_lens]
        llm.generate(prompts, params)
        done += 1
    return done


def _interleave(points: list[GridPoint]) -> Iterator[GridPoint]:
    """The order in which points are timed: if time runs out, some of each kind and size are done."""
    stride = 7
    for first in range(stride):
        yield from points[first::stride]
