"""What structured output costs and saves: guided beside unguided requests, and forced tokens at batch 1.

    PYTHONPATH=src:benchmarks python benchmarks/structured_output.py prepare FOLDER    # trains the tokenizer, ~1 min
    PYTHONPATH=src:benchmarks python benchmarks/structured_output.py run FOLDER

A different JSON schema for each request, of 3 to 12 properties with values of 1 to 40 tokens. Every answer has at least
128 tokens; an unguided request generates as many tokens as the guided one of its number. Schemas are compiled before
what is measured, as they are over HTTP. Drafts of forced tokens gain at most as much as there are of them: with a share
of 25 %, 1.33 times. The tokenizer is a byte-level
BPE of 128,000 tokens, trained on the standard library of this Python and on files of PyTorch. ``--size tiny`` is for a
look on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import llguidance
import numpy as np
import torch
from step_probe import StepProbe
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from quire import LLM, SamplingParams, StructuredOutputsParams
from quire.core.stats import StepStats
from quire.plugins.structured_output import guidance

SIZES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 8192},
}  # fmt: skip
WORDS = [
    "account", "address", "amount", "balance", "category", "city", "code", "color", "comment", "count", "country",
    "created", "currency", "date", "description", "discount", "email", "end_time", "error", "expires", "first_name",
    "height", "id", "label", "language", "last_name", "latitude", "length", "level", "limit", "location",
    "longitude", "name", "note", "offset", "order", "owner", "parent", "phone", "priority", "quantity", "rating",
    "reason", "region", "score", "size", "source", "start_time", "state", "status", "street", "summary", "target",
    "title", "total", "type", "unit", "updated", "url", "user", "value", "version", "weight", "zip"
]  # fmt: skip

ARMS = ("guided", "unguided", "guided, schemas used before")
WARM_UP = 1 << 20
"""Number of a workload that nothing is measured with: a generator takes a seed below zero for the one above."""
_TOKENS_BESIDE_VALUE = 5
"""Of a property: its name and what stands around that, at the least."""
_NUM_TORCH_FILES = 1000
"""The standard library alone has too few different words for 128,000 tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("prepare", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="8b")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--single", type=int, default=12, help="requests one after the other, for forced tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--part", choices=("batch", "alone", "forced"), help="of ``run``; all, one after the other")
    parser.add_argument("--variants", action="store_true", help="of how masks are made, with ``--part batch``")
    args = parser.parse_args()
    if args.action == "prepare":
        prepare(args.folder, args.size)
    elif args.part is None:
        run(args)
    else:
        run_batch(args) if args.part == "batch" else run_single(args)


def prepare(folder: Path, size: str) -> None:
    """A model folder without weights, which ``--load-format dummy`` makes up. It may be moved."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["structured_output_model:LongTokenLlama"], "model_type": "llama", "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "max_position_embeddings": 8192,
        "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
        "tie_word_embeddings": False, "dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 0,
        "attention_bias": False,
        "mlp_bias": False, "token_lengths": "token_lengths.pt", **SIZES[size],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    files = [file for file in find_sources(sysconfig.get_paths()["stdlib"]) if "site-packages" not in file.parts]
    files += find_sources(torch.__path__[0])[:_NUM_TORCH_FILES]
    files = files[: 200 if size == "tiny" else None]
    trainer = trainers.BpeTrainer(
        vocab_size=min(SIZES[size]["vocab_size"], 128_000),
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (file.read_text(encoding="utf-8", errors="ignore") for file in files)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "model_max_length": 8192})
    )
    lengths = torch.zeros(SIZES[size]["vocab_size"])
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = 0.0 if token == "<|end|>" else len(token) if len(token) <= 16 else 0.0
    torch.save(lengths, folder / "token_lengths.pt")
    print(f"{tokenizer.get_vocab_size()} tokens, from {len(files)} files")


def find_sources(folder: str) -> list[Path]:
    """Python files, in an order that is always the same."""
    return sorted(Path(folder).rglob("*.py"))


def make_schema(rng: random.Random) -> dict[str, Any]:
    """3 to 12 properties with names of 1 to 3 words, and values of 1 to 40 tokens: many short ones and few long ones,
    their lengths even by the logarithm. An answer has at least 128 tokens."""
    names = list(dict.fromkeys("_".join(rng.sample(WORDS, rng.randint(1, 3))) for _ in range(rng.randint(3, 12))))
    lengths = [round(40 ** rng.random()) for _ in names]
    while sum(lengths) + _TOKENS_BESIDE_VALUE * len(names) < 128:  # longer values, then more of them
        if min(lengths) == 40:
            lengths.append(40)
            names.append(rng.choice([word for word in WORDS if word not in names]))
        lengths = [min(40, length + 8) for length in lengths]
    properties: dict[str, Any] = {}
    for name, length in zip(names, lengths, strict=True):
        kind = rng.random()
        if length <= 4 and kind < 0.5:
            properties[name] = {"enum": rng.sample(WORDS, 5)} if kind < 0.25 else {"type": "boolean"}
        else:  # this model prefers tokens of 16 characters
            properties[name] = {"type": "string", "minLength": 16 * length, "maxLength": 16 * length}
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def make_prompts(args: argparse.Namespace) -> list[list[int]]:
    """Prompts of no earlier request: arms with the same ones would find them in the prefix cache."""
    return np.random.default_rng().integers(1000, 8000, (args.requests, 64)).tolist()


def make_workload(args: argparse.Namespace, number: int = 0) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts, and the parameters of their guided requests; those of another ``number`` have other schemas."""
    rng = random.Random(number)
    schemas = [make_schema(rng) for _ in range(args.requests)]
    prompts = [[rng.randrange(1000, 8000) for _ in range(64)] for _ in schemas]
    constraints = [StructuredOutputsParams(json=schema, disable_any_whitespace=True) for schema in schemas]
    return prompts, [
        SamplingParams(temperature=1, seed=i, max_tokens=2048, structured_outputs=constraint)
        for i, constraint in enumerate(constraints)
    ]


