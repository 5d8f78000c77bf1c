"""Random requests of every kind on an engine under pressure, each compared with the same request alone.

A scenario is made of a seed: an engine with a small KV cache, a policy and perhaps a proposer; requests with ``n``,
seeds, stops, penalties and log-probabilities that come at any time, of which some are aborted; and steps that fail,
before they run or behind it, or do not fit into memory. Requests of a failed step end with an error. Every other one
gets what it gets on an engine of its own, without drafts, failures or neighbours.

    python tests/e2e/mixed_requests.py --seconds 60      # random scenarios; ``make fuzz`` runs them for an hour
    python tests/e2e/mixed_requests.py --seed 123        # this one alone, as a failure printed it
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quire import SamplingParams
from quire.core.contracts.executor import StepFuture
from quire.core.engine.args import EngineArgs
from quire.core.engine.llm_engine import LLMEngine
from quire.core.messages import Logprob, ModelRunnerOutput, RequestOutput, SchedulerOutput
from quire.core.testing.tiny_models import make_tiny_model
from quire.core.worker.uniproc_executor import UniprocExecutor

MAX_MODEL_LEN = 96
BLOCK_SIZE = 4
LOGPROB_TOLERANCE = 2e-3
ADVERSARIES = "quire.core.testing.proposers"
PROPOSERS: list[dict[str, Any] | None] = [
    None,
    {"spec_method": "draft_model", "speculative_model": "DRAFT"},
    {"spec_method": "draft_model", "speculative_model": "MODEL"},
    {"spec_method": "ngram", "plugin_options": {"spec_decode": {"prompt_lookup_min": "1"}}},
    {"spec_method": "suffix"},
    {"spec_method": f"{ADVERSARIES}:AdversarialDeviceProposer"},
    {"spec_method": f"{ADVERSARIES}:AdversarialHostProposer"},
]


class FailingExecutor(UniprocExecutor):
    """Lets steps fail as ``rng`` says, which the scenario sets; None: all succeed."""

    rng: random.Random | None = None
    num_failed = 0

    def execute_step(self, step: SchedulerOutput) -> StepFuture:
        chance = 1.0 if self.rng is None else self.rng.random()
        if chance < 0.02:
            # What cannot be halved fails: one token, or less than two whole prompts where these are not chunked.
            smallest = 1 if self.config.scheduler.chunked_prefill else self.config.model.max_model_len
            self.num_failed += step.total_num_scheduled_tokens < 2 * smallest
            raise torch.OutOfMemoryError("CUDA out of memory (forced)")
        if chance < 0.03:
            self.num_failed += 1
            raise RuntimeError("a launch failed (forced)")
        future = super().execute_step(step)
        if chance < 0.04:
            self.num_failed += 1
            return _LostStep(future)
        return future


@dataclass
class _LostStep:
    """It ran, and what it sampled is lost."""

    future: StepFuture

    def result(self) -> ModelRunnerOutput:
        self.future.result()
        raise RuntimeError("a step failed (forced)")

    def done(self) -> bool:
        return self.future.done()


@dataclass
class Answer:
    """One continuation, gathered from what came of it."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def add_output(self, choice: Any) -> None:
        self.text += choice.text
        self.token_ids += choice.token_ids
        self.logprobs += choice.logprobs or []
        self.finish_reason, self.stop_reason = choice.finish_reason, choice.stop_reason


