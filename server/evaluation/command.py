"""``quire eval``: exact match on the held-out questions, skill by skill, in this process or over HTTP; with
``--compare`` two models."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from quire.core.engine.args import EngineArgs
from quire.core.engine.plugin_names import check_names
from quire.core.errors import ConfigError
from quire.server.cli.flags import ENGINE_FLAGS, add_flags, add_model, make_engine_args, parse_float, parse_int
from quire.server.cli.vllm_flags import add_vllm_flags, apply_vllm_flags
from quire.server.evaluation.engine import answer_conversations, open_engine

__all__ = ["MAX_LOSS", "NUM_TOKENS", "add_parser", "run"]

_ABOUT = """Ask the held-out questions of quire-tiny, greedily, and print the share answered right: exact match per
skill and overall, with 95 % confidence intervals. Exit status 1 if --min-exact-match is not reached. With --compare,
the same of two models, what the second loses, and how far its next-token distributions are from the first one's on a
held-out text; exit status 1 if it loses more than --max-loss."""

#: Points of exact match that a comparison calls small, unless --max-loss says otherwise.
MAX_LOSS = 2.0
NUM_TOKENS = 4096


def add_parser(subparsers: Any) -> None:
    """Add the command and its flags."""
    parser = subparsers.add_parser("eval", help="score a model on the held-out questions", description=_ABOUT)
    parser.set_defaults(run=run)
    group = parser.add_argument_group("evaluation")
    group.add_argument("--skills", metavar="NAMES", help="only these, separated by commas (default: every skill)")
    group.add_argument(
        "--limit", type=parse_int, metavar="N", help="the first N questions of each skill (default: all)"
    )
    group.add_argument("--json", action="store_true", help="the report as JSON, with every wrong answer")
    group.add_argument("--failures", type=parse_int, default=0, metavar="N", help="show N wrong answers (default: 0)")
    group.add_argument("--min-exact-match", type=parse_float, metavar="X", help="from 0 to 1: exit status 1 below it")
    http = parser.add_argument_group("over HTTP")
    http.add_argument("--url", metavar="URL", help="ask a running server, such as http://127.0.0.1:8000")
    http.add_argument("--served-model", metavar="NAME", help="the model to ask for (default: the first it serves)")
    http.add_argument("--api-key", metavar="KEY", help="key of the server, if it asks for one")
    http.add_argument(
        "--max-concurrency", type=parse_int, default=64, metavar="N", help="requests at once (default: 64)"
    )
    two = parser.add_argument_group("two models")
    two.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="each is MODEL or MODEL:flag=value,flag=value, such as quire-tiny:kv-cache-dtype=fp8; other engine flags "
        "are for both",
    )
    two.add_argument(
        "--max-loss",
        type=parse_float,
        metavar="POINTS",
        help=f"points of exact match that B may lose; exit status 1 above it (default: {MAX_LOSS:g}, and no status)",
    )
    two.add_argument("--text", type=Path, metavar="FILE", help="text for the distributions (default: one of Quire's)")
    two.add_argument(
        "--tokens", type=parse_int, metavar="N", help=f"how many of its tokens to score (default: {NUM_TOKENS})"
    )
    add_model(parser)
    add_flags(parser, ENGINE_FLAGS)
    add_vllm_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Ask, grade and print."""
    from quire.server.evaluation import available_skills, evaluate, load_questions

    _check_arguments(args)
    for warning in [*args.flag_warnings, *apply_vllm_flags(args)]:
        print(warning, file=sys.stderr)
    skills = None if args.skills is None else [name.strip() for name in args.skills.split(",") if name.strip()]
    if skills == []:
        raise ConfigError(f"--skills {args.skills!r} names none; there are {', '.join(available_skills())}")
    questions = load_questions(skills, args.limit)
    if args.compare:
        return _compare_models(args, questions)
    if args.url:
        from quire.server.evaluation.client import ChatClient

        client = ChatClient(args.url, args.served_model, args.api_key, args.max_concurrency)
        report, model = evaluate(client.answer_conversations, questions=questions), client.model
    else:
        engine_args = make_engine_args(args)
        check_names(engine_args)  # before torch is imported
        with open_engine(engine_args) as llm:
            report = evaluate(partial(answer_conversations, llm), questions=questions)
            model = str(engine_args.model)
    if args.json:
        print(json.dumps({"model": model, **report.to_dict()}, indent=2, ensure_ascii=False))
    else:
        print(report.table())
        for failure in report.failures[: args.failures]:
            print(f"{failure.id}: {failure.asked!r}\n    wrote {failure.text!r}\n    right {failure.answer!r}")
    if args.min_exact_match is not None and report.exact_match < args.min_exact_match:
        print(f"quire: exact match {report.exact_match:.4f} is below {args.min_exact_match}", file=sys.stderr)
        return 1
    return 0


def _compare_models(args: argparse.Namespace, questions: list[Any]) -> int:
    from quire.server.evaluation.compare_command import compare_sides, parse_side
    from quire.server.evaluation.text import read_held_out_text

    sides = [parse_side(text, args) for text in args.compare]
    text = read_held_out_text(args.text)
    allowed = MAX_LOSS if args.max_loss is None else args.max_loss
    comparison = compare_sides(sides, questions, text, args.tokens or NUM_TOKENS, allowed)
    if args.json:
        print(json.dumps(comparison.to_dict(), indent=2, ensure_ascii=False))
    else:
        print(comparison.table())
        for failure in comparison.lost_answers()[: args.failures]:
            print(f"{failure.id}: {failure.asked!r}\n    B wrote {failure.text!r}\n    right   {failure.answer!r}")
    return int(args.max_loss is not None and not comparison.within)


def _check_arguments(args: argparse.Namespace) -> None:
    for name, least in (("limit", 1), ("max_concurrency", 1), ("failures", 0), ("tokens", 1), ("max_loss", 0)):
        if (value := getattr(args, name)) is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if args.min_exact_match is not None and not 0 <= args.min_exact_match <= 1:
        raise ConfigError(f"--min-exact-match must be between 0 and 1, got {args.min_exact_match}")
    if args.compare:
        if args.model_argument or args.model:
            raise ConfigError("--compare names both models; leave MODEL out")
        if args.url or args.min_exact_match is not None:
            flag = "--url" if args.url else "--min-exact-match"
            raise ConfigError(f"{flag} does not go with --compare, which runs both models here; leave it out")
    else:
        for name in ("max_loss", "text", "tokens"):
            if getattr(args, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} is for two models; name them with --compare")
    if args.url:
        if args.model_argument or args.model or make_engine_args(args) != EngineArgs():
            raise ConfigError(
                "MODEL and the engine's flags are the server's with --url; name its model with --served-model"
            )
    else:
        for name in ("served_model", "api_key"):
            if getattr(args, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} is for a running server; name it with --url")
