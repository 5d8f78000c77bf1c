"""A page at ``/board``, a command that reads it, a flag for its title, and a metric: every way to extend the server."""

import json
import urllib.error
import urllib.request

from quire.sdk import QuireError, hookimpl


@hookimpl
def quire_add_arguments(parser):
    parser.add_argument("--board-title", default="Quire", help="title of the page at /board")


@hookimpl
def quire_register_commands(subparsers):
    parser = subparsers.add_parser("board", help="print what a server shows at /board")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.set_defaults(run=print_board)


@hookimpl
def quire_register_metrics(register):
    register("board", "quire_status_board.exporter:BoardExporter", "the longest answer, for the page at /board")


@hookimpl
def quire_extend_app(app):
    @app.get("/board")
    async def board():
        """The title, and how the server does."""
        state = app.state.server
        figures = [e.longest for e in state.engine.exporters if type(e).__name__ == "BoardExporter"]
        return {"title": state.arguments.board_title, "longest_answer": max(figures, default=None)}


def print_board(args):
    try:
        with urllib.request.urlopen(f"{args.url}/board", timeout=10) as answer:
            board = json.load(answer)
    except urllib.error.URLError as error:
        raise QuireError(f"--url {args.url}: {error.reason}; start a server with --plugin quire-status-board") from None
    print(f"{board['title']}: longest answer {board['longest_answer']} tokens")
    return 0
