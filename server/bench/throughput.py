"""``quire bench throughput``: tokens per second offline, beside the roofline bound and ``transformers.generate``."""

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
from quire.server.bench.datasets import load_dataset_workload
from quire.server.bench.report import (
    collect_speculation,
    describe_environment,
    format_speculation,
    get_device_name,
    print_json,
)
from quire.server.bench.roofline import (
    Ceilings,
    ModelShape,
    decode_bound,
    format_devices,
    load_ceilings,
    workload_bound,
)
from quire.server.bench.transformers_run import TransformersRun
from quire.server.bench.workloads import Workload, make_random_workload, make_workload

__all__ = ["run"]

_CPU_PROMPTS = 16


def run(engine_args: EngineArgs, args: argparse.Namespace) -> int:
    """Measure and print, one workload after another in one engine."""
    named_workloads = [make_workload(name) for name in _workload_names(args)]
    _check_scale(args.scale)
    if args.enable_prefix_caching is None:
        engine_args = dataclasses.replace(engine_args, enable_prefix_caching=False)
    llm = LLM(**vars(engine_args))
    config = llm.config.model
    ceilings = load_ceilings(get_device_name(config.device), Path(args.ceilings) if args.ceilings else None)
    count = args.num_prompts or (_CPU_PROMPTS if config.device == "cpu" else None)
    full_workloads = [each.scale_lengths(args.scale) for each in named_workloads or [_requested_workload(args, llm)]]
    workloads = [each.limit_requests(count).wrap_token_ids(config.vocab_size) for each in full_workloads]
    for workload in workloads:
        _check_context(workload, config.max_model_len)
    measured = []
    for workload, full_workload in zip(workloads, full_workloads, strict=True):
        print(
            f"{workload.name}: {len(workload.prompts)} of {len(full_workload.prompts)} requests, "
            f"{workload.input_tokens:,} tokens in, {workload.output_tokens:,} out; "
            f"{config.model} in {config.dtype} on {config.device}",
            flush=True,
        )
        figures = _measure_workload(llm, workload, args)
        _report_bound(workload, llm, figures, ceilings)
        measured.append((workload, figures))
    if _should_compare(args, config.device):
        _compare_with_transformers(measured, llm, args)
    if args.json:
        for _, figures in measured:
            print_json(figures)
    return 0


def _workload_names(args: argparse.Namespace) -> list[str]:
    """The requested workloads; none if a file or lengths are given instead."""
    names = [name for word in args.workload or () for name in word.split(",") if name]
    if args.dataset or args.input_len or args.output_len:
        if names:
            raise ConfigError(
                f"--workload {names[0]} fixes its prompts; leave out --dataset, --input-len and --output-len"
            )
        return []
    return names or ["nano"]


def _requested_workload(args: argparse.Namespace, llm: LLM) -> Workload:
    count = args.num_prompts or 1000
    if args.dataset:
        if args.input_len:
            raise ConfigError("--input-len does not go with --dataset, whose prompts have their own length")
        return load_dataset_workload(args.dataset, llm.tokenizer.encode, count, args.output_len)
    return make_random_workload(count, args.input_len or 1024, args.output_len or 128)


def _measure_workload(llm: LLM, workload: Workload, args: argparse.Namespace) -> dict[str, Any]:
    config = llm.config.model
    _time_generate(llm, _warmup_workload(workload), args)
    walls = [_time_generate(llm, workload, args) for _ in range(args.repeat)]
    figures: dict[str, Any] = {
        "workload": workload.name,
        "requests": len(workload.prompts),
        "input_tokens": workload.input_tokens,
        "output_tokens": workload.output_tokens,
        "model": config.model,
        "dtype": config.dtype,
        **describe_environment(config.device),
        **_sampling_options(workload, args),
        "walls_s": [round(wall, 4) for wall in walls],
        **_compute_rates(workload, statistics.median(walls)),
    }
    if re.match(r"decode-", workload.name):
        first = statistics.median(_time_generate(llm, workload.limit_to_one_token(), args) for _ in range(args.repeat))
        figures["decode_tok_s"] = (workload.output_tokens - len(workload.prompts)) / (figures["wall_s"] - first)
    figures["kernels_compiled"] = llm.get_stats().get("kernels_compiled_total", 0.0)
    print(_format_line("quire", figures), flush=True)
    if stats := collect_speculation(llm.get_stats()):
        figures["speculation"] = stats
        print(format_speculation(stats), flush=True)
    return figures


