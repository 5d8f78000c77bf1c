"""A small engine around the plugin that is checked, and whether what it generates is right."""

from __future__ import annotations

import itertools
import logging
import random
import tempfile
import unittest
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.core.engine.engine_core import EngineCore
from quire.core.engine.llm import LLM
from quire.core.errors import UnsupportedError
from quire.core.messages import EngineCoreOutputs
from quire.core.sampling_params import SamplingParams
from quire.core.testing.oracle import compute_worst_gap
from quire.core.testing.tiny_models import make_example_model, save_example_model

__all__ = ["CONFIG", "ExampleEngine", "example_engine", "example_model"]

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "eos_token_id": 258,
}
"""``config.json`` of the model that it serves."""
_MAX_STEPS = 3000
"""Several times what the traffic takes with one token a step."""
_TOLERANCE = 1e-2
"""Of logits that differ by some units: float32 rounds sums in another order."""


@dataclass(frozen=True)
class ExampleEngine:
    """An engine on the CPU, in this process, and transformers' model of the same weights."""

    llm: LLM
    reference: Any
    faults: list[str]
    """What was logged of plugins that were quarantined."""

    def assert_no_quarantine(self) -> None:
        """Raise if a plugin was quarantined, with what the log says of it."""
        assert not self.faults, self.faults[0]

    def assert_traffic_is_served(self, num_tokens: int = 20) -> None:
        """Raise unless prompts of many lengths, some in chunks, some alike, some preempted, are continued by
        ``num_tokens`` as transformers does it: greedy, at random, and in two ways each."""
        prompts = _make_prompts()
        greedy, half = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True), len(prompts) // 2
        seeded = SamplingParams(temperature=0.9, seed=7, max_tokens=num_tokens, ignore_eos=True)
        forked = SamplingParams(temperature=0, n=2, max_tokens=9, ignore_eos=True)
        self.assert_continued(prompts, [greedy] * half + [seeded] * (len(prompts) - half))
        self.assert_continued(prompts[:3], [forked] * 3)

    def assert_continued(self, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> None:
        """Raise unless each prompt is continued as transformers does it, by the rule of ``oracle``."""
        outputs = self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], list(params))
        self.assert_no_quarantine()
        for i, (prompt, output, sampling) in enumerate(zip(prompts, outputs, params, strict=True)):
            what = (
                f"request {i} of {len(prompts)}, a prompt of {len(prompt)} tokens, temperature {sampling.temperature}"
            )
            for completion in output.outputs:
                tokens = completion.token_ids
                assert len(tokens) == sampling.max_tokens, f"{what}: {len(tokens)} tokens, not {sampling.max_tokens}"
                gap = compute_worst_gap(self.reference, prompt, tokens, sampling, sampling.seed or 0)
                assert gap <= _TOLERANCE, (
                    f"{what}: a token of completion {completion.index} is {gap:.3g} below the best of transformers"
                )


@contextmanager
def example_engine(folder: Path, reference: Any, **arguments: Any) -> Iterator[ExampleEngine]:
    """An engine that serves ``folder``, what ``example_model`` saved, with ``arguments`` of ``LLM``."""
    faults: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: faults.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("quire.plugin")
    logger.addHandler(handler)
    sizes = {"max_model_len": 160, "num_gpu_blocks_override": 40, "max_num_seqs": 6, "max_num_batched_tokens": 48}
    try:
        llm = LLM(model=str(folder), device="cpu", cpu_threads=1, **{**sizes, **arguments})
        _limit_steps(llm.engine_core)
        try:
            yield ExampleEngine(llm, reference, faults)
        finally:
            llm.shutdown()
    except UnsupportedError as error:
        raise unittest.SkipTest(f"cannot be tried in an engine on the CPU: {error}") from None
    finally:
        logger.removeHandler(handler)


@contextmanager
def example_model(*, repetitive: bool = False) -> Iterator[tuple[Path, Any]]:
    """A folder with a random model of ``CONFIG``, and transformers' model of it. If ``repetitive``, a token follows
    mostly from the one before it, so that greedy text soon runs in circles, which can be drafted."""
    with tempfile.TemporaryDirectory(prefix="quire-check-") as name:
        reference = make_example_model(CONFIG)
        for parameter_name, parameter in reference.named_parameters():
            if repetitive and parameter_name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.data.mul_(0.02)
        save_example_model(reference, Path(name))
        yield Path(name), reference


def _limit_steps(core: EngineCore) -> None:
    """Let requests that never finish fail a check, not hang it."""
    run_step, count = core.step, itertools.count(1)

    def run_limited_step() -> EngineCoreOutputs:
        assert next(count) <= _MAX_STEPS, f"requests are not finished after {_MAX_STEPS} steps"
        return run_step()

    core.step = run_limited_step  # type: ignore[method-assign]


def _make_prompts() -> list[list[int]]:
    """Mixed lengths; some begin alike, and some repeat themselves, so that a proposer finds something to draft."""
    rng = random.Random(0)
    shared = [rng.randrange(256) for _ in range(37)]
    prompts = []
    for i, length in enumerate((1, 5, 16, 33, 60, 18, 7, 40)):
        own = [rng.randrange(256) for _ in range(length)]
        prompts.append(shared + own if i % 3 == 0 else own * 2 if i % 3 == 1 else own)
    return prompts
