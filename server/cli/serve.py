"""``quire serve``: load a model and answer HTTP requests."""

from __future__ import annotations

import argparse
from typing import Any

from quire.core.engine.plugin_names import check_names
from quire.core.engine.process import EngineProcess
from quire.core.env import vllm_variables
from quire.server.cli.flags import (
    ENGINE_FLAGS,
    SERVER_FLAGS,
    add_flags,
    add_model,
    make_engine_args,
    make_server_settings,
)
from quire.server.cli.vllm_flags import add_vllm_flags, apply_vllm_flags, apply_vllm_variables
from quire.server.http.listening import bind_sockets
from quire.server.http.signals import StopSignals
from quire.server.http.template_defaults import parse_template_defaults
from quire.server.http.tls import make_ssl_context

__all__ = ["add_parser", "run"]

_ABOUT = "Serve a model over HTTP, with an OpenAI-compatible API."


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "serve", help="serve a model over HTTP", description=_ABOUT, usage="quire serve [MODEL] [options]"
    )
    add_model(parser)
    parser.add_argument(
        "--config", dest="config_file", metavar="FILE", help="YAML file of flags by their names; the command line wins"
    )
    add_flags(parser, (*SERVER_FLAGS, *ENGINE_FLAGS))
    add_vllm_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal ends it."""
    flag_warnings = [*args.flag_warnings, *apply_vllm_flags(args), *apply_vllm_variables(args, vllm_variables())]
    engine_args, settings = make_engine_args(args), make_server_settings(args)
    ssl_context = make_ssl_context(settings)  # what is wrong shows before anything is started
    parse_template_defaults(settings.default_chat_template_kwargs)
    with (
        bind_sockets(settings) as sockets,
        StopSignals() as signals,
        EngineProcess(engine_args.device, engine_args.num_workers, engine_args.executor) as process,
    ):
        signals.call_before_exit(process.kill_at_once)
        check_names(engine_args)
        from quire.server.http.serving import serve  # seconds, while the process does the same

        return serve(engine_args, settings, process, sockets, signals, args, flag_warnings, ssl_context)
