"""Tenants take turns: one who has much in the system already waits behind one who has little."""

from collections import Counter
from dataclasses import dataclass

from quire.sdk import BatchingPolicy, RequestInfo, Usage, hookimpl


@hookimpl
def quire_register_policy(register):
    register("take_turns", "quire_take_turns:TakeTurns", "tenants (cache_salt) take turns, a few requests each")


class TakeTurns(BatchingPolicy):
    """Ranks a request by how many its tenant has in the system already, then by arrival."""

    @dataclass(frozen=True)
    class Options:
        burst: int = 1
        """Requests that a tenant may queue in one turn."""

        def __post_init__(self) -> None:
            if self.burst < 1:
                raise ValueError("burst must be at least 1")

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options or self.Options())
        self.present: Counter[str | None] = Counter()

    def admission_key(self, request: RequestInfo) -> tuple[int, int]:
        turn = self.present[request.cache_salt] // self.options.burst
        self.present[request.cache_salt] += 1
        return turn, request.arrival_ns

    def request_finished(self, request: RequestInfo, usage: Usage) -> None:
        self.present[request.cache_salt] -= 1
