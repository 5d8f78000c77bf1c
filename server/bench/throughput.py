"""``quire bench throughput``: tokens per second offline, beside the floor and ``transformers.generate``."""

from __future__ import annotations

import argparse
import dataclasses
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from quire.core.engine.args import EngineArgs
from quire.core.engine.llm import LLM
from quire.core.errors import ConfigError
from quire.core.sampling_params import SamplingParams
from quire.server.bench.datasets import dataset_workload
from quire.server.bench.report import device_name, environment, print_json, speculation, speculation_line
from quire.server.bench.roofline import Ceilings, ModelShape, ceilings_of, decode_floor, workload_floor
from quire.server.bench.transformers_run import TransformersRun
from quire.server.bench.workloads import Workload, make_workload, random_workload

__all__ = ["run"]

_CPU_PROMPTS = 16


def run(engine_args: EngineArgs, args: argparse.Namespace) -> int:
    """Measure and print, one workload after another in one engine."""
    named = [make_workload(name) for name in _names(args)]
    _positive(args.scale)
    if args.enable_prefix_caching is None:
        engine_args = dataclasses.replace(engine_args, enable_prefix_caching=False)
    llm = LLM(**vars(engine_args))
    config = llm.config.model
    card = ceilings_of(device_name(config.device), Path(args.ceilings) if args.ceilings else None)
    count = args.num_prompts or (_CPU_PROMPTS if config.device == "cpu" else None)
    whole = [each.scaled(args.scale) for each in named or [_given(args, llm)]]
    workloads = [each.first(count).within(config.vocab_size) for each in whole]
    for workload in workloads:
        _check_fits(workload, config.max_model_len)
    measured = []
    for workload, before in zip(workloads, whole, strict=True):
        print(
            f"{workload.name}: {len(workload.prompts)} of {len(before.prompts)} requests, "
            f"{workload.input_tokens:,} tokens in, {workload.output_tokens:,} out; "
            f"{config.model} in {config.dtype} on {config.device}",
            flush=True,
        )
        found = _measure(llm, workload, args)
        _beside_the_floor(workload, llm, found, card)
        measured.append((workload, found))
    if _compares(args, config.device):
        _compare(measured, llm, args)
    if args.json:
        for _, found in measured:
            print_json(found)
    return 0


def _names(args: argparse.Namespace) -> list[str]:
    """The workloads asked for; none if the guides' options or a file say what to run."""
    given = [name for word in args.workload or () for name in word.split(",") if name]
    if args.dataset or args.input_len or args.output_len:
        if given:
            raise ConfigError(
                f"--workload {given[0]} fixes its prompts; leave out --dataset, --input-len and --output-len"
            )
        return []
    return given or ["nano"]


def _given(args: argparse.Namespace, llm: LLM) -> Workload:
    count = args.num_prompts or 1000
    if args.dataset:
        if args.input_len:
            raise ConfigError("--input-len does not go with --dataset, whose prompts have their own length")
        return dataset_workload(args.dataset, llm.tokenizer.encode, count, args.output_len)
    return random_workload(count, args.input_len or 1024, args.output_len or 128)


def _measure(llm: LLM, workload: Workload, args: argparse.Namespace) -> dict[str, Any]:
    config = llm.config.model
    _generate(llm, _warm_up(workload), args)
    walls = [_generate(llm, workload, args) for _ in range(args.repeat)]
    found: dict[str, Any] = {
        "workload": workload.name,
        "requests": len(workload.prompts),
        "input_tokens": workload.input_tokens,
        "output_tokens": workload.output_tokens,
        "model": config.model,
        "dtype": config.dtype,
        **environment(config.device),
        **_sampling(workload, args),
        "walls_s": [round(wall, 4) for wall in walls],
        **_rates(workload, statistics.median(walls)),
    }
    if re.match(r"decode-", workload.name):
        first = statistics.median(_generate(llm, workload.one_token(), args) for _ in range(args.repeat))
        found["decode_tok_s"] = (workload.output_tokens - len(workload.prompts)) / (found["wall_s"] - first)
    found["kernels_compiled"] = llm.stats().get("kernels_compiled_total", 0.0)
    print(_line("quire", found), flush=True)
    if stats := speculation(llm.stats()):
        found["speculation"] = stats
        print(speculation_line(stats), flush=True)
    return found


