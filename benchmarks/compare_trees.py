"""Is this tree slower than that one? Both run the same workloads in turn on one machine, the old one twice.

    python benchmarks/compare_trees.py OLD NEW --model MODEL --workload nano decode-bs1 prefill --rounds 5 \\
        --engine '{"quantization": "fp8"}'

OLD and NEW are checkouts. Three engines live at once, each in a process of its own with ``num_gpu_blocks_override``
blocks: OLD, OLD again and NEW. In each round every engine runs every workload, in an order that rotates. Printed are
the medians and two ratios: NEW / OLD, and the A/A ratio OLD again / OLD: what this machine cannot tell apart.
A workload ``decode-...`` counts its decoded tokens alone: the wall time less that of the same prompts with one token.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ARMS = ("old", "again", "new")


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--workload", nargs="+", default=["nano"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=12_000, help="KV blocks of each engine")
    parser.add_argument("--scale", type=float, default=1.0, help="shrink lengths, to try this script out on a CPU")
    parser.add_argument("--num-prompts", type=int, default=None, help="first so many requests of each workload")
    parser.add_argument("--engine", type=json.loads, default={}, metavar="JSON", help="further arguments of LLM")
    parser.add_argument("--engine-new", type=json.loads, default={}, metavar="JSON", help="and of NEW alone")
    parser.add_argument("--serve", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return run_engine(args)
    trees = {"old": args.old, "again": args.old, "new": args.new}
    children = {arm: start_engine(tree, arm) for arm, tree in trees.items()}
    try:
        for arm, child in children.items():
            print(f"{arm}: ready {read_reply(child)} s after its start", flush=True)
        rates: dict[tuple[str, str], list[float]] = {(arm, name): [] for arm in ARMS for name in args.workload}
        for child in children.values():
            for name in args.workload:
                ask(child, f"{name} warm-up")
        for round_ in range(args.rounds):
            for turn in range(len(ARMS)):
                arm = ARMS[(round_ + turn) % len(ARMS)]
                for name in args.workload:
                    rates[arm, name].append(ask(children[arm], name))
    finally:
        for child in children.values():
            child.kill()
    print_table(args.workload, rates)
    return 0


def print_table(workloads: list[str], rates: dict[tuple[str, str], list[float]]) -> None:
    """Medians in tokens/s, and ratios of the medians in percent."""
    print(f"{'workload':<22} {'old':>10} {'old again':>10} {'new':>10} {'A/A %':>7} {'new %':>7}")
    for name in workloads:
        old, again, new = (statistics.median(rates[arm, name]) for arm in ARMS)
        aa, change = 100 * (again / old - 1), 100 * (new / statistics.median([old, again]) - 1)
        print(f"{name:<22} {old:>10,.1f} {again:>10,.1f} {new:>10,.1f} {aa:>+7.2f} {change:>+7.2f}", flush=True)


def start_engine(tree: Path, arm: str) -> subprocess.Popen[str]:
    """This script again, as one engine of ``tree``."""
    environment = {**os.environ, "PYTHONPATH": f"{tree / 'src'}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, __file__, *sys.argv[1:], "--serve", arm]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def ask(child: subprocess.Popen[str], workload: str) -> float:
    """Tokens per second of one run."""
    assert child.stdin is not None
    child.stdin.write(workload + "\n")
    child.stdin.flush()
    return float(read_reply(child))


def read_reply(child: subprocess.Popen[str]) -> str:
    """The next line of an engine's answers."""
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        raise SystemExit("an engine ended; what it wrote stands above")
    return line.strip()


def run_engine(args: argparse.Namespace) -> int:
    """Answer each workload's name on standard input with its tokens per second."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed must not look like an answer
    from quire import LLM, SamplingParams
    from quire.server.bench.workloads import make_workload

    options: dict[str, Any] = {
        "model": args.model,
        "tokenizer": "quire-tiny",
        "load_format": "dummy",
        "max_model_len": 4096,
        "max_num_batched_tokens": 16384,
        "enable_prefix_caching": False,
        "num_gpu_blocks_override": args.blocks,
        **args.engine,
        **(args.engine_new if args.serve == "new" else {}),
    }
    began = time.perf_counter()
    llm = LLM(**options)

    def run(prompts: list[list[int]], lengths: list[int]) -> float:
        params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True, detokenize=False) for n in lengths]
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start

    print(f"{time.perf_counter() - began:.1f}", file=answers, flush=True)
    for line in sys.stdin:
        name, _, warm_up = line.strip().partition(" ")
        num_prompts = 4 if warm_up else args.num_prompts
        # Only ``make_workload`` and its two fields are used: older trees have them too.
        workload, vocab = make_workload(name), llm.config.model.vocab_size
        prompts = [
            [token % vocab for token in prompt[: max(1, round(len(prompt) * args.scale))]]
            for prompt in workload.prompts[:num_prompts]
        ]
        lengths = [max(1, round(n * args.scale)) for n in workload.max_tokens[:num_prompts]]
        wall = run(prompts, lengths)
        if name.startswith("decode-"):
            wall -= run(prompts, [1] * len(prompts))
            rate = (sum(lengths) - len(lengths)) / wall
        elif name.startswith("prefill"):
            rate = sum(map(len, prompts)) / wall
        else:
            rate = sum(lengths) / wall
        print(rate, file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
