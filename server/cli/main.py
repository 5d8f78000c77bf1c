"""The command line: ``quire serve``, ``quire bench``, ``quire eval``, ``quire quantize``, ``quire simulate``,
``quire trace``, ``quire plugins``.

Nothing here imports torch or fastapi; a command does so when it runs. A user's error is one line on stderr,
``quire: error: ...``, and exit status 2.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

from quire.core.errors import QuireError
from quire.core.version import __version__

__all__ = ["COMMANDS", "Parser", "call_argument_hooks", "main", "make_parsers", "parse_arguments"]

COMMANDS = {
    "serve": "quire.server.cli.serve",
    "bench": "quire.server.cli.bench",
    "eval": "quire.server.evaluation.command",
    "quantize": "quire.server.quantize.command",
    "simulate": "quire.server.simulate.command",
    "ab": "quire.server.ab.command",
    "trace": "quire.server.cli.trace",
    "policy": "quire.server.cli.policy",
    "explain": "quire.server.cli.explain",
    "plugins": "quire.server.cli.plugins",
}
"""The module of each command, with ``add_parser(subparsers)`` and ``run(args) -> int``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    if argv is None:
        signal.signal(signal.SIGTERM, _end_orderly)
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        parser, subparsers = make_parsers()
        call_argument_hooks(words, subparsers)
        args = parse_arguments(parser, words)
        if getattr(args, "run", None) is None:
            parser.print_help()
            return 0
        return int(args.run(args) or 0)
    except QuireError as error:
        print(f"quire: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except _Terminated:
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 141


def _end_orderly(number: int, frame: FrameType | None) -> NoReturn:
    """End as on Ctrl-C: servers that a benchmark started are stopped and temporary folders removed."""
    raise _Terminated


class _Terminated(KeyboardInterrupt):
    """SIGTERM came. No ``SystemExit``, which counts as a fault of the plugin in whose code it is raised."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with the closest known flag."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _Formatter)
        super().__init__(**kwargs, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Print the error on one line and exit with status 2."""
        text = " ".join(message.split()).removeprefix("argument ")
        print(f"quire: error: {text}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)

    def list_flags(self) -> list[str]:
        """Every flag that ``--help`` shows."""
        return [name for a in self._actions if a.help is not argparse.SUPPRESS for name in a.option_strings]


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=118)


def make_parsers() -> tuple[Parser, Any]:
    """The parser of ``quire``, and the action that holds the parser of each command."""
    parser = Parser(prog="quire", description="An LLM serving engine in which every component is a plugin.")
    parser.add_argument("--version", action="version", version=f"quire {__version__}")
    parser.add_argument(
        "--plugin",
        action="append",
        metavar="DIST",
        dest="plugins_before",
        help="turn on a distribution's hooks; may repeat",
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", parser_class=Parser)
    for module in COMMANDS.values():
        importlib.import_module(module).add_parser(subparsers)
    return parser, subparsers


def call_argument_hooks(words: Sequence[str], subparsers: Any) -> None:
    """Let the distributions named by ``--plugin`` add arguments to ``serve``, and commands of their own."""
    distributions = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "--plugin"]
    distributions += [word.partition("=")[2] for word in words if word.startswith("--plugin=")]
    if not distributions:
        return
    from quire.core.plugin.manager import PluginManager

    plugins = PluginManager(enabled=distributions)
    plugins.call_hook("quire_add_arguments", parser=subparsers.choices["serve"])
    plugins.call_hook("quire_register_commands", subparsers=subparsers)


def parse_arguments(parser: Parser, words: list[str]) -> argparse.Namespace:
    """The parsed command line, with the lines to log as ``flag_warnings``; what is wrong with it ends the process."""
    from quire.core.engine.vllm_names import VLLM_COMMANDS
    from quire.server.cli.vllm_flags import find_boolean_flags, normalize_spelling

    command_parser = _find_command_parser(parser, words)
    if command_parser is parser and words and words[0] in VLLM_COMMANDS:  # and no plugin has it
        parser.error(f"{words[0]}: {VLLM_COMMANDS[words[0]]}")
    normalized, flag_warnings = normalize_spelling(words, find_boolean_flags(command_parser))
    args = _parse_known(parser, command_parser, normalized)
    if file := getattr(args, "config_file", None):
        from quire.server.cli.config_file import fill_in, read_flags

        fill_in(args, _parse_known(command_parser, command_parser, read_flags(file, command_parser)))
    args.flag_warnings = flag_warnings
    return args


def _parse_known(parser: Parser, command_parser: Parser, words: list[str]) -> argparse.Namespace:
    """The parsed words; a flag that is not known ends the command, with the closest that is."""
    from quire.server.cli.vllm_flags import explain_absent_flag

    args, unknown = parser.parse_known_args(words)
    unknown = [word for word in unknown if explain_absent_flag(word) != ""]
    if unknown:
        word = next((word for word in unknown if word.startswith("-")), unknown[0])
        flag = word.partition("=")[0] if word.startswith("-") else word
        if (fate := explain_absent_flag(flag)) is not None:
            command_parser.error(fate)
        if not flag.startswith("-") and (before := _find_repeatable_flag(command_parser, words, flag)):
            command_parser.error(f"{before} takes one value at a time: write {before} for each")
        close = difflib.get_close_matches(flag, command_parser.list_flags(), n=1)
        command_parser.error(f"unknown argument {flag}" + (f"; did you mean {close[0]}?" if close else ""))
    return args


def _find_repeatable_flag(parser: Parser, words: Sequence[str], word: str) -> str | None:
    """The flag before ``word``, if it may be repeated for several values: ``--api-key`` in ``--api-key A B``."""
    before = [each.partition("=")[0] for each in words[: words.index(word)] if each.startswith("-")]
    action = parser._option_string_actions.get(before[-1]) if before else None
    return before[-1] if isinstance(action, argparse._AppendAction) else None


def _find_command_parser(parser: Parser, words: Sequence[str]) -> Parser:
    """The parser of the command, or of its subcommand, that the command line names."""
    for word in words:
        branches = [a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        if not branches:
            break
        command_parser = branches[0].get(word)
        parser = command_parser if isinstance(command_parser, Parser) else parser
    return parser