def _beside_the_floor(workload: Workload, llm: LLM, found: dict[str, Any], card: Ceilings | None) -> None:
    """How close the device's ceilings are, where they were measured."""
    if card is None:
        print(f"no floor: the ceilings of {found['device']} are not known; measure them once: quire bench ceilings")
        return
    shape = ModelShape.of_engine(llm.config)
    prompts, answers = [len(prompt) for prompt in workload.prompts], workload.max_tokens
    floor = found["floor_output_tok_s"] = workload.output_tokens / workload_floor(shape, prompts, answers, card)
    share = found["share_of_floor"] = found["output_tok_s"] / floor
    text = f"floor: {floor:,.1f} output tokens/s, of which {share:.1%}"
    if "decode_tok_s" in found:
        drawn = workload.output_tokens - len(prompts)
        floor = found["floor_decode_tok_s"] = drawn / decode_floor(shape, prompts, answers, card)
        share = found["decode_share_of_floor"] = found["decode_tok_s"] / floor
        text += f"; decode alone {floor:,.1f}, of which {share:.1%}"
    print(text, flush=True)


def _compare(measured: list[tuple[Workload, dict[str, Any]]], llm: LLM, args: argparse.Namespace) -> None:
    model = llm.config.model
    llm.shutdown()
    other = TransformersRun(model, args.compare_batch_size)
    for workload, found in measured:
        other.generate(_warm_up(workload))
        wall = other.generate(workload)
        beside = found["transformers"] = {"batch_size": args.compare_batch_size, **_rates(workload, wall)}
        if len(measured) > 1:
            print(f"{workload.name}:")
        print(_line(f"transformers.generate, batches of {args.compare_batch_size}", beside))
        found["times_transformers"] = found["output_tok_s"] / beside["output_tok_s"]
        print(f"quire is {found['times_transformers']:.2f} x transformers.generate", flush=True)


def _compares(args: argparse.Namespace, device: str) -> bool:
    """By default on a CPU only: on a GPU the engine's memory leaves no room for a second model."""
    return args.compare == "transformers" or (args.compare == "auto" and device == "cpu")


def _generate(llm: LLM, workload: Workload, args: argparse.Namespace) -> float:
    """Seconds for the whole workload."""
    common: dict[str, Any] = {**_sampling(workload, args), "ignore_eos": True, "detokenize": False}
    params = [SamplingParams(max_tokens=count, **common) for count in workload.max_tokens]
    start = time.perf_counter()
    outputs = llm.generate(workload.prompts, params, use_tqdm=sys.stderr.isatty())
    wall = time.perf_counter() - start
    made = [len(output.outputs[0].token_ids) for output in outputs]
    assert made == list(workload.max_tokens), "an answer is shorter than asked for"
    return wall


def _sampling(workload: Workload, args: argparse.Namespace) -> dict[str, float]:
    """What the flags say, else what the workload says."""
    temperature, top_p = (0.8, 0.95) if workload.sampled else (0.0, 1.0)
    return {
        "temperature": temperature if args.temperature is None else args.temperature,
        "top_p": top_p if args.top_p is None else args.top_p,
    }


def _warm_up(workload: Workload) -> Workload:
    few = workload.first(4)
    return dataclasses.replace(few, max_tokens=[min(8, count) for count in few.max_tokens])


def _rates(workload: Workload, wall: float) -> dict[str, float]:
    total = workload.input_tokens + workload.output_tokens
    return {
        "wall_s": wall,
        "requests_s": len(workload.prompts) / wall,
        "output_tok_s": workload.output_tokens / wall,
        "total_tok_s": total / wall,
    }


def _line(who: str, found: dict[str, Any]) -> str:
    decode = f", decode alone {found['decode_tok_s']:,.1f}" if "decode_tok_s" in found else ""
    return (
        f"{who}: {found['output_tok_s']:,.1f} output tokens/s{decode} ({found['total_tok_s']:,.1f} in all, "
        f"{found['requests_s']:.2f} requests/s, {found['wall_s']:.2f} s)"
    )


def _check_fits(workload: Workload, limit: int) -> None:
    pairs = zip(workload.prompts, workload.max_tokens, strict=True)
    longest = max(len(prompt) + count for prompt, count in pairs)
    if longest > limit:
        raise ConfigError(
            f"workload {workload.name} needs a context of {longest} tokens, the model has {limit}; "
            f"shrink it with --scale {int(100 * limit / longest) / 100:g}"
        )


def _positive(scale: float) -> None:
    if not 0 < scale <= 1:
        raise ConfigError(f"--scale must be above 0 and at most 1, got {scale}")
