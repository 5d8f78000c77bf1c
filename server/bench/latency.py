"""``quire bench latency``: the time of one batch, repeated."""

from __future__ import annotations

import argparse
import dataclasses
import random
import time
from pathlib import Path

from quire.core.engine.args import EngineArgs
from quire.core.engine.llm import LLM
from quire.core.sampling_params import SamplingParams
from quire.server.bench.report import (
    compute_percentiles,
    describe_environment,
    get_device_name,
    make_progress_bar,
    print_json,
)
from quire.server.bench.roofline import ModelShape, format_devices, load_ceilings, workload_bound
from quire.server.bench.workloads import make_random_prompts

__all__ = ["run"]


def run(engine_args: EngineArgs, args: argparse.Namespace) -> int:
    """Measure and print."""
    if args.enable_prefix_caching is None:
        engine_args = dataclasses.replace(engine_args, enable_prefix_caching=False)
    llm = LLM(**vars(engine_args))
    config = llm.config.model
    rng = random.Random(0)
    params = SamplingParams(temperature=0.0, max_tokens=args.output_len, ignore_eos=True, detokenize=False)
    walls: list[float] = []
    bar = make_progress_bar(args.num_iters_warmup + args.num_iters, "iterations", "iter")
    for iteration in range(args.num_iters_warmup + args.num_iters):
        prompts = make_random_prompts(rng, args.batch_size, args.input_len, config.vocab_size)
        start = time.perf_counter()
        llm.generate(prompts, params)
        if iteration >= args.num_iters_warmup:
            walls.append(time.perf_counter() - start)
        bar.update()
    bar.close()
    figures = compute_percentiles(walls)
    seconds_per_token = figures["p50"] / args.output_len
    print(
        f"{config.model} in {config.dtype} on {config.device}: {args.batch_size} prompts of {args.input_len} tokens, "
        f"{args.output_len} out: mean {figures['mean']:.4f} s, median {figures['p50']:.4f} s, "
        f"p99 {figures['p99']:.4f} s, {seconds_per_token * 1000:.2f} ms a token"
    )
    device = get_device_name(config.device)
    ceilings = load_ceilings(device, Path(args.ceilings) if args.ceilings else None)
    if ceilings is not None:
        sizes, size = ModelShape.from_engine_config(llm.config), args.batch_size
        figures["bound"] = workload_bound(sizes, [args.input_len] * size, [args.output_len] * size, ceilings)
        share = figures["bound"] / figures["p50"]
        print(f"roofline bound{format_devices(sizes)}: {figures['bound']:.4f} s, share of it {share:.1%}")
    if args.json:
        shape = {name: getattr(args, name) for name in ("batch_size", "input_len", "output_len", "num_iters")}
        times = {f"{name}_s": value for name, value in figures.items()}
        print_json(
            {"model": config.model, "dtype": config.dtype, **describe_environment(config.device), **shape, **times}
        )
    return 0
