"""The flags of simulated engines. Importing this is quick."""

from __future__ import annotations

import argparse

from quire.server.cli.flags import parse_float, parse_int

__all__ = ["DEFAULT_MODEL", "add_engine_flags", "add_model_flags"]

DEFAULT_MODEL = "h200-llama-3.1-8b-bf16"
"""The step model that is used where none is named."""


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of step model and engine limits."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--step-model",
        metavar="FILE",
        help=f"what steps take: a file of quire simulate fit or quire bench steps, or a name ({DEFAULT_MODEL})",
    )
    group.add_argument("--max-num-seqs", type=parse_int, metavar="N", help="instead of the step model's")
    group.add_argument("--max-num-batched-tokens", type=parse_int, metavar="N", help="instead of the step model's")
    group.add_argument("--num-gpu-blocks-override", type=parse_int, metavar="N", help="instead of the step model's")
    group.add_argument("--max-model-len", type=parse_int, metavar="N", help="instead of the step model's")
    group.add_argument(
        "--enable-chunked-prefill", action=argparse.BooleanOptionalAction, default=None, help="(default: on)"
    )
    group.add_argument(
        "--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True, help="(default: on)"
    )
    group.add_argument(
        "--num-speculative-tokens", type=parse_int, metavar="N", help="draft at most N tokens for a request in a step"
    )
    group.add_argument(
        "--draft-acceptance",
        type=parse_float,
        metavar="X",
        help="the chance that a draft is right where those before it are (default: that of the recording)",
    )


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Add those flags, and the ones of a simulation."""
    add_model_flags(parser)
    group = parser.add_argument_group("simulation")
    group.add_argument(
        "--plugin", action="append", metavar="DIST", dest="plugins", help="turn on a distribution's hooks"
    )
    group.add_argument(
        "--replicas", type=parse_int, default=1, metavar="N", help="engines behind a router (default: 1)"
    )
    group.add_argument(
        "--router",
        default="least_loaded",
        metavar="NAME[,KEY=VALUE]",
        help="which replica serves a request (default: least_loaded)",
    )
    group.add_argument("--router-option", action="append", metavar="KEY=VALUE", help="option of the router")
    group.add_argument(
        "--every-step",
        action="store_true",
        help="plan every step, also where the policy promises that it would repeat the last one",
    )
