"""Runs schemathesis over a server with a tiny random model: twice, with a fixed seed and with a new one.

Not a test of the suite: it needs schemathesis in the interpreter that ``--schemathesis`` names, and about a minute.
``make fuzzapi`` runs it. A failure prints the seed and a command for each request that repeats it.
"""

from __future__ import annotations

import argparse
import random
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

from quire.core.testing.tiny_models import make_tiny_model

FIXED_SEED = 20240229
API_KEY = "fuzz"
CONFIG = Path(__file__).with_name("schemathesis.toml")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemathesis", default="schemathesis", help="its command")
    parser.add_argument("--seconds", type=int, default=60, help="for both seeds together")
    parser.add_argument("--seed", type=int, help="this seed alone, as a failure printed it")
    arguments = parser.parse_args()
    start_server = runpy.run_path(str(Path(__file__).with_name("conftest.py")))["start_server"]
    seeds = [FIXED_SEED, random.randrange(2**32)] if arguments.seed is None else [arguments.seed]
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model("llama", Path(folder) / "tiny", max_position_embeddings=48)
        flags = ("--served-model-name", "tiny", "--max-num-seqs", "16", "--api-key", API_KEY)
        server = start_server(Path(folder) / "server", str(model), *flags)
        try:
            failed = [
                seed
                for seed in seeds
                if not run(arguments.schemathesis, server.url, seed, arguments.seconds // len(seeds))
            ]
            alive = server.process.poll() is None
        finally:
            server.stop()
        log = server.stderr.read_text()
    if not alive or "Traceback" in log:
        print(log[-8000:])
        print("the server died, or logged an exception")
        return 1
    for seed in failed:
        print(f"schemathesis found something: repeat it with  make fuzzapi ARGS='--seed {seed}'")
    return 1 if failed else 0


def run(command: str, url: str, seed: int, seconds: int) -> bool:
    """Whether it found nothing. The phase of systematic bodies is for small operations: with those that generate it
    takes many minutes. One worker: in Python 3.11, several threads of hypothesis can fail by themselves."""
    words = [command, "--config-file", str(CONFIG), "run", f"{url}/openapi.json", "--seed", str(seed)]
    words += ["--generation-database", "none", "--suppress-health-check", "all", "--continue-on-failure"]
    words += ["-H", f"Authorization: Bearer {API_KEY}", "--request-timeout", "60", "--no-color", "--warnings", "off"]
    small = ["--phases", "coverage", "--exclude-path-regex", "completions|invocations"]
    found_nothing = True
    for phase in (small, ["--phases", "fuzzing", "--max-examples", "20", "--max-time", str(seconds)]):
        print(f"schemathesis {' '.join(phase)} --seed {seed}", flush=True)
        found_nothing &= subprocess.run([*words, *phase], check=False).returncode == 0
    return found_nothing


if __name__ == "__main__":
    sys.exit(main())