def start_llm(args: argparse.Namespace, **settings: Any) -> LLM:
    """An engine of the benchmark's model."""
    return LLM(model=str(args.folder), load_format="dummy", max_model_len=4096, **settings)


def run_batch(args: argparse.Namespace) -> None:
    """Guided requests beside unguided ones, in turn: with schemas that are new, and again with the same."""
    llm = start_llm(args, max_num_seqs=args.requests)
    llm.generate(*make_workload(args, WARM_UP))
    gc.collect()
    gc.freeze()  # as a server does after its start
    backend: Any = llm.engine_core._structured_outputs._compiler.get_backend()
    print(f"{backend._num_threads} threads, {len(os.sched_getaffinity(0))} of {os.cpu_count()} CPUs")
    probe = StepProbe(llm)
    measured: dict[str, list[Measured]] = {}

    def measure(name: str, prompts: list[list[int]], params: list[SamplingParams]) -> list[int]:
        probe.begin()
        start = time.perf_counter()
        outputs = llm.generate(prompts, params)
        seconds = time.perf_counter() - start
        lengths = [len(output.outputs[0].token_ids) for output in outputs]
        steps = list(llm.steps)
        figures = Measured(sum(lengths) / seconds, find_p99_of_steps(steps), steps, probe.summarize(args.requests))
        measured.setdefault(name, []).append(figures)
        if len(measured[name]) == args.repeats or name not in ARMS:
            probe.report(name, args.requests)
        return lengths

    for number in range(args.repeats):
        prompts, guided = make_workload(args, number)
        for params in guided:
            assert params.structured_outputs is not None
            llm.engine_core._structured_outputs.compile_and_wait(params.structured_outputs)
        lengths = measure("guided", prompts, guided)
        print(f"answers: {min(lengths)} to {max(lengths)} tokens, {statistics.mean(lengths):.0f} on average")
        unguided = [
            SamplingParams(temperature=1, seed=i, max_tokens=length, ignore_eos=True)
            for i, length in enumerate(lengths)
        ]
        measure("unguided", make_prompts(args), unguided)
        measure("guided, schemas used before", make_prompts(args), guided)
    for name, each in measured.items():
        print_phases(name, [figures.steps for figures in each], args.requests)
    print_summary(measured)
    if args.variants:
        for name, change, undo in list_variants(backend):
            change()
            for _ in range(2):
                measure(f"guided, used before, {name}", make_prompts(args), guided)
            undo()
        print_summary(measured)
    print({k: round(v, 4) for k, v in llm.get_stats().items() if k.startswith("structured_output")})
    llm.shutdown()


class Measured(NamedTuple):
    """One run of an arm."""

    rate: float
    p99: float
    steps: list[StepStats]
    summary: dict[str, float]


def list_variants(backend: Any) -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    """Other ways to make masks: a name, and what changes to it and back."""

    def replace(name: str, owner: Any, attribute: str, value: Any) -> tuple[str, Callable[[], Any], Callable[[], Any]]:
        return name, partial(setattr, owner, attribute, value), partial(setattr, owner, attribute, before)

    follower = backend._follower
    before: Any = guidance._MAX_COMPUTED_HERE
    yield replace("library never in the engine's thread", guidance, "_MAX_COMPUTED_HERE", 0)
    yield replace("library always in the engine's thread", guidance, "_MAX_COMPUTED_HERE", 1 << 30)
    before = follower.begin_catch_up
    yield replace("matchers follow in the step", follower, "begin_catch_up", lambda behind: None)
    before = True
    yield replace("masks in a thread", type(backend), "fills_soon", False)
    before = follower.executor
    for count in (1, 3, 15):
        yield replace(f"{count} threads", follower, "executor", llguidance.LLExecutor(count))


