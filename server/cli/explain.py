"""``quire explain``: why a request waited."""

from __future__ import annotations

import argparse
import json
from typing import Any
from urllib.parse import quote

from quire.server.cli.policy import add_admin_flags, call_admin_route

__all__ = ["add_parser", "format_explanation"]

_ABOUT = """Say why a request waited: what was missing, what it was granted in each step, and which preemption hit it.
The server, which must have been started with --admin-api-key, remembers the last 10,000 requests and 4,096 steps."""

_REASONS = {
    "rows": "for a free row: --max-num-seqs requests ran",
    "blocks": "for KV blocks: the queue did not fit beside those that ran",
    "tokens": "for the token budget: --max-num-batched-tokens were spent on others",
    "policy": "by choice of the policy: there was room, and it granted others or held back",
    "step": "for the next step to be planned",
    "adapter": "for its adapter to be loaded: --max-loras others had requests, or it was read from disk",
}


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser("explain", help="say why a request waited", description=_ABOUT)
    parser.add_argument("request_id", metavar="REQUEST_ID", help="the X-Request-Id or the id of its answer")
    parser.add_argument("--json", action="store_true", help="print what the server answers")
    add_admin_flags(parser)
    parser.set_defaults(run=_run)


def format_explanation(request: dict[str, Any]) -> str:
    """What ``/admin/requests/ID`` says of one request, for people."""
    adapter = f", adapter {request['adapter']}" if request["adapter"] else ""
    lines = [
        f"request {request['request_id']} (number {request['request_number']}): {request['state']} after "
        f"{request['age_ms']:.0f} ms",
        f"  {request['prompt_len']} prompt tokens, at most {request['max_tokens']} to generate; priority "
        f"{request['priority']}, group {request['group'] or 'none'}{adapter}; ranked {request['admission_key']} by "
        f"{request['policy']}",
    ]
    for reason, text in _REASONS.items():
        if waited_ms := request["waited_ms"][reason]:
            lines.append(f"  waited {waited_ms:.1f} ms {text}")
    for run in request["runs"]:
        left = "it still runs" if run["left_ms"] is None else f"it left its row at {run['left_ms']:.1f} ms"
        lines.append(
            f"  began to run at {run['admitted_ms']:.1f} ms, in step {run['first_step']}, with "
            f"{run['num_cached_tokens']} tokens cached; {left}"
        )
        for grant in run["grants"]:
            what = f"{grant['num_tokens']} tokens" if grant["num_tokens"] else "nothing"
            lines.append(f"    from step {grant['first_step']}: {what} in each of {grant['num_steps']} steps")
    if request["num_preemptions"]:
        lines.append(f"  preempted {request['num_preemptions']} times, because KV blocks ran out")
    return "\n".join(lines)


def _run(args: argparse.Namespace) -> int:
    path = f"/admin/requests/{quote(args.request_id, safe='')}"
    answer = call_admin_route(args.url, args.admin_api_key, "GET", path)
    if args.json:
        print(json.dumps(answer, indent=2))
    else:
        print("\n\n".join(format_explanation(request) for request in answer["requests"]))
    return 0
