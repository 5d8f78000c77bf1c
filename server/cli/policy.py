"""``quire policy``: show or switch the scheduling policy of a running server."""

from __future__ import annotations

import argparse
from typing import Any

from quire.core.errors import ConfigError
from quire.core.plugin.options import split_key_values
from quire.core.plugin.target import make_absolute

__all__ = ["add_admin_flags", "add_parser", "call_admin_route", "format_policy"]

_ABOUT = """Show or switch the scheduling policy of a running server, which must have been started with
--admin-api-key."""


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser("policy", help="show or switch the scheduling policy", description=_ABOUT)
    parser.set_defaults(run=lambda args: parser.print_help())
    actions = parser.add_subparsers(metavar="ACTION")
    show = actions.add_parser("show", help="the policy of a server, and its options")
    add_admin_flags(show)
    show.set_defaults(run=_run_show)
    change = actions.add_parser("set", help="switch to another policy, or to other options; no request is dropped")
    change.add_argument(
        "name", metavar="NAME[,KEY=VALUE]", help="as for --scheduling-policy, with options as in quire simulate and ab"
    )
    change.add_argument(
        "options", nargs="*", metavar="KEY=VALUE", help="its options; those that are left out get their defaults"
    )
    add_admin_flags(change)
    change.set_defaults(run=_run_set)


def add_admin_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which server is asked."""
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)")
    parser.add_argument("--admin-api-key", required=True, metavar="KEY", help="the key that it was started with")


def call_admin_route(server: str, admin_key: str | None, method: str, path: str, body: Any = None) -> Any:
    """The answer of a route below ``/admin``. Raises ``ConfigError`` with what the server says is wrong."""
    import httpx

    url = f"{server.rstrip('/').removesuffix('/v1')}{path}"
    headers = {"Authorization": f"Bearer {admin_key}"} if admin_key else {}
    try:
        answer = httpx.request(method, url, json=body, headers=headers, timeout=60)
    except httpx.HTTPError as error:
        raise ConfigError(f"{url} cannot be reached ({error}); name the server with --url") from error
    if answer.status_code == 200:
        return answer.json()
    try:
        message = str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = answer.text[:200]
    if answer.status_code == 404 and "nothing at this path" in message:
        message = "it has no routes below /admin; start it with --admin-api-key"
    raise ConfigError(f"{url} answered {answer.status_code}: {message}")


def _run_show(args: argparse.Namespace) -> int:
    print(format_policy(call_admin_route(args.url, args.admin_api_key, "GET", "/admin/policy")))
    return 0


def _run_set(args: argparse.Namespace) -> int:
    name, *pairs = args.name.split(",")
    body = {"name": make_absolute(name), "options": split_key_values([*pairs, *args.options])}
    print(format_policy(call_admin_route(args.url, args.admin_api_key, "POST", "/admin/policy", body)))
    return 0


def format_policy(policy: dict[str, Any]) -> str:
    """One line of what ``/admin/policy`` answers."""
    given = ", ".join(f"{key}={value}" for key, value in policy["options"].items()) or "defaults"
    times = "once" if policy["num_switches"] == 1 else f"{policy['num_switches']} times"
    text = f"{policy['name']} ({given}), switched {times}"
    if policy["quarantined"]:
        text += f"; in place of {policy['quarantined']['name']}, quarantined: {policy['quarantined']['reason']}"
    return text
