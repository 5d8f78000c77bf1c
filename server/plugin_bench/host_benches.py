"""What runs on the host between two launches: policies, KV allocators, proposers. Times are CPU time of the thread."""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
import torch

from quire.core.config import CacheConfig, SchedulerConfig
from quire.core.contracts.kv import KVAllocator, KVGroup
from quire.core.contracts.policy import BatchingPolicy
from quire.core.contracts.spec_decode import HostProposer, SpeculativeProposer
from quire.core.messages import EngineCoreRequest, ModelRunnerOutput, SchedulerOutput
from quire.core.plugin.manager import PluginManager
from quire.core.plugin.options import parse_options
from quire.core.request import Request
from quire.core.sampling_params import SamplingParams
from quire.core.sched.scheduler import Scheduler
from quire.core.scheduling_params import SchedulingParams
from quire.server.plugin_bench.cases import BenchCase, CaseRefusedError, KindBench, PreparedCase

__all__ = [
    "CallTimer",
    "HostLoad",
    "KVBench",
    "PolicyBench",
    "ProposerBench",
    "SchedulerRun",
    "make_output",
    "read_recorded_text",
]

_BLOCK = 16
_STEPS_PER_ROUND = 24
_WARMUP_STEPS = 64
_NUM_DRAFTS = 4


@dataclass(frozen=True, slots=True)
class HostLoad:
    """What a scheduler holds."""

    num_running: int = 256
    num_waiting: int = 10_000
    churn: bool = False
    """One request ends and one is admitted in every step."""
    num_steps: int = 1000
    """That will be run."""


class SchedulerRun:
    """A scheduler under a load, one step in flight. Requests are of 64 groups, have deadlines, and share prefixes."""

    def __init__(self, policy: BatchingPolicy, allocator: type[KVAllocator], load: HostLoad) -> None:
        manager = PluginManager()
        fallback: Any = manager.load_class("policy", "fcfs")
        self._rng = rng = np.random.default_rng(0)
        running, waiting = load.num_running, load.num_waiting
        num_blocks = 1 + (running + 8) * 2048 // _BLOCK
        self.allocator = allocator([KVGroup()], num_blocks, _BLOCK)
        self.scheduler = Scheduler(
            SchedulerConfig(running, 8192), CacheConfig(_BLOCK, num_blocks), self.allocator, policy,
            fallback=fallback(), max_model_len=2048,
        )  # fmt: skip
        prefixes = [rng.integers(0, 1000, 4 * _BLOCK).tolist() for _ in range(20)]
        start = time.monotonic_ns()
        for i in range(running + waiting + (load.num_steps + 100 if load.churn else 0)):
            prompt = [*prefixes[i % 20], *rng.integers(0, 1000, 16 + i % 64).tolist()]
            # In churn the running requests end one after another, whichever they are.
            count = int(rng.integers(1, 2 * running)) if waiting else 1 + min(i, running)
            tokens = count if load.churn else 1900
            params = SamplingParams(max_tokens=tokens, seed=i)
            said = SchedulingParams(group=f"g{i % 64}", deadline_ms=1e8, predicted_tokens=tokens)
            request = EngineCoreRequest(i, prompt, params, start + i, [1000], scheduling=said)
            self.scheduler.add_request(request)
        self._in_flight: deque[SchedulerOutput] = deque()

    def run_step(self) -> None:
        """Schedule one step, and finish the one before."""
        step = self.scheduler.schedule()
        assert step is not None
        self._in_flight.append(step)
        if len(self._in_flight) == 2:
            output = make_output(self._in_flight[0], self._rng)
            output.device_us = 10_000.0
            self.scheduler.update_from_output(self._in_flight.popleft(), output)


class CallTimer:
    """Adds up the CPU seconds that some methods of an object take, by wrapping them on the object."""

    def __init__(self, target: object, names: Sequence[str]) -> None:
        self.seconds = 0.0
        for name in names:
            setattr(target, name, self._wrap(getattr(target, name)))

    def _wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - began

        return timed


def make_output(step: SchedulerOutput, rng: np.random.Generator) -> ModelRunnerOutput:
    """What a model would have sampled: random tokens."""
    tokens = rng.integers(0, 1000, (len(step.rows), 1), dtype=np.int32)
    return ModelRunnerOutput(step.step, tokens, step.sampling_mask.astype(np.int32))


class PolicyBench(KindBench):
    """Planning of a step: the view, the policy, and the check of its plan."""

    device = torch.device("cpu")
    METHODS = ("make_plan", "step_scheduled", "step_finished")
    """Of the policy runner: what is timed."""

    def __init__(self, load: HostLoad = HostLoad()) -> None:
        self._load = load

    def list_cases(self, target: type) -> Sequence[BenchCase]:
        """A full batch of decodes, without and with a queue, and one in which requests come and go."""
        return _list_loads(self._load)

    def prepare(self, target: type[BatchingPolicy], case: BenchCase) -> PreparedCase:
        """A scheduler with the policy."""
        allocator: Any = PluginManager().load_class("kv", "paged")
        run = SchedulerRun(target(parse_options(target, {})), allocator, case.parameters)
        return _prepare_run(run, CallTimer(run.scheduler.policy_runner, self.METHODS))


