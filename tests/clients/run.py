"""Starts the README's server and runs agents on it, built with the clients that people use.

Not a test of the suite: it needs the packages of the extra ``clients`` in the interpreter that ``--python`` names.
``make clients`` runs it; further arguments are pytest's.
"""

from __future__ import annotations

import argparse
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=sys.executable, help="of the environment that has the clients")
    arguments, rest = parser.parse_known_args()
    start_server = runpy.run_path(str(ROOT / "tests" / "server" / "conftest.py"))["start_server"]
    with tempfile.TemporaryDirectory() as folder:
        server = start_server(Path(folder), "quire-tiny")
        try:
            status = run_pytest(arguments.python, server.url, rest)
            alive = server.process.poll() is None
        finally:
            server.stop()
        log = server.stderr.read_text()
    for line in log.splitlines():
        if line.startswith(("WARNING", "ERROR")):  # such as fields of a client that the server does not know
            print(line)
    if not alive or "Traceback" in log:
        print(log[-8000:])
        print("the server died, or logged an exception")
        return 1
    return status


def run_pytest(python: str, url: str, rest: list[str]) -> int:
    """Its exit status. The clients see neither Quire's code nor the settings of its own tests, and no other server."""
    words = [python, "-m", "pytest", "-c", os.devnull, "--rootdir", str(ROOT), "--confcutdir", str(FOLDER)]
    words += ["--import-mode=importlib", "-p", "no:cacheprovider", "-q", "--disable-warnings", "--durations=3"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"QUIRE_URL": url, "OPENAI_API_KEY": "none", "NO_PROXY": "127.0.0.1"}
    environment["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would fetch prices when it is imported
    return subprocess.run([*words, *rest, str(FOLDER)], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