def _report_bound(workload: Workload, llm: LLM, figures: dict[str, Any], ceilings: Ceilings | None) -> None:
    """Compare with the roofline bound, where the device's ceilings were measured."""
    if ceilings is None:
        print(f"no roofline bound: no ceilings of {figures['device']} are known; measure them: quire bench ceilings")
        return
    shape = ModelShape.from_engine_config(llm.config)
    prompts, answers = [len(prompt) for prompt in workload.prompts], workload.max_tokens
    bound = figures["bound_output_tok_s"] = workload.output_tokens / workload_bound(shape, prompts, answers, ceilings)
    share = figures["share_of_bound"] = figures["output_tok_s"] / bound
    text = f"roofline bound{format_devices(shape)}: {bound:,.1f} output tokens/s, of which {share:.1%}"
    if "decode_tok_s" in figures:
        num_decoded = workload.output_tokens - len(prompts)
        bound = figures["bound_decode_tok_s"] = num_decoded / decode_bound(shape, prompts, answers, ceilings)
        share = figures["decode_share_of_bound"] = figures["decode_tok_s"] / bound
        text += f"; decode alone {bound:,.1f}, of which {share:.1%}"
    print(text, flush=True)


def _compare_with_transformers(
    measured: list[tuple[Workload, dict[str, Any]]], llm: LLM, args: argparse.Namespace
) -> None:
    model = llm.config.model
    llm.shutdown()
    transformers_run = TransformersRun(model, args.compare_batch_size)
    for workload, figures in measured:
        transformers_run.generate(_warmup_workload(workload))
        wall = transformers_run.generate(workload)
        comparison = figures["transformers"] = {"batch_size": args.compare_batch_size, **_compute_rates(workload, wall)}
        if len(measured) > 1:
            print(f"{workload.name}:")
        print(_format_line(f"transformers.generate, batches of {args.compare_batch_size}", comparison))
        figures["times_transformers"] = figures["output_tok_s"] / comparison["output_tok_s"]
        print(f"quire is {figures['times_transformers']:.2f} x transformers.generate", flush=True)


def _should_compare(args: argparse.Namespace, device: str) -> bool:
    """By default on a CPU only: on a GPU the engine's memory leaves no memory for a second model."""
    return args.compare == "transformers" or (args.compare == "auto" and device == "cpu")


def _time_generate(llm: LLM, workload: Workload, args: argparse.Namespace) -> float:
    """Seconds for the whole workload."""
    common: dict[str, Any] = {**_sampling_options(workload, args), "ignore_eos": True, "detokenize": False}
    params = [SamplingParams(max_tokens=count, **common) for count in workload.max_tokens]
    start = time.perf_counter()
    outputs = llm.generate(workload.prompts, params, use_tqdm=sys.stderr.isatty())
    wall = time.perf_counter() - start
    lengths = [len(output.outputs[0].token_ids) for output in outputs]
    assert lengths == list(workload.max_tokens), "an answer is shorter than requested"
    return wall


def _sampling_options(workload: Workload, args: argparse.Namespace) -> dict[str, float]:
    """From the flags, else from the workload."""
    temperature, top_p = (0.8, 0.95) if workload.sampled else (0.0, 1.0)
    return {
        "temperature": temperature if args.temperature is None else args.temperature,
        "top_p": top_p if args.top_p is None else args.top_p,
    }


def _warmup_workload(workload: Workload) -> Workload:
    warmup = workload.limit_requests(4)
    return dataclasses.replace(warmup, max_tokens=[min(8, count) for count in warmup.max_tokens])


def _compute_rates(workload: Workload, wall: float) -> dict[str, float]:
    total = workload.input_tokens + workload.output_tokens
    return {
        "wall_s": wall,
        "requests_s": len(workload.prompts) / wall,
        "output_tok_s": workload.output_tokens / wall,
        "total_tok_s": total / wall,
    }


def _format_line(engine: str, figures: dict[str, Any]) -> str:
    decode = f", decode alone {figures['decode_tok_s']:,.1f}" if "decode_tok_s" in figures else ""
    return (
        f"{engine}: {figures['output_tok_s']:,.1f} output tokens/s{decode} ({figures['total_tok_s']:,.1f} in all, "
        f"{figures['requests_s']:.2f} requests/s, {figures['wall_s']:.2f} s)"
    )


def _check_context(workload: Workload, limit: int) -> None:
    pairs = zip(workload.prompts, workload.max_tokens, strict=True)
    longest = max(len(prompt) + count for prompt, count in pairs)
    if longest > limit:
        raise ConfigError(
            f"workload {workload.name} needs a context of {longest} tokens, the model has {limit}; "
            f"shrink it with --scale {int(100 * limit / longest) / 100:g}"
        )


def _check_scale(scale: float) -> None:
    if not 0 < scale <= 1:
        raise ConfigError(f"--scale must be above 0 and at most 1, got {scale}")