@dataclass
class Asked:
    """A request, and what came of it so far."""

    prompt: list[int]
    params: SamplingParams
    priority: int
    cache_salt: str | None
    answers: dict[int, Answer]
    prompt_logprobs: Any = None
    is_over: bool = False

    @classmethod
    def make_random(cls, rng: random.Random, shared_prefix: list[int]) -> Asked:
        repeated = [rng.randrange(3, 250) for _ in range(rng.randrange(1, 10))] * rng.choice([1, 1, 3])
        prompt = shared_prefix[: rng.choice([0, 7, 16, 30])] + repeated
        max_tokens = rng.choice([1, 2, 7, 20, 40, None])
        tokens = range(256)
        fields: dict[str, Any] = {
            "n": rng.choice([1, 1, 1, 2, 3]),
            "seed": rng.randrange(-(2**63), 2**63),
            "temperature": rng.choice([0.0, 0.0, 0.6, 1.0, 1.5]),
            "top_k": rng.choice([0, 0, 5, 40]),
            "top_p": rng.choice([1.0, 1.0, 0.7]),
            "min_p": rng.choice([0.0, 0.0, 0.05]),
            "max_tokens": max_tokens,
            "ignore_eos": rng.random() < 0.5,
        }
        if rng.random() < 0.3:
            fields |= {"repetition_penalty": rng.choice([0.8, 1.3]), "presence_penalty": rng.choice([-1.0, 0.7])}
        if rng.random() < 0.2:
            fields["frequency_penalty"] = rng.choice([-0.5, 1.1])
        if rng.random() < 0.3:
            fields["logprobs"] = rng.choice([0, 1, 4])
        if rng.random() < 0.15:
            fields["prompt_logprobs"] = rng.choice([0, 2])
        if rng.random() < 0.3:
            fields["stop"] = [chr(rng.randrange(97, 123)) for _ in range(rng.choice([1, 3]))] + ["ab"]
            fields["include_stop_str_in_output"] = rng.random() < 0.5
        if rng.random() < 0.3:
            fields["stop_token_ids"] = rng.sample(tokens, 20)
        if rng.random() < 0.3:
            fields["min_tokens"] = rng.randrange(1, 1 + min(max_tokens or 8, 8))
        if rng.random() < 0.2:
            fields["logit_bias"] = {token: rng.choice([-100.0, -1.0, 3.0]) for token in rng.sample(tokens, 6)}
        if rng.random() < 0.1:
            fields["allowed_token_ids"] = rng.sample(tokens, 30)
        answers = {index: Answer() for index in range(fields["n"])}
        priority, salt = rng.randrange(-2, 3), rng.choice([None, None, "salt"])
        return cls(prompt, SamplingParams(**fields), priority, salt, answers)

    def add_output(self, output: RequestOutput) -> None:
        for choice in output.outputs:
            self.answers[choice.index].add_output(choice)
        self.prompt_logprobs = output.prompt_logprobs
        self.is_over = output.finished


def run_scenario(seed: int, models: dict[str, str]) -> Counter[str]:
    """Run one. AssertionError, or whatever the engine raises, if it is wrong; else what happened, counted."""
    rng = random.Random(seed)
    arguments = make_engine_arguments(rng, models)
    shared_prefix = [rng.randrange(3, 250) for _ in range(30)]
    requests = {f"r{i}": Asked.make_random(rng, shared_prefix) for i in range(rng.randrange(6, 20))}
    engine = LLMEngine(EngineArgs.from_kwargs(**arguments, executor=f"{__name__}:FailingExecutor"))
    try:
        happened = serve_under_pressure(rng, engine, requests)
        check_nothing_is_left(engine)
    finally:
        engine.shutdown()
    finished = {name: asked for name, asked in requests.items() if asked.is_over}
    assert happened["failed"] == 0 or happened["failed steps"], "a request failed although every step succeeded"
    assert len(finished) + happened["aborted"] + happened["failed"] == len(requests), "a request was lost"
    compare_with_requests_alone(finished, models)
    happened.update(seeds=1, finished=len(finished), drafts=int("spec_method" in arguments))
    return happened


def make_engine_arguments(rng: random.Random, models: dict[str, str]) -> dict[str, Any]:
    """The pool holds one request of full length and a little more."""
    proposer = {key: models.get(str(value), value) for key, value in (rng.choice(PROPOSERS) or {}).items()}
    if proposer:
        proposer |= {"num_speculative_tokens": rng.choice([1, 3, 5])}
        proposer |= {"speculative_config": {"adaptive": rng.random() < 0.3}}
    chunked = rng.random() < 0.8
    return {
        "model": models["MODEL"],
        "device": "cpu",
        "max_model_len": MAX_MODEL_LEN,
        "block_size": BLOCK_SIZE,
        "num_gpu_blocks_override": MAX_MODEL_LEN // BLOCK_SIZE + 2 + rng.randrange(0, 24),
        "max_num_seqs": rng.choice([1, 2, 4, 8]),
        "max_num_batched_tokens": rng.choice([16, 24, 64]) if chunked else MAX_MODEL_LEN,
        "enable_chunked_prefill": chunked,
        "enable_prefix_caching": rng.random() < 0.7,
        "scheduling_policy": rng.choice(["fcfs", "fcfs", "priority", "sjf"]),
        **proposer,
    }


def serve_under_pressure(rng: random.Random, engine: LLMEngine, requests: dict[str, Asked]) -> Counter[str]:
    """Until all have finished, failed or were aborted."""
    executor: Any = engine.engine_core.executor
    executor.rng = random.Random(rng.random()) if rng.random() < 0.7 else None
    abort_share = rng.choice([0.0, 0.02, 0.1])
    happened: Counter[str] = Counter()
    waiting, running = list(requests), []
    num_steps = 0
    while waiting or engine.has_unfinished_requests():
        for _ in range(rng.choice([0, 0, 1, 4])):
            if waiting:
                running.append(waiting.pop())
                asked = requests[running[-1]]
                options: dict[str, Any] = {"priority": asked.priority, "cache_salt": asked.cache_salt}
                engine.add_request(running[-1], asked.prompt, asked.params, stream="delta", **options)
        processed = engine.process_step()
        for output in processed.request_outputs:
            requests[output.request_id].add_output(output)
        for failed in processed.failed_requests:
            assert "FailingExecutor" in failed.error, failed.error
            running.remove(failed.request_id)
            happened["failed"] += 1
        running = [name for name in running if not requests[name].is_over]
        if running and rng.random() < abort_share:
            engine.abort_request(running.pop(rng.randrange(len(running))))
            happened["aborted"] += 1
        num_steps += 1
        assert num_steps < 20_000, f"no end: {running} are still there"
    executor.rng = None
    while engine.engine_core.has_work:
        engine.process_step()
    happened["failed steps"] = executor.num_failed
    happened["preemptions"] = int(engine.get_stats()["num_preemptions_total"])
    happened["out of memory"] = int(engine.get_stats()["out_of_memory_total"])
    return happened


