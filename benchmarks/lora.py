"""What LoRA adapters cost a decode step: none, one, several, and a load under traffic, beside an engine without them.

    PYTHONPATH=src:benchmarks python benchmarks/lora.py benchmarks/models/llama-3.1-8b [--quantization fp8]

Weights are made up (``--load-format dummy``), and so are the adapters, of rank 16 on all linear layers or on queries
and values. A step's time is the median distance between the ends of steps in which every request decodes. Requests get
the adapter that their first token names, in the worker, so that the scheduler's part is the same in every row.
``--batches 1 4 --many 4 --prompt 64 --tokens 16`` with ``core/assets/quire-tiny`` is for a look on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from quire import LLM, SamplingParams
from quire.core.config import AdapterConfig, EngineConfig
from quire.core.contracts.executor import KVCapacity
from quire.core.messages import SchedulerOutput
from quire.core.testing.tiny_adapters import make_tiny_adapter
from quire.core.worker.uniproc_executor import UniprocExecutor

FIRST_TOKEN, RANK, NUM_SLOTS = 100, 16, 64


class SlotByToken(UniprocExecutor):
    """A request's slot is its first token less ``FIRST_TOKEN``. Notes when each step is launched, and between two steps
    stages and loads what is asked for."""

    target_modules: tuple[str, ...] = ()

    def __init__(self, config: EngineConfig, options: object = None) -> None:
        adapters = AdapterConfig(NUM_SLOTS, RANK, NUM_SLOTS, target_modules=self.target_modules)
        super().__init__(replace(config, adapters=adapters), options)
        self.launched_at: list[float] = []
        self.load_under_traffic: tuple[int, int, str] | None = None
        """Slot, adapter's number and folder."""

    def start(self) -> KVCapacity:
        capacity = super().start()
        runner = self.worker.model_runner
        execute_model = runner.execute_model

        def execute_with_slots(step: SchedulerOutput) -> None:
            for request in step.new_requests:
                slot = request.token_ids[0] - FIRST_TOKEN
                request.adapter_slot = slot if 0 <= slot < NUM_SLOTS else -1
            self.launched_at.append(time.perf_counter())
            if self.load_under_traffic is not None and len(self.launched_at) > 30:
                slot, adapter_id, path = self.load_under_traffic
                call = self.worker.control.call_method
                if call("stage_adapter", {"adapter_id": adapter_id, "path": path}) and call(
                    "load_adapter", {"slot": slot, "adapter_id": adapter_id}
                ):
                    self.load_under_traffic = None
            execute_model(step)

        runner.execute_model = execute_with_slots  # type: ignore[method-assign]
        return capacity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64, 256])
    parser.add_argument("--many", type=int, default=64, help="rows of cases with several adapters, one of --batches")
    parser.add_argument("--quantization", default="auto")
    parser.add_argument("--target-modules", nargs="+", default=[], help="as --lora-target-modules; q_proj v_proj")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=1024)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quire-lora-") as folder:
        run(args, Path(folder))


def run(args: argparse.Namespace, where: Path) -> None:
    """Print a row a case."""
    some = {"rank": RANK, "scale": 0.01, "dtype": torch.bfloat16}
    folders = [make_tiny_adapter(args.model, where / f"{seed}", seed=seed, **some) for seed in range(2)]
    narrow = make_tiny_adapter(args.model, where / "qv", target_modules=["q_proj", "v_proj"], **some)
    batches, many = args.batches, args.many
    plain = make_llm(args)
    base = {batch: measure(plain, args, [-1] * batch) for batch in batches}
    plain.shutdown()
    del plain
    gc.collect()  # before the next engine looks how much memory is free
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    SlotByToken.target_modules = tuple(args.target_modules)
    llm = make_llm(args, executor=f"{SlotByToken.__module__}:{SlotByToken.__qualname__}")
    print(f"{'adapters':>24} {'batch':>5} {'ms':>8} {'without':>8} {'more':>7}")

    def show(name: str, slots: list[int]) -> None:
        batch = len(slots)
        ms = measure(llm, args, slots)
        print(f"{name:>24} {batch:5} {ms:8.3f} {base[batch]:8.3f} {100 * (ms / base[batch] - 1):6.1f}%", flush=True)

    for batch in batches:
        show("none active", [-1] * batch)
    if not args.target_modules:
        show_all_linear_layers(args, llm, folders, show)
    load_all(llm, [narrow])
    show("one, queries and values", [0] * many)
    show("64, queries and values", list(range(many)))
    llm.shutdown()


