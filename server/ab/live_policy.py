"""The scheduling policy of a running server, for the time of an A/B test."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from typing import Any

from quire.core.errors import ConfigError, PluginError
from quire.core.plugin.options import parse_options
from quire.core.plugin.target import load_target, make_absolute
from quire.server.ab.simulated import Block
from quire.server.bench.report import make_progress_bar
from quire.server.cli.policy import call_admin_route, format_policy
from quire.server.simulate.setup import PluginSpec

__all__ = ["LivePolicy", "check_policies"]


def check_policies(urls: Sequence[str], admin_key: str, policies: Sequence[PluginSpec]) -> None:
    """Raises ``ConfigError`` where a server does not schedule by the policy of its arm, with the options of it: what
    the report would say of it is measured of another."""
    for letter, url, policy in zip("ab", urls, policies, strict=True):
        served = call_admin_route(url, admin_key, "GET", "/admin/policy")
        if served["name"] != policy.name or not _are_equal_options(policy, served["options"]):
            raise ConfigError(
                f"--{letter} is {policy.text}, and {url} schedules by {format_policy(served)}; give it the arm's with "
                "quire policy set, or when it starts"
            )


def _are_equal_options(policy: PluginSpec, options: dict[str, Any]) -> bool:
    """Whether they say the same: ``aging=0`` is ``aging=0.0``, and a default may be left out."""
    cls = load_target(policy.target, "quire.core.contracts.policy:BatchingPolicy")
    try:
        return bool(parse_options(cls, options) == parse_options(cls, policy.options))
    except PluginError:  # the server has another version of it
        return False


class LivePolicy:
    """Switches a server's policy at the beginning of each block, and afterwards gives back the one that it had."""

    def __init__(self, url: str, admin_key: str | None) -> None:
        self._url = url
        self._admin_key = admin_key
        self._original: dict[str, Any] | None = None
        self.num_switches = 0
        self.longest_switch_s = 0.0
        """From the beginning of a block until the server had its policy, at most."""

    async def prepare(self) -> None:
        """Ask for the policy that is to be given back, so that ``follow_blocks`` begins at once."""
        self._original = await self._call("GET")

    async def follow_blocks(self, policies: Sequence[PluginSpec], blocks: Sequence[Block]) -> None:
        """Switch until the last block has ended. Raises ``ConfigError`` if the server refuses, or if a policy was
        quarantined in a block: the one that took over would be measured in its place."""
        minutes = blocks[-1].end_s / 60
        print(f"{len(blocks)} stretches of {blocks[0].end_s:g} s on {self._url}: {minutes:.1f} min", file=sys.stderr)
        start = time.perf_counter()
        with make_progress_bar(len(blocks), "switchback", "stretch") as bar:
            for block in blocks:
                await asyncio.sleep(max(start + block.start_s - time.perf_counter(), 0))
                await self._check_quarantine()
                policy = policies[block.arm]
                name = make_absolute(policy.text.partition(",")[0])
                await self._call("POST", {"name": name, "options": policy.options})
                self.num_switches += 1
                late_s = time.perf_counter() - start - block.start_s
                self.longest_switch_s = max(self.longest_switch_s, late_s)
                bar.update()
            await asyncio.sleep(max(start + blocks[-1].end_s - time.perf_counter(), 0))
            await self._check_quarantine()

    async def give_back(self) -> None:
        """Ask the policy again that was asked before the test."""
        if self._original is not None:
            await self._call("POST", {"name": self._original["name"], "options": self._original["options"]})

    def describe_interruption(self, num_blocks: int) -> str:
        """What is said of a test that was ended before its end."""
        text = f"interrupted in stretch {self.num_switches} of {num_blocks}"
        return text if self._original is None else f"{text}; the policy is {format_policy(self._original)} again"

    async def _check_quarantine(self) -> None:
        quarantined = (await self._call("GET"))["quarantined"] if self.num_switches else None
        if quarantined:
            raise ConfigError(
                f"{quarantined['name']} was quarantined ({quarantined['reason']}), and the policy that took over would "
                "be measured in its place; mend it, and run quire plugins check policy/NAME"
            )

    async def _call(self, method: str, body: Any = None) -> Any:
        return await asyncio.to_thread(call_admin_route, self._url, self._admin_key, method, "/admin/policy", body)
