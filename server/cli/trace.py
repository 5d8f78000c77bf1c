"""``quire trace``: the engine's last steps as a trace for Perfetto."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from quire.core.errors import ConfigError

__all__ = ["add_parser", "run"]

_ABOUT = """Write the last steps of a running server as a Chrome trace: schedule, launch, device, wait and update,
a slice for each step. Open it in ui.perfetto.dev."""


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser("trace", help="write the last steps of a server as a trace", description=_ABOUT)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, metavar="N", help="how many steps (default: %(default)s)")
    parser.add_argument("--out", default="quire-trace.json", metavar="FILE", help="(default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Fetch and write the trace; print one line about it."""
    import httpx

    url = f"{args.url.rstrip('/')}/trace"
    try:
        answer = httpx.get(url, params={"steps": args.steps}, timeout=30)
    except httpx.HTTPError as error:
        raise ConfigError(f"{url} cannot be reached ({error}); name the server with --url") from error
    if answer.status_code != 200:
        raise ConfigError(f"{url} answered {answer.status_code}: {answer.text[:200]}")
    events = answer.json()["traceEvents"]
    try:
        Path(args.out).write_text(json.dumps(answer.json()))
    except OSError as error:
        raise ConfigError(f"--out {args.out}: {error.strerror}; name a file that can be written") from error
    num_steps = sum(event.get("cat") == "device" for event in events)
    print(f"{args.out}: {num_steps} steps; open it in https://ui.perfetto.dev")
    return 0