def show_all_linear_layers(args: argparse.Namespace, llm: LLM, folders: list[Path], show: Callable[..., None]) -> None:
    """Rows of adapters on all of them, and of a load under traffic."""
    batches, many = args.batches, args.many
    load_all(llm, folders)
    for batch in batches:
        show("one, all linear layers", [0] * batch)
    show("8, all linear layers", [i % 8 for i in range(many)])
    show("64, all linear layers", list(range(many)))
    show("half of the rows", [0 if i % 2 else -1 for i in range(many)])
    measure_load(llm, args, folders[1], many)


def make_llm(args: argparse.Namespace, **settings: Any) -> LLM:
    return LLM(
        str(args.model),
        tokenizer="quire-tiny",
        load_format="dummy", quantization=args.quantization, max_num_seqs=max(args.batches),
        max_model_len=2048, **settings,
    )  # fmt: skip


def measure(llm: LLM, args: argparse.Namespace, slots: list[int]) -> float:
    """Milliseconds of a decode step of all these requests: the median over steps, and then over runs."""
    prompts = [
        [99 if slot < 0 else FIRST_TOKEN + slot, 5 + row, *range(5, 3 + args.prompt)] for row, slot in enumerate(slots)
    ]  # of which no two share a block
    params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True, detokenize=False)
    medians = []
    for _ in range(args.repeats):
        llm.steps.clear()
        llm.generate(prompts, params)
        ends = [step.end_us for step in llm.steps if step.num_decodes == step.num_reqs == len(slots)]
        medians.append(statistics.median(b - a for a, b in pairwise(ends)) / 1000)
    return statistics.median(medians)


def measure_load(llm: LLM, args: argparse.Namespace, folder: Path, batch: int) -> None:
    """The longest step while an adapter is staged and loaded into a slot that none uses."""
    executor: Any = llm.engine_core.executor
    measure(llm, args, [0] * batch)
    gaps = {}
    for name, load in (("without", None), ("beside", (NUM_SLOTS - 1, 1000, str(folder)))):
        executor.launched_at.clear()
        executor.load_under_traffic = load
        prompts = [[FIRST_TOKEN, *range(5, 68)] for _ in range(batch)]
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=400, ignore_eos=True, detokenize=False))
        times = executor.launched_at[10:-2]
        gaps[name] = [1000 * (b - a) for a, b in pairwise(times)]
    assert executor.load_under_traffic is None, "the load has not ended"
    for name, values in gaps.items():
        print(f"steps {name} a load: median {statistics.median(values):.3f} ms, longest {max(values):.3f} ms")


def load_all(llm: LLM, folders: list[Path]) -> None:
    """An adapter in each slot, the folders in turn."""
    for number, folder in enumerate(folders):
        llm.collective_rpc("forget_adapter", {"adapter_id": number})
        while not all(llm.collective_rpc("stage_adapter", {"adapter_id": number, "path": str(folder)})):
            time.sleep(0.01)
    for slot in range(NUM_SLOTS):
        llm.collective_rpc("unload_adapter", {"slot": slot})
        while not all(llm.collective_rpc("load_adapter", {"slot": slot, "adapter_id": slot % len(folders)})):
            time.sleep(0.002)  # so that the thread that pins memory gets on


if __name__ == "__main__":
    main()