class KVBench(KindBench):
    """All calls of an allocator in a step."""

    device = torch.device("cpu")

    def __init__(self, load: HostLoad = HostLoad()) -> None:
        self._load = load

    def list_cases(self, target: type) -> Sequence[BenchCase]:
        """As of a policy."""
        return _list_loads(self._load)

    def prepare(self, target: type[KVAllocator], case: BenchCase) -> PreparedCase:
        """A scheduler with the allocator."""
        policy: Any = PluginManager().load_class("policy", "fcfs")
        run = SchedulerRun(policy(), target, case.parameters)
        names = [name for name in vars(KVAllocator) if not name.startswith("_") and callable(getattr(target, name))]
        return _prepare_run(run, CallTimer(run.allocator, names))


class ProposerBench(KindBench):
    """Drafts for a recorded text: what part of them the text continues with, and what a call takes."""

    device = torch.device("cpu")

    def __init__(self, text_token_ids: Sequence[Sequence[int]], num_calls: int = 400) -> None:
        """``text_token_ids``: the tokens of each document."""
        self._documents = text_token_ids
        self._num_calls = num_calls

    def list_cases(self, target: type) -> Sequence[BenchCase]:
        """The text."""
        return [BenchCase(f"{len(self._documents)} documents", None)]

    def prepare(self, target: type[SpeculativeProposer], case: BenchCase) -> PreparedCase:
        """Runs over the text once for its figures; the timer runs over a part of it again."""
        if not issubclass(target, HostProposer):
            raise CaseRefusedError("drafts on the device, beside a model; use --end-to-end MODEL")
        drafted, accepted, calls = 0, 0, 0
        for sample in self._replay(target):
            num_drafts, num_accepted, _ = sample
            drafted, accepted, calls = drafted + num_drafts, accepted + num_accepted, calls + 1
        figures = {
            "acceptance": accepted / max(1, drafted),
            "tokens_per_step": 1 + accepted / max(1, calls),
            "drafts_per_call": drafted / max(1, calls),
        }

        def run_round() -> float:
            seconds = [each[2] for each in self._replay(target)]
            return float(np.median(seconds))

        return PreparedCase(run_round, figures=figures)

    def _replay(self, target: type[HostProposer]) -> list[tuple[int, int, float]]:
        """(drafts, accepted ones, CPU seconds) of each call."""
        proposer = target(_NUM_DRAFTS, parse_options(target, {}))
        samples: list[tuple[int, int, float]] = []
        per_document = max(1, self._num_calls // max(1, len(self._documents)))
        for number, tokens in enumerate(self._documents):
            prompt_len = max(1, len(tokens) // 4)
            request = _make_request(number, tokens[:prompt_len])
            position = prompt_len
            for _ in range(per_document):
                if position >= len(tokens):
                    break
                began = time.thread_time()
                drafts = list(proposer.propose(request, _NUM_DRAFTS))[:_NUM_DRAFTS]
                seconds = time.thread_time() - began
                truth = tokens[position : position + len(drafts)]
                accepted = next((i for i, (a, b) in enumerate(zip(drafts, truth, strict=False)) if a != b), len(truth))
                samples.append((len(drafts), accepted, seconds))
                request.token_ids.extend(tokens[position : position + accepted + 1])
                position += accepted + 1
            proposer.request_finished(request)
        return samples


def read_recorded_text(path: str | None, encode: Callable[[str], list[int]]) -> list[list[int]]:
    """The tokens of each document of a text file, whose documents are parted by blank lines; None: a bundled one."""
    if path is None:
        text = files("quire.core.assets").joinpath("eval", "held_out.txt").read_text("utf-8")
    else:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    documents = [encode(part) for part in text.split("\n\n") if len(part) > 40]
    return [tokens for tokens in documents if len(tokens) > 8][:64]


def _list_loads(load: HostLoad) -> list[BenchCase]:
    running, waiting = load.num_running, load.num_waiting
    loads = {
        f"{running} running": HostLoad(running, 0),
        f"{running} running, {waiting:,} waiting": HostLoad(running, waiting),
        f"{running} running, {waiting:,} waiting, one ends a step": HostLoad(running, waiting, churn=True),
    }
    return [BenchCase(name, each) for name, each in loads.items()]


def _prepare_run(run: SchedulerRun, timer: CallTimer) -> PreparedCase:
    for _ in range(_WARMUP_STEPS):
        run.run_step()
    gc.collect()

    def run_round() -> float:
        seconds = []
        gc.disable()  # a collection would fall to whichever is timed
        for _ in range(_STEPS_PER_ROUND):
            timer.seconds = 0.0
            run.run_step()
            seconds.append(timer.seconds)
        gc.enable()
        if run.scheduler.stats()["plugin_quarantines_total"]:
            raise CaseRefusedError("was quarantined: run quire plugins check")
        return float(np.median(seconds))

    return PreparedCase(run_round)


def _make_request(number: int, tokens: Sequence[int]) -> Request:
    return Request(EngineCoreRequest(number, list(tokens), SamplingParams(seed=0), 0), 1 << 20)