def check_nothing_is_left(engine: LLMEngine) -> None:
    """Every block came back, and no plugin was quarantined."""
    scheduler = engine.engine_core.scheduler
    allocator = scheduler.debug_state().allocator
    allocator.check_integrity()
    assert allocator.num_free_blocks() == allocator.num_blocks - 1, "blocks were lost"
    assert scheduler.num_running == scheduler.num_waiting == 0
    assert engine.get_stats()["plugin_quarantines_total"] == 0


def compare_with_requests_alone(requests: dict[str, Asked], models: dict[str, str]) -> None:
    """The same requests, one after another on an engine that has room for each and keeps nothing of them."""
    engine = LLMEngine(
        EngineArgs.from_kwargs(
            model=models["MODEL"], device="cpu", max_model_len=MAX_MODEL_LEN, enable_prefix_caching=False
        )
    )
    try:
        for name, asked in requests.items():
            alone = Asked(asked.prompt, asked.params, 0, None, {index: Answer() for index in asked.answers})
            engine.add_request(name, asked.prompt, asked.params, stream="delta")
            while engine.has_unfinished_requests():
                for output in engine.step():
                    alone.add_output(output)
            for index, expected in alone.answers.items():
                assert_same_answer(f"{name}, answer {index} of {asked.params}", asked.answers[index], expected)
            assert_same_logprobs(f"{name}: prompt", asked.prompt_logprobs or [], alone.prompt_logprobs or [])
    finally:
        engine.shutdown()


def assert_same_answer(name: str, actual: Answer, expected: Answer) -> None:
    assert actual.token_ids == expected.token_ids, f"{name}: {actual.token_ids} instead of {expected.token_ids}"
    assert actual.text == expected.text, f"{name}: {actual.text!r} instead of {expected.text!r}"
    ends = [(each.finish_reason, each.stop_reason) for each in (actual, expected)]
    assert ends[0] == ends[1], f"{name}: ends {ends[0]} instead of {ends[1]}"
    assert_same_logprobs(name, actual.logprobs, expected.logprobs)


def assert_same_logprobs(name: str, actual: list[Any], expected: list[Any]) -> None:
    """The same tokens first, with log-probabilities but for rounding, which may exchange others of about equal ones."""
    assert len(actual) == len(expected), f"{name}: {len(actual)} log-probabilities instead of {len(expected)}"
    for position, (one, other) in enumerate(zip(actual, expected, strict=True)):
        if one is None or other is None:
            assert one is other, f"{name}: log-probabilities at {position}"
            continue
        tokens = [next(iter(each)) for each in (one, other)]
        values = [next(iter(each.values())).logprob for each in (one, other)]
        near = abs(values[0] - values[1]) <= LOGPROB_TOLERANCE or values[0] == values[1]
        assert tokens[0] == tokens[1] and near, f"{name}: at {position} {one} instead of {other}"


def make_models(folder: Path) -> dict[str, str]:
    """A target of few words, whose tokens often repeat, and a draft of half its layers."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    return {
        "MODEL": str(make_tiny_model("llama", folder / "target", **sizes)),
        "DRAFT": str(make_tiny_model("llama", folder / "draft", num_hidden_layers=1, seed=3, **sizes)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--seed", type=int, help="run this scenario alone")
    arguments = parser.parse_args()
    logging.getLogger("quire").setLevel(logging.CRITICAL)  # steps that fail on purpose are logged as errors
    total: Counter[str] = Counter()
    deadline = time.monotonic() + arguments.seconds
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(Path(folder))
        while time.monotonic() < deadline:
            seed = random.SystemRandom().randrange(2**32) if arguments.seed is None else arguments.seed
            try:
                total += run_scenario(seed, models)
            except Exception:
                traceback.print_exc()
                print(f"seed {seed} fails; repeat it with  python tests/e2e/mixed_requests.py --seed {seed}")
                return 1
            if arguments.seed is not None:
                break
    print(", ".join(f"{count} {name}" for name, count in total.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
