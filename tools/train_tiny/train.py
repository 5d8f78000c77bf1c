"""The training loop: AdamW, warm-up and cosine, bf16, short and long rows in turn."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from tools.train_tiny.dataset import Rows
from tools.train_tiny.model import Shape, TinyLlama
from torch import Tensor


@dataclass(frozen=True)
class Recipe:
    """How one model is trained. A step takes ``tokens_per_step`` tokens; one in ``long_every`` takes long rows."""

    steps: int
    peak_rate: float
    tokens_per_step: int = 65_536
    warmup: int = 200
    long_every: int = 3
    weight_decay: float = 0.1
    seed: int = 0
    final_fraction: float = 0.02
    seconds: float | None = None  # a limit on the wall clock; the schedule shrinks to meet it


class _Feed:
    """Endless shuffled batches of one kind of row, held on the device."""

    def __init__(self, rows: Rows, batch: int, seed: int, device: str):
        self.tokens = torch.from_numpy(rows.tokens.view(np.int16)).to(device)  # 4096 entries fit
        self.labels = torch.from_numpy(rows.labels.view(np.int16)).to(device)  # IGNORE reads as -1
        self.batch = min(batch, len(rows))
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.long)
        self.at = 0

    def next(self) -> tuple[Tensor, Tensor]:
        """Return (tokens, targets), each (batch, length): the target of a place is the label of the next."""
        if self.at + self.batch > len(self.order):
            self.order, self.at = torch.randperm(len(self.tokens), generator=self.generator), 0
        chosen = self.order[self.at : self.at + self.batch].to(self.tokens.device)
        self.at += self.batch
        targets = self.labels[chosen].long().roll(-1, dims=1)
        targets[:, -1] = -1
        return self.tokens[chosen].long(), targets


def rate(step: int, progress: float, recipe: Recipe) -> float:
    """Learning rate: linear warm-up, then cosine down to a small fraction; ``progress`` is from 0 to 1."""
    warm = min(1.0, (step + 1) / recipe.warmup)
    low = recipe.final_fraction
    return recipe.peak_rate * warm * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def train(
    shape: Shape, recipe: Recipe, short: Rows, long: Rows, *, device: str, compiled: bool = True, log_every: int = 250
) -> TinyLlama:
    """Train one model and return it."""
    torch.manual_seed(recipe.seed)
    torch.set_float32_matmul_precision("high")
    model = TinyLlama(shape, recipe.seed).to(device)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.peak_rate, betas=(0.9, 0.98), fused=device == "cuda")
    feeds = {
        "short": _Feed(short, recipe.tokens_per_step // short.tokens.shape[1], recipe.seed + 1, device),
        "long": _Feed(long, recipe.tokens_per_step // long.tokens.shape[1], recipe.seed + 2, device),
    }
    loss_of = torch.compile(model.loss, dynamic=False) if compiled else model.loss
    started, progress, step = time.time(), 0.0, 0
    while progress < 1.0:
        kind = "long" if step % recipe.long_every == recipe.long_every - 1 else "short"
        tokens, targets = feeds[kind].next()
        now = rate(step, progress, recipe)
        for group in optimizer.param_groups:
            group["lr"] = now
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = loss_of(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        progress = step / recipe.steps
        if recipe.seconds:
            progress = max(progress, (time.time() - started) / recipe.seconds)
        if step % log_every in (0, 1) or progress >= 1.0:
            print(
                f"step {step:6} {kind:5} loss {loss.item():.4f} rate {now:.2e} {time.time() - started:6.1f} s",
                flush=True,
            )
    return model
