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
from quire.server.bench.report import device_name, environment, percentiles, print_json, progress
from quire.server.bench.roofline import ModelShape, ceilings_of, workload_floor
from quire.server.bench.workloads import random_prompts

__all__ = ["run"]


def run(engine_args: EngineArgs, args: argparse.Namespace) -> int:
    """Measure and print."""
    if args.enable_prefix_caching is None:
        engine_args = dataclasses.replace(engine_args, enable_prefix_caching=False)
    llm = LLM(**vars(engine_args))
    config = llm.config.model
    draw = random.Random(0)
    params = SamplingParams(temperature=0.0, max_tokens=args.output_len, ignore_eos=True, detokenize=False)
    walls: list[float] = []
    bar = progress(args.num_iters_warmup + args.num_iters, "iterations", "iter")
    for turn in range(args.num_iters_warmup + args.num_iters):
        prompts = random_prompts(draw, args.batch_size, args.input_len, config.vocab_size)
        start = time.perf_counter()
        llm.generate(prompts, params)
        if turn >= args.num_iters_warmup:
            walls.append(time.perf_counter() - start)
        bar.update()
    bar.close()
    found = percentiles(walls)
    each = found["p50"] / args.output_len
    print(
        f"{config.model} in {config.dtype} on {config.device}: {args.batch_size} prompts of {args.input_len} tokens, "
        f"{args.output_len} out: mean {found['mean']:.4f} s, median {found['p50']:.4f} s, p99 {found['p99']:.4f} s, "
        f"{each * 1000:.2f} ms a token"
    )
    device = device_name(config.device)
    card = ceilings_of(device, Path(args.ceilings) if args.ceilings else None)
    if card is not None:
        sizes, size = ModelShape.of_engine(llm.config), args.batch_size
        found["floor"] = workload_floor(sizes, [args.input_len] * size, [args.output_len] * size, card)
        print(f"floor: {found['floor']:.4f} s, share of it {found['floor'] / found['p50']:.1%}")
    if args.json:
        shape = {name: getattr(args, name) for name in ("batch_size", "input_len", "output_len", "num_iters")}
        times = {f"{name}_s": value for name, value in found.items()}
        print_json({"model": config.model, "dtype": config.dtype, **environment(config.device), **shape, **times})
    return 0
