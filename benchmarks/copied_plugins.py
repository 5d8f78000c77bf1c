"""Copies of bundled plugins as packages of their own, which import nothing of Quire but ``quire.sdk``.

    python benchmarks/copied_plugins.py COPIES      # COPIES/copied_attention, copied_quant and copied_spec_decode
    PYTHONPATH=COPIES python benchmarks/compare_trees.py . . --model benchmarks/models/qwen3-0.6b --workload nano \\
        --engine-new '{"attention_backend": "copied_attention.triton.backend:TritonBackend"}'

What a third-party package costs beside the bundled one: both run the same code, one of them from outside.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

PLUGINS = Path(__file__).resolve().parents[1] / "plugins"
KINDS = ("attention", "quant", "spec_decode")


def main() -> None:
    """Copy, and name the copies instead of the originals in every import."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for kind in KINDS:
        copy = folder / f"copied_{kind}"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(PLUGINS / kind, copy, ignore=shutil.ignore_patterns("__pycache__"))
        for path in copy.rglob("*.py"):
            text = path.read_text("utf-8")
            for other in KINDS:
                text = text.replace(f"quire.plugins.{other}", f"copied_{other}")
            path.write_text(text, "utf-8")
    print(f"{folder}: " + ", ".join(f"copied_{kind}" for kind in KINDS))


if __name__ == "__main__":
    main()
