"""Trains quire-tiny and quire-tiny-draft: ``python -m tools.train_tiny --stdlib LIB --docs DOC --out core/assets``."""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tools.train_tiny.card import write_card
from tools.train_tiny.corpus import read_documents
from tools.train_tiny.dataset import build
from tools.train_tiny.evaluate import evaluate_folder
from tools.train_tiny.export import write_folder
from tools.train_tiny.heldout import write_held_out
from tools.train_tiny.model import DRAFT, TINY
from tools.train_tiny.tokenizer import train_tokenizer
from tools.train_tiny.train import Recipe, train

RECIPES = {
    "quire-tiny": (TINY, Recipe(steps=14000, peak_rate=2e-3)),
    "quire-tiny-draft": (DRAFT, Recipe(steps=10000, peak_rate=5e-3)),
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stdlib", type=Path, help="CPython's Lib folder")
    parser.add_argument("--docs", type=Path, help="CPython's Doc folder (*.rst)")
    parser.add_argument("--out", type=Path, required=True, help="where the two model folders and eval/ are written")
    parser.add_argument("--tokenizer", type=Path, help="use this tokenizer.json instead of training one")
    parser.add_argument("--models", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dialogues", type=int, default=3_000_000)
    parser.add_argument("--long-dialogues", type=int, default=36_000)
    parser.add_argument("--steps", type=int, help="instead of each recipe's")
    parser.add_argument("--tokens-per-step", type=int, help="instead of each recipe's")
    parser.add_argument(
        "--seconds", type=float, nargs="*", default=[], help="wall-clock limit of each model's training"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Text, tokenizer, rows, models, figures."""
    args = _arguments()
    started = time.time()

    def say(what: str) -> None:
        print(f"[{time.time() - started:6.1f} s] {what}", flush=True)

    documents = read_documents(args.stdlib, args.docs)
    say(f"{len(documents)} documents, {sum(map(len, documents)) / 1e6:.1f} million characters")
    tokenizer = Tokenizer.from_file(str(args.tokenizer)) if args.tokenizer else train_tokenizer(documents, seed=0)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer_file = args.out / "tokenizer.json"
    tokenizer.save(str(tokenizer_file))
    say("tokenizer ready")
    write_held_out(args.out / "eval")
    short, long = build(str(tokenizer_file), documents, args.dialogues, args.long_dialogues, args.seed, args.workers)
    tokens = short.tokens.size + long.tokens.size
    say(f"{len(short)} short rows, {len(long)} long rows: {tokens / 1e6:.1f} million tokens")
    for index, name in enumerate(args.models):
        shape, recipe = RECIPES[name]
        recipe = replace(
            recipe,
            seed=args.seed,
            steps=args.steps or recipe.steps,
            tokens_per_step=args.tokens_per_step or recipe.tokens_per_step,
            seconds=args.seconds[index] if index < len(args.seconds) else None,
        )
        model = train(shape, recipe, short, long, device=args.device, compiled=not args.no_compile)
        folder = args.out / name
        write_folder(folder, model, tokenizer)
        say(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters written")
        report = evaluate_folder(folder, device=args.device)
        (args.out / f"{name}-report.json").write_text(report.to_json() + "\n", encoding="utf-8")
        write_card(folder, shape, report)
        say(f"{name} evaluated\n{report.table()}")
        for failure in report.failures[:24]:
            print(f"{failure.id}: {failure.asked[-90:]!r} wrote {failure.text[:160]!r}", flush=True)


if __name__ == "__main__":
    main()
