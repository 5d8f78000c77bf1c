"""Ranks on the nodes of a Ray cluster, each held by an actor: told over TCP, looked after through Ray."""

from __future__ import annotations

import contextlib
import logging
import secrets
import select
import socket
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from quire.core.env import collective_environment
from quire.core.errors import ConfigError, EngineDeadError, WorkerDiedError
from quire.core.worker.multiproc.frames import make_frame
from quire.core.worker.multiproc.rank_group import RankConnection, RankEnd, RankGroup
from quire.core.worker.multiproc.rank_launch import RankPlace, describe_exit_status
from quire.core.worker.multiproc.rank_layout import RankLayout
from quire.core.worker.multiproc.rank_status import RankStatus
from quire.core.worker.ray.cluster import RankSlot, RayCluster
from quire.core.worker.ray.connection import accept_rank, listen
from quire.core.worker.ray.supervisor import NodeFacts, RankSupervisor, read_versions

__all__ = ["RayRanks"]

_log = logging.getLogger("quire.engine")
_ACTOR_S = 60.0
"""How long Ray may take to start an actor: a Python process, on a host that may be busy."""
_CONNECT_S = 30.0
_ANSWER_S = 3.0
"""How long a supervisor may take: longer than its node may be busy, shorter than the engine core waits with a hang."""
_END_WAIT_S = 4.0
"""Longer than a supervisor waits before it kills."""
_CAUSE_WAIT_S = 1.0
_STACKS_S = 1.0
"""Ray takes the lines to this host meanwhile."""


