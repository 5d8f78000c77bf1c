"""Steps with prompts run padded, as they are captured on a GPU, and nobody notices."""

from __future__ import annotations

from pathlib import Path

import pytest

from quire import LLM, SamplingParams
from quire.core.contracts.executor import KVCapacity
from quire.core.worker.cuda_graphs import prefill as mixed_graphs
from quire.core.worker.cuda_graphs.prefill import PrefillGraphs
from quire.core.worker.uniproc_executor import UniprocExecutor


class Padded(UniprocExecutor):
    """Every step with prompt tokens that fits is laid out as a captured one would be."""

    covered = 0

    def start(self) -> KVCapacity:
        capacity = super().start()
        assert self._worker is not None
        runner = self._worker._runner
        runner.prefill_graphs = mixed = PrefillGraphs(runner.model, runner.backends, runner.kv_cache, runner.table, 64)
        forward = mixed.run_model

        def counted(inputs):
            Padded.covered += 1
            return forward(inputs)

        mixed.run_model = counted  # type: ignore[method-assign]
        return capacity


@pytest.mark.parametrize(
    ("backend", "lengths"), [("torch_sdpa", [40, 3, 17, 150, 1, 33]), ("triton", [3, 1, 30])], ids=["torch", "triton"]
)
def test_padding_changes_nothing(tiny: Path, llm: LLM, backend: str, lengths: list[int]) -> None:
    prompts = [[(7 * i + j) % 90 + 5 for j in range(length)] for i, length in enumerate(lengths)]
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=3, ignore_eos=True, prompt_logprobs=1, logprobs=0)
    expected = llm.generate(prompts, params)
    padded = LLM(
        model=str(tiny),
        device="cpu",
        max_model_len=256,
        max_num_seqs=18,
        max_num_batched_tokens=24,  # prompts come in chunks, beside the decodes of others
        attention_backend=backend,
        executor=f"{__name__}:Padded",
    )
    Padded.covered = 0
    try:
        for output, plain in zip(padded.generate(prompts, params), expected, strict=True):
            assert output.outputs[0].token_ids == plain.outputs[0].token_ids
            assert output.prompt_logprobs is not None and plain.prompt_logprobs is not None
            for mine, theirs in zip(output.prompt_logprobs[1:], plain.prompt_logprobs[1:], strict=True):
                assert mine is not None and theirs is not None
                assert mine.token_ids[0] == theirs.token_ids[0]
                assert mine.logprobs[0] == pytest.approx(theirs.logprobs[0], abs=1e-4)
        assert Padded.covered > 1
    finally:
        padded.shutdown()


def test_large_steps_are_padded_a_little(tiny: Path, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("_EAGER_ABOVE_FLOP", 0),
        ("_LARGE_PROMPT_TOKENS", (8, 16, 24)),
        ("_LARGE_DECODES", (2, 6)),
        ("_MAX_PADDING", 1.5),
    ):
        monkeypatch.setattr(mixed_graphs, name, value)
    test_padding_changes_nothing(tiny, llm, "torch_sdpa", [40, 3, 17, 150, 1, 33])
