"""Steps with prompts run padded, as they are captured on a GPU, and compute what they would without padding."""

from __future__ import annotations

from pathlib import Path

import pytest

from quire import LLM, SamplingParams
from quire.core.contracts.executor import KVCapacity
from quire.core.worker.cuda_graphs.prefill import PrefillGraphs, PrefillShapes
from quire.core.worker.uniproc_executor import UniprocExecutor


class Padded(UniprocExecutor):
    """Copies every step with prompt tokens that fits into padded buffers, as for a captured one."""

    shapes = PrefillShapes()
    num_padded_steps = 0

    def start(self) -> KVCapacity:
        capacity = super().start()
        runner = self.worker.model_runner
        runner.prefill_graphs = graphs = PrefillGraphs(
            runner.model, runner.backends, runner.kv_cache, runner.table, 64, self.shapes
        )
        run_model = graphs.run_model

        def counted(inputs, received=None):
            Padded.num_padded_steps += 1
            return run_model(inputs, received)

        graphs.run_model = counted  # type: ignore[method-assign]
        return capacity


class LargePadded(Padded):
    """Takes every step for a large one, which may be padded only a little."""

    shapes = PrefillShapes(
        eager_above_flop=0, max_padding=1.5, large_num_prompt_tokens=(8, 16, 24), large_num_decodes=(2, 6)
    )


@pytest.mark.parametrize(
    ("backend", "executor", "lengths"),
    [
        ("torch_sdpa", Padded, [40, 3, 17, 150, 1, 33]),
        ("triton", Padded, [3, 1, 30]),
        ("torch_sdpa", LargePadded, [40, 3, 17, 150, 1, 33]),
    ],
    ids=["torch", "triton", "large steps"],
)
def test_padding_changes_nothing(
    tiny: Path, llm: LLM, backend: str, executor: type[Padded], lengths: list[int]
) -> None:
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
        executor=f"{__name__}:{executor.__name__}",
    )
    Padded.num_padded_steps = 0
    try:
        for output, plain in zip(padded.generate(prompts, params), expected, strict=True):
            assert output.outputs[0].token_ids == plain.outputs[0].token_ids
            assert output.prompt_logprobs is not None and plain.prompt_logprobs is not None
            for ours, theirs in zip(output.prompt_logprobs[1:], plain.prompt_logprobs[1:], strict=True):
                assert ours is not None and theirs is not None
                token = next(iter(ours))
                assert token == next(iter(theirs))
                assert ours[token].logprob == pytest.approx(theirs[token].logprob, abs=1e-4)
        assert Padded.num_padded_steps > 1
    finally:
        padded.shutdown()
