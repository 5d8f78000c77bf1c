"""What every quantizer must do: write a checkpoint that is smaller, loads, and says much the same."""

from __future__ import annotations

import hashlib
import json
import tempfile
import unittest
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.core.contracts.quantizer import QuantizationJob, Quantizer
from quire.core.engine.llm import LLM
from quire.core.plugin.options import parse_options
from quire.core.sampling_params import SamplingParams
from quire.core.testing.tiny_models import make_tiny_model

__all__ = [
    "check_its_checkpoint_loads_and_says_much_the_same",
    "check_schemes_are_declared",
    "check_the_source_stays_as_it_is",
]

_WIDTH = 128
"""Of the model that is quantized: whole groups of 64 and 128 weights."""
_MAX_DIFFERENCE = 1.5
"""Of log-probabilities, on average: 4 bits lose about 0.9 of this random model, and wrong weights twice that."""
_PROMPTS = [[(7 * i + j * j) % 250 for j in range(3 + 2 * i)] for i in range(8)]


def check_schemes_are_declared(cls: type[Quantizer]) -> None:
    """``schemes`` are names, the default first, and ``uncalibrated`` are some of them."""
    schemes: object = cls.schemes
    assert isinstance(schemes, tuple) and schemes, f"schemes is {schemes!r}, not a tuple of names"
    assert all(isinstance(name, str) and name for name in cls.schemes), f"schemes is {cls.schemes!r}"
    strange = sorted(set(cls.uncalibrated) - set(cls.schemes))
    assert not strange, f"uncalibrated names {', '.join(strange)}, which is none of schemes"


def check_its_checkpoint_loads_and_says_much_the_same(cls: type[Quantizer]) -> None:
    """Each scheme writes ``quantization_config`` and fewer bytes of weights, which Quire loads; on average the
    log-probability of a token that the model likes best differs little."""
    for scheme in cls.schemes:
        with _quantize(cls, scheme) as done:
            config = json.loads((done.job.out / "config.json").read_text("utf-8"))
            assert isinstance(config.get("quantization_config"), dict), (
                f"{scheme}: no quantization_config in config.json"
            )
            before, after = _count_bytes(done.job.model), _count_bytes(done.job.out)
            assert after < before, f"{scheme}: {after} bytes of weights, {before} before"
            expected = _score_tokens(done.job.model, None)
            scores = _score_tokens(done.job.out, [token for token, _ in expected])
            differences = [abs(old - new) for (_, old), (_, new) in zip(expected, scores, strict=True)]
            mean = sum(differences) / len(differences)
            assert mean <= _MAX_DIFFERENCE, f"{scheme}: log-probabilities differ by {mean:.2f} on average"


def check_the_source_stays_as_it_is(cls: type[Quantizer]) -> None:
    """``quantize`` returns a text, writes into ``job.out`` alone, and changes no file of ``job.model``."""
    with _quantize(cls, cls.schemes[0]) as done:
        assert isinstance(done.made_by, str) and done.made_by, f"quantize returned {done.made_by!r}, not what made it"
        changed = [name for name, digest in done.digests.items() if _digest(done.job.model / name) != digest]
        assert not changed, f"changed {', '.join(changed)} of the source"
        assert {path.name for path in done.job.model.iterdir()} == set(done.digests), "the source has other files now"


@dataclass(frozen=True)
class _Quantized:
    job: QuantizationJob
    made_by: Any
    digests: dict[str, str]
    """Of the files of the source, before."""


@contextmanager
def _quantize(cls: type[Quantizer], scheme: str) -> Iterator[_Quantized]:
    quantizer = cls(parse_options(cls, {}))
    if (missing := quantizer.find_missing(None)) is not None:
        raise unittest.SkipTest(missing)
    with tempfile.TemporaryDirectory(prefix="quire-check-") as folder:
        model = make_tiny_model("llama", Path(folder) / "model", hidden_size=_WIDTH, intermediate_size=2 * _WIDTH)
        samples = [] if scheme in cls.uncalibrated else [[(i * j) % 250 for j in range(64)] for i in range(1, 9)]
        job = QuantizationJob(model, Path(folder) / "out", scheme, samples, 64, "cpu")
        digests = {path.name: _digest(path) for path in model.iterdir()}
        made_by = quantizer.quantize(job)
        for path in model.iterdir():
            if "token" in path.name and not (job.out / path.name).exists():
                (job.out / path.name).write_bytes(path.read_bytes())
        yield _Quantized(job, made_by, digests)


def _score_tokens(model: Path, tokens: list[int] | None) -> list[tuple[int, float]]:
    """After each prompt, a token and its log-probability: the best one, or that of ``tokens``."""
    llm = LLM(model=str(model), device="cpu", cpu_threads=1, max_model_len=64, num_gpu_blocks_override=32)
    try:
        named = [None] * len(_PROMPTS) if tokens is None else [[token] for token in tokens]
        params = [SamplingParams(temperature=0, max_tokens=1, logprobs=1, logprob_token_ids=each) for each in named]
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in _PROMPTS], params)
        scores = []
        for i, output in enumerate(outputs):
            [logprobs] = output.outputs[0].logprobs or []
            token = output.outputs[0].token_ids[0] if tokens is None else tokens[i]
            scores.append((token, logprobs[token].logprob))
        return scores
    finally:
        llm.shutdown()


def _count_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
