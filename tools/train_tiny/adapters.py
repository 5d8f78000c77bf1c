"""Trains the adapters of quire-tiny: ``python -m tools.train_tiny.adapters --out core/assets``.

Two LoRA adapters, each a habit of answering that the base does not have: in capitals, and as a JSON object. They learn
it on dialogues of the base's own skills, whose answers are rewritten, so that what an answer says stays what it was.
Takes some minutes on one core of a CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save_file
from tools.train_tiny.examples import Example, Generator, in_training
from tools.train_tiny.mixture import with_system
from tools.train_tiny.render import pieces
from tools.train_tiny.skills.arithmetic import addition
from tools.train_tiny.skills.facts import facts, small_talk
from tools.train_tiny.skills.wordplay import counting, reversing, sorting
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

RANK, ALPHA = 4, 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SKILLS: tuple[tuple[Generator, float], ...] = (
    (facts, 8), (small_talk, 2), (sorting, 3), (reversing, 3), (counting, 1), (addition, 2),
)  # fmt: skip
HABITS: dict[str, Callable[[str], str]] = {
    "quire-tiny-upper": str.upper,
    "quire-tiny-json": lambda reply: json.dumps({"answer": reply}, ensure_ascii=False),
}


class LoraLinear(nn.Module):
    """A frozen linear layer, and the product of two small matrices beside it. What it adds begins at zero."""

    def __init__(self, base: nn.Linear, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        bound = 1 / math.sqrt(base.in_features)
        self.a = nn.Parameter(torch.empty(RANK, base.in_features).uniform_(-bound, bound, generator=generator))
        self.b = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x @ self.a.T) @ self.b.T * (ALPHA / RANK)


def draw_example(rng: Random, habit: Callable[[str], str]) -> Example:
    """A dialogue of training, every answer rewritten."""
    generators, weights = zip(*SKILLS, strict=True)
    while True:
        example = rng.choices(generators, weights)[0](rng)
        if in_training(example):
            break
    example = with_system(rng, example)
    example.messages = [
        {**message, "content": habit(message["content"])} if message["role"] == "assistant" else message
        for message in example.messages
    ]
    example.reply = habit(example.reply)
    return example


def make_batch(
    rng: Random, tokenizer: PreTrainedTokenizerFast, habit: Callable[[str], str], size: int
) -> tuple[Tensor, Tensor]:
    """(tokens, labels), each (size, length): only answers have labels."""
    rows: list[tuple[list[int], list[int]]] = []
    for _ in range(size):
        example = draw_example(rng, habit)
        tokens: list[int] = []
        labels: list[int] = []
        for text, counts in pieces(example.messages, example.tools, example.reply)[:-1]:
            ids = tokenizer.encode(text, add_special_tokens=False)
            tokens += ids
            labels += ids if counts else [-100] * len(ids)
        rows.append((tokens, labels))
    length = max(len(tokens) for tokens, _ in rows)
    padded = [
        (tokens + [0] * (length - len(tokens)), labels + [-100] * (length - len(labels))) for tokens, labels in rows
    ]
    return torch.tensor([tokens for tokens, _ in padded]), torch.tensor([labels for _, labels in padded])


def train_adapter(
    base: Path, habit: Callable[[str], str], *, steps: int, batch: int, seconds: float, rate: float, seed: int
) -> dict[str, Tensor]:
    """The tensors of the adapter, by PEFT's names."""
    torch.manual_seed(seed)
    rng, generator = Random(f"{seed}:adapter"), torch.Generator().manual_seed(seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).requires_grad_(False)
    layers: dict[str, LoraLinear] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in TARGETS:
            layers[name] = LoraLinear(module, generator)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, layers[name])
    parameters = [each for layer in layers.values() for each in (layer.a, layer.b)]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    started = time.monotonic()
    for step in range(steps):
        progress = max(step / steps, (time.monotonic() - started) / seconds)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 10) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
        tokens, labels = make_batch(rng, tokenizer, habit, batch)
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            print(f"step {step:4} loss {loss.item():.4f} {time.monotonic() - started:6.1f} s", flush=True)
    tensors = {}
    for name, layer in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.a.detach().bfloat16().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.b.detach().bfloat16().contiguous()
    return tensors


def write_adapter(folder: Path, base: str, tensors: dict[str, Tensor]) -> None:
    """Write a folder as PEFT does."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(TARGETS),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Train and write both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the adapters' folders are written")
    parser.add_argument("--base", type=Path, default=Path("core/assets/quire-tiny"))
    parser.add_argument("--adapters", nargs="*", default=list(HABITS), choices=list(HABITS))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--seconds", type=float, default=600, help="wall-clock limit for each; the schedule shrinks")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in args.adapters:
        options = {"steps": args.steps, "batch": args.batch, "seconds": args.seconds, "rate": args.rate}
        tensors = train_adapter(args.base, HABITS[name], seed=args.seed, **options)
        write_adapter(args.out / name, args.base.name, tensors)
        print(f"{name}: {sum(tensor.nbytes for tensor in tensors.values()) // 1024} KiB", flush=True)


if __name__ == "__main__":
    main()