class RayRanks(RankGroup):
    """A process for each rank of ``layout``, wherever the cluster has room. They end with this process, or with the
    last connection to it."""

    def __init__(self, cluster: RayCluster, layout: RankLayout, device: str, wait_s: float) -> None:
        """Raises ``ConfigError`` where they cannot be placed, ``EngineDeadError`` where they cannot be started."""
        super().__init__(layout.num_ranks)
        self.layout = layout
        self.statuses = [RankStatus() for _ in range(self.size)]
        self._cluster, self._device = cluster, device
        self._slots: list[RankSlot] = []
        self._pids: list[int] = []
        self._supervisors: list[Any] = []
        try:
            self._slots = cluster.reserve(self.size, wait_s)
            self._supervisors = [
                cluster.start_actor(RankSupervisor, slot, rank) for rank, slot in enumerate(self._slots)
            ]
            self._start()
        except BaseException:
            self.kill()
            raise

    def _start(self) -> None:
        facts: list[NodeFacts] = self._ask_all("read_facts", _ACTOR_S)
        self._check_versions(facts)
        hosts = [slot.node.host for slot in self._slots]
        store_port = self._get(0, self._supervisors[0].open_store.remote(hosts[0]), _ANSWER_S)
        self.store_address = (hosts[0], store_port)
        token = secrets.token_bytes(32)
        with listen(self._cluster.host, self.size) as listener:
            address, shared, references = listener.getsockname()[:2], collective_environment(), []
            for rank, (supervisor, host) in enumerate(zip(self._supervisors, hosts, strict=True)):
                neighbours = [other for other in range(self.size) if hosts[other] == host]
                gpu_ids = [gpu for other in neighbours for gpu in facts[other].gpu_ids]
                # Each rank sees all GPUs of its node that are this engine's, as collective libraries want it.
                visible = {"CUDA_VISIBLE_DEVICES": ",".join(gpu_ids)} if gpu_ids else {}
                place = RankPlace(rank, self.size, self._device, neighbours.index(rank), len(neighbours), "stream")
                references.append(supervisor.start_rank.remote(place, address, token, host, shared, visible))
            connections = self._accept(listener, token, references)
        self._pids = [self._get(rank, reference, _ANSWER_S) for rank, reference in enumerate(references)]
        for rank in range(self.size):
            connections[rank].setblocking(False)
            self._add_connection(connections[rank])
            _log.info("%s writes to %s there", self.describe_rank(rank), facts[rank].log_path or "the logs of Ray")

    def _check_versions(self, facts: Sequence[NodeFacts]) -> None:
        own = read_versions()
        for slot, each in zip(self._slots, facts, strict=True):
            for package, version in each.versions.items():
                if version != own[package]:
                    raise ConfigError(
                        f"node {slot.node.host} has {package} {version}, and this host {own[package]}: install the "
                        "same on every node"
                    )

    def _accept(self, listener: socket.socket, token: bytes, references: Sequence[Any]) -> dict[int, socket.socket]:
        connections: dict[int, socket.socket] = {}
        listener.settimeout(0.2)
        deadline = time.monotonic() + _CONNECT_S
        while len(connections) < self.size:
            if accepted := accept_rank(listener, token):
                connections[accepted[0]] = accepted[1]
                continue
            for rank, reference in enumerate(references):
                if rank not in connections and (self._cluster.is_done(reference) or time.monotonic() > deadline):
                    self._get(rank, reference, 0.1)  # raises why it did not connect
        return connections

    @property
    def pids(self) -> list[int]:
        """By rank, each as its node numbers it."""
        return self._pids

    def describe_rank(self, rank: int) -> str:
        """A rank with its process and its node."""
        pid = f"process {self._pids[rank]} " if self._pids else ""
        return self.layout.describe_rank(rank, f"{pid}on {self._slots[rank].node.host}")

    # ---- Messages.

    def broadcast(self, data: bytes) -> None:
        """Send a message to every rank; what a connection does not take yet is sent while ``receive`` waits."""
        frame = make_frame(b"", data)
        for connection in self._connections:
            num_sent = 0 if connection.to_send else self._send(connection, frame)
            if num_sent < len(frame):
                connection.to_send += frame[num_sent:]
                self._poll.modify(connection.socket.fileno(), select.POLLIN | select.POLLOUT)

    def _flush(self, connection: RankConnection) -> None:
        num_sent = self._send(connection, bytes(connection.to_send))
        del connection.to_send[:num_sent]
        if not connection.to_send:
            self._poll.modify(connection.socket.fileno(), select.POLLIN)

    def _send(self, connection: RankConnection, data: bytes) -> int:
        try:
            return connection.socket.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            raise WorkerDiedError(self.describe_end([connection.rank])) from None

    # ---- What supervisors say.

    def _ask_all(self, method: str, seconds: float) -> list[Any]:
        """What each supervisor answers. Raises ``EngineDeadError`` where one does not."""
        references = [getattr(supervisor, method).remote() for supervisor in self._supervisors]
        deadline = time.monotonic() + seconds
        return [
            self._get(rank, reference, max(0.1, deadline - time.monotonic()))
            for rank, reference in enumerate(references)
        ]

    def _get(self, rank: int, reference: Any, seconds: float) -> Any:
        try:
            return self._cluster.get(reference, seconds)
        except Exception as error:  # what the call raised, or Ray's own
            self._fail_start(rank, error)

    def _fail_start(self, rank: int, error: Exception) -> NoReturn:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1][:300] if lines else type(error).__name__
        if "ModuleNotFoundError" in reason:
            reason += "; install the same version of Quire on every node"
        if not self._slots[rank].node.is_there:
            reason = "its node has disappeared: the Ray process there does not answer"
        raise EngineDeadError(f"{self.describe_rank(rank)} could not start: {reason}") from None

    def _try_all(self, method: str, *arguments: Any) -> dict[int, Any]:
        """What those supervisors answer that do, by rank."""
        references, answers = {}, {}
        for rank, supervisor in enumerate(self._supervisors):
            with contextlib.suppress(Exception):
                references[rank] = getattr(supervisor, method).remote(*arguments)
        deadline = time.monotonic() + _ANSWER_S
        for rank, reference in references.items():
            with contextlib.suppress(Exception):
                answers[rank] = self._cluster.get(reference, max(0.1, deadline - time.monotonic()))
        return answers

    def _find_lost(self) -> list[int]:
        """Ranks whose node is gone."""
        nodes = {slot.node for slot in self._slots}
        lost = {node for node in nodes if not node.is_there}
        return [rank for rank, slot in enumerate(self._slots) if slot.node in lost]

    def _find_ends(self, ranks: Sequence[int]) -> list[RankEnd]:
        lost = self._find_lost()
        statuses = self._try_all("get_exit_status", _CAUSE_WAIT_S if ranks and not lost else 0.0)
        if any(rank not in statuses for rank in ranks):
            lost = self._find_lost()  # a node's Ray process may end after what it had started
        ends = []
        for rank in range(self.size):
            if rank in lost:
                ends.append(
                    RankEnd(rank, None, "disappeared with its node, whose Ray process does not answer any more")
                )
            elif statuses.get(rank) is not None:
                ends.append(RankEnd(rank, statuses[rank], describe_exit_status(statuses[rank])))
            elif rank in ranks and rank not in statuses:
                ends.append(RankEnd(rank, None, "ended with the Ray actor that held it; the logs of Ray say why"))
        return ends

    def find_stopped(self) -> list[int]:
        """Ranks that a signal or a debugger has stopped."""
        return [rank for rank, is_stopped in self._try_all("is_stopped").items() if is_stopped]

    def describe_hang(self, seconds: float, what: str) -> str:
        """Why ``what`` may not have ended for so long, where no end of a connection told it."""
        if lost := self._find_lost():
            return self.describe_end(lost)
        answers = self._try_all("is_stopped")
        if silent := [rank for rank in range(self.size) if rank not in answers]:
            return (
                f"{self.describe_rank(silent[0])} and what watches it there do not answer: {what} has not ended for "
                f"{seconds:.0f} s; its node may be stopped, or cut off"
            )
        return super().describe_hang(seconds, what)

    def dump_stacks(self) -> str:
        """Have every rank write the stacks of its threads to its log."""
        self._try_all("dump_stacks")
        time.sleep(_STACKS_S)
        return "the log of each on its node"

    # ---- The end.

    def shutdown(self) -> None:
        """Let every rank end, and kill those that do not. Idempotent."""
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.socket.shutdown(socket.SHUT_WR)  # the end of its messages
        running, deadline = list(self._connections), time.monotonic() + _END_WAIT_S
        while running and time.monotonic() < deadline:
            poll = select.poll()
            for connection in running:
                poll.register(connection.socket.fileno(), select.POLLIN)
            ready = {fd for fd, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1e3)}
            running = [each for each in running if each.socket.fileno() not in ready or each.read()]
        self.kill()

    def kill(self) -> None:
        """End every rank at once: their supervisors do so when the connections end, and Ray ends those. Idempotent."""
        for connection in self._connections:
            connection.socket.close()
        self._connections = []
        self._cluster.close()
