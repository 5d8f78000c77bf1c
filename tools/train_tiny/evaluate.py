"""The reference evaluation: greedy, unquantized, through transformers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quire.server.evaluation import MAX_NEW_TOKENS, Report, evaluate


def evaluate_folder(
    folder: Path,
    *,
    device: str,
    skills: list[str] | None = None,
    limit: int | None = None,
    batch: int = 96,
    dtype: torch.dtype = torch.bfloat16,
) -> Report:
    """Evaluate the model in ``folder``, in batches of prompts of like length."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()

    def generate(conversations: Sequence[tuple[list[dict[str, Any]], list[dict[str, Any]]]]) -> list[str]:
        prompts = [
            tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False, add_generation_prompt=True)
            for messages, tools in conversations
        ]
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        texts = [""] * len(prompts)
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            inputs = tokenizer(
                [prompts[i] for i in chosen], return_tensors="pt", padding=True, add_special_tokens=False
            ).to(device)
            with torch.inference_mode():
                output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for index, answer in zip(chosen, answers, strict=True):
                texts[index] = answer
        return texts

    return evaluate(generate, skills, limit=limit)


def main() -> None:
    """Print the table for one folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("core/assets/quire-tiny"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--skills", nargs="*")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--float32", action="store_true", help="compute in float32 instead of bfloat16")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--failures", type=int, default=0, help="print this many wrong answers")
    args = parser.parse_args()
    dtype = torch.float32 if args.float32 else torch.bfloat16
    report = evaluate_folder(
        args.folder, device=args.device, skills=args.skills, limit=args.limit, batch=args.batch, dtype=dtype
    )
    print(report.to_json() if args.json else report.table())
    for failure in report.failures[: args.failures]:
        print(f"{failure.id}: {failure.asked!r}\n    wrote {failure.text!r}\n    right {failure.answer!r}")


if __name__ == "__main__":
    main()