def print_summary(measured: dict[str, list[Measured]]) -> None:
    """One line for each arm and variant, and what was wanted."""
    columns = ("masks", "fill", "upload", "outputs", "wait", "idle before", "idle for masks")
    heads = [f"{head:>17}" for head in ("tokens/s", "p99 step", *columns)]
    print(f"{'medians of runs; p50 and p99, ms':44}" + "".join(heads))
    for name, each in measured.items():
        rate, p99 = (statistics.median(getattr(figures, field) for figures in each) for field in ("rate", "p99"))
        cells = [f"{rate:17.0f}", f"{p99:17.2f}"]
        for column in columns:
            found = [
                statistics.median(figures.summary[f"{column} {percent}"] for figures in each)
                for percent in ("p50", "p99")
                if all(f"{column} {percent}" in figures.summary for figures in each)
            ]
            cells.append(f"{' / '.join(f'{value:.2f}' for value in found):>17}")
        print(f"{name:44}" + "".join(cells))
    for name in ("guided", "guided, schemas used before"):
        pairs = list(zip(measured[name], measured["unguided"], strict=True))
        ratio = statistics.median(guided.rate / unguided.rate for guided, unguided in pairs)
        difference = statistics.median(guided.p99 - unguided.p99 for guided, unguided in pairs)
        print(f"{name}: {100 * ratio:.1f} % of the tokens/s of unguided, p99 step {difference:+.2f} ms")


def find_p99_of_steps(steps: list[StepStats]) -> float:
    """The 99th percentile of the time between two steps' tokens, of decodes alone, in milliseconds."""
    return float(np.percentile(np.diff([each.end_us for each in steps if each.num_decodes == each.num_reqs]), 99)) / 1e3


def print_phases(name: str, runs: list[list[StepStats]], num_requests: int) -> None:
    """Where the time of steps went: while prompts are computed, while all requests decode, and while they end.

    ``gap`` is the time since the tokens of the step before. ``held`` is what passes between the launch of a step's
    model and that of its sampling, ``masks`` the part of that in which its masks are made. ``wait`` is for the step's
    own tokens: near zero where the device is idle."""
    phases: dict[str, list[tuple[float, StepStats]]] = {"prompts": [], "all decode": [], "some have ended": []}
    for before, step in itertools.chain.from_iterable(map(itertools.pairwise, runs)):
        decodes = "all decode" if step.num_reqs == num_requests else "some have ended"
        phase = decodes if step.num_decodes == step.num_reqs else "prompts"
        phases[phase].append((step.end_us - before.end_us, step))
    for phase, entries in phases.items():
        milliseconds = sum(gap for gap, _ in entries) / len(runs) / 1e3
        print(f"{name}, {phase}: {len(entries) / len(runs):.0f} steps, {milliseconds:.1f} ms")
        columns = {"gap": [gap for gap, _ in entries]}
        for field in ("device", "schedule", "launch", "held", "masks", "wait", "update"):
            columns[field] = [getattr(step, f"{field}_us") for _, step in entries]
        for column, values in columns.items():
            if entries and any(values):
                figures = [*(np.percentile(values, [50, 90, 99]) / 1e3), max(values) / 1e3]
                print(f"    {column:9} p50, p90, p99, most: {', '.join(f'{each:.2f}' for each in figures)} ms")


def run_single(args: argparse.Namespace) -> None:
    """One request after the other, with or without drafts of forced tokens."""
    prompts, guided = make_workload(args)
    drafting = {"spec_method": "forced_tokens"} if args.part == "forced" else {}
    llm = start_llm(args, max_num_seqs=8, **drafting)
    for i in range(-2, 0):
        llm.generate([prompts[i]], guided[i])  # until it is known what drafts cost
    llm.steps.clear()
    before, start, num_tokens, num_steps = llm.get_stats(), time.perf_counter(), 0, 0
    for prompt, params in zip(prompts[: args.single], guided, strict=False):
        num_tokens += len(llm.generate([prompt], params)[0].outputs[0].token_ids)
        num_steps += sum(step.num_decodes > 0 for step in llm.steps)
        print_phases(args.part, [list(llm.steps)], 1) if params is guided[0] else None
        llm.steps.clear()
    seconds, after = time.perf_counter() - start, llm.get_stats()
    print(f"batch 1, {args.part}: {num_tokens / seconds:.1f} tokens/s, {num_tokens / num_steps:.3f} tokens a step")
    if drafting:
        accepted, drafted = (
            after[name] - before[name]
            for name in ("spec_decode_num_accepted_tokens_total", "spec_decode_num_draft_tokens_total")
        )
        print(f"{accepted / num_tokens:.1%} of the tokens were drafts that were accepted, of {drafted:.0f}")
    print(json.dumps({"tokens_per_s": num_tokens / seconds}))
    llm.shutdown()


def run(args: argparse.Namespace) -> None:
    """Every part in a process of its own, so that each has the GPU to itself."""
    rates = {}
    for part in ("batch", "alone", "forced"):
        command = [sys.executable, __file__, "run", str(args.folder), "--part", part]
        for name in ("requests", "single", "repeats"):
            command += [f"--{name}", str(getattr(args, name))]
        last = ""
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                last = line
        if process.returncode:
            raise SystemExit(f"{part} ended with {process.returncode}")
        if part != "batch":
            rates[part] = json.loads(last)["tokens_per_s"]
    print(f"forced tokens: {rates['forced'] / rates['alone']:.2f}x")


if __name__ == "__main__":
    sys.exit(main())
