"""Makes those step models of an H200 that come with Quire and are not fitted to recorded steps yet.

    PYTHONPATH=src python tools/interim_step_models.py

Each is derived from figures of docs/performance.md: steps of N decodes at a mean context of 256 tokens, prompts of
2,048 tokens in steps of 16,384, one prompt of 60,000. Where there is no such figure (marked ~), the value lies between
its neighbours. ``quire simulate fit`` on recorded steps, or ``quire bench steps``, replaces a file as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quire.server.simulate.step_model import EngineLimits, HostTimes, StepTimeModel, save_step_model

BANDWIDTH = 4.29e12  # bytes/s, as measured on the card
ATTENTION_SHARE = 0.85  # of it, which decode attention reaches at 256 requests
PREFILL_ATTENTION_FLOPS = 555e12  # from the prompt of 60,000 tokens on the 8B


@dataclass(frozen=True)
class Figures:
    """What docs/performance.md says of one model."""

    model: str
    decode: dict[int, float]
    """Tokens/s by batch."""
    prefill_us: float
    """Microseconds for a prompt token in a large step, attention left out."""
    layers: int
    query_heads: int
    kv_bytes: int
    """Of a token, all layers."""
    num_blocks: int
    prompt_step_us: float = 0.0


MODELS = {
    "h200-llama-3.1-8b-fp8": Figures(
        "Llama-3.1-8B, FP8 weights and KV cache", {1: 388.2, 32: 10584.6, 256: 40696.9}, 13.1, 32, 32, 65536, 118000
    ),
    "h200-llama-3.1-8b-awq": Figures(
        "Llama-3.1-8B, AWQ int4", {1: 468.0, 8: 3566.1, 32: 10503.3, 64: 18242.9, 256: 30000.0}, 22.5, 32, 32, 131072,
        60000,
    ),
    "h200-qwen3-0.6b-bf16": Figures(
        "Qwen3-0.6B, bf16", {1: 1392.0, 32: 25019.8, 256: 75745.0}, 2.1, 28, 16, 114688, 70000, 1500.0
    ),
}  # fmt: skip
"""Batch 256 of AWQ is ~, from `nano`."""


def main() -> None:
    folder = Path(__file__).resolve().parents[1] / "server" / "simulate" / "models"
    for name, figures in MODELS.items():
        save_step_model(derive_model(name, figures), folder / f"{name}.json")
        print(folder / f"{name}.json")


def derive_model(name: str, figures: Figures) -> StepTimeModel:
    context_us = figures.kv_bytes / BANDWIDTH / ATTENTION_SHARE * 1e6
    pair_us = 4 * figures.query_heads * 128 * figures.layers / PREFILL_ATTENTION_FLOPS * 1e6
    points = {n: 1e6 * n / rate - 256 * n * context_us for n, rate in figures.decode.items()}
    last = max(points)
    # Beyond the largest batch of decodes a step is bound by arithmetic, with the same constant as there.
    constant = max(points[last] - last * figures.prefill_us, 0.0)
    for tokens in (512, 1024, 2048, 4096, 8192, 16384):
        points[tokens] = constant * last / tokens + tokens * figures.prefill_us
    return StepTimeModel(
        name=name,
        source="interim: derived from decode, prefill and HTTP figures of docs/performance.md by "
        "tools/interim_step_models.py, not fitted to recorded steps",
        device="NVIDIA H200",
        model=figures.model,
        tokens=tuple(sorted(points)),
        tokens_us=tuple(round(points[n], 1) for n in sorted(points)),
        context_us=round(context_us, 6),
        pair_us=round(pair_us, 9),
        prompt_step_us=figures.prompt_step_us,
        host=HostTimes(
            schedule_us=30.0,
            schedule_request_us=0.1,
            launch_us=120.0,
            update_us=20.0,
            update_request_us=0.1,
            arrival_us=1500.0,
            output_us=500.0,
        ),
        limits=EngineLimits(num_blocks=figures.num_blocks),
    )


if __name__ == "__main__":
    main()
