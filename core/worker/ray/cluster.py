"""The Ray cluster in which ranks run: joining it, and finding room for them. Each failure is one line."""

from __future__ import annotations

import contextlib
import importlib
import logging
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from quire.core.errors import ConfigError
from quire.core.worker.ray.connection import is_reachable

__all__ = ["RankSlot", "RayCluster", "RayNode"]

_log = logging.getLogger("quire.engine")
_REACH_S = 5.0
_PROBE_S = 1.0
_RELEASE_S = 5.0
"""How long to wait for Ray to take back what it gave: where its head is gone, it does not answer."""


@dataclass(frozen=True, slots=True)
class RayNode:
    """One node, as Ray describes it."""

    node_id: str
    host: str
    """Its address, at which the other nodes reach it."""
    port: int
    """Where the node's own Ray process listens."""
    num_units: int
    """CPUs or GPUs, whichever the ranks take."""

    @property
    def is_there(self) -> bool:
        """Whether its Ray process answers. Ray itself notices that a node is gone only after some time."""
        return is_reachable(self.host, self.port, _PROBE_S)


@dataclass(frozen=True, slots=True)
class RankSlot:
    """Where a rank is to run."""

    node: RayNode
    bundle: int
    """Of the placement group."""


class RayCluster:
    """The cluster that this process joins, and leaves with ``close`` unless it was in one before."""

    def __init__(self, address: str, unit: str) -> None:
        """``address``: ``HOST:PORT`` of its head, or ``auto``. ``unit``: what each rank takes one of, ``CPU`` or
        ``GPU``. Raises ``ConfigError`` where there is none, or this host is not one of its nodes."""
        self._address, self._unit = address, unit
        self._group: Any = None
        self._actors: list[Any] = []
        with _kept_signals():
            ray: Any = importlib.import_module("ray")
            self._groups: Any = importlib.import_module("ray.util.placement_group")
        self._ray = ray
        self._joined = not ray.is_initialized()
        if self._joined:
            self._join()
        self.address: str = ray.get_runtime_context().gcs_address
        """Of the head."""
        self.host: str = ray.util.get_node_ip_address()
        """This node, as the others reach it."""

    def _join(self) -> None:
        host, _, port = self._address.rpartition(":")
        if port.isdigit() and not is_reachable(host.strip("[]"), int(port), _REACH_S):
            raise ConfigError(
                f"no Ray cluster answers at {self._address}: start one there with `ray start --head`, or look at "
                "--executor-option address and RAY_ADDRESS"
            )
        try:
            with _kept_signals():
                self._ray.init(address=self._address, logging_level=logging.ERROR, log_to_driver=True)
        except Exception as error:  # of many classes
            self._ray.shutdown()
            if isinstance(error, ConnectionError) and self._address == "auto":
                raise ConfigError(
                    "there is no Ray cluster on this host: start one with `ray start --head`, join others from their "
                    "hosts with `ray start --address=HOST:6379`, or say where it is with --executor-option "
                    "address=HOST:PORT"
                ) from None
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"the Ray cluster at {self._address} cannot be joined: {reason} (this host has to be one of its nodes: "
                "`ray start --address=HOST:PORT`, with the same versions of Python and Ray)"
            ) from None

    def list_nodes(self) -> list[RayNode]:
        """The nodes that Ray takes for alive."""
        return [
            RayNode(
                node["NodeID"],
                node["NodeManagerAddress"],
                int(node["NodeManagerPort"]),
                int(node["Resources"].get(self._unit, 0)),
            )
            for node in self._ray.nodes()
            if node["Alive"]
        ]

    def reserve(self, num_ranks: int, wait_s: float) -> list[RankSlot]:
        """A slot for each rank, on as few nodes as possible; ranks of a node are neighbours, and this node comes first.
        Waits ``wait_s`` for what others use. Raises ``ConfigError`` that says what there is."""
        self._check_size(num_ranks)
        self._group = self._groups.placement_group([{self._unit: 1}] * num_ranks, strategy="PACK")
        if not self._group.wait(wait_s):
            self._check_size(num_ranks)  # a node may have gone meanwhile
            raise ConfigError(
                f"{self._describe_need(num_ranks)}, and not all of them became free within {wait_s:.0f} s; end what "
                "uses them (`ray status`, `ray list actors`), or raise --executor-option wait_s"
            )
        nodes = {node.node_id: node for node in self.list_nodes()}
        node_ids = self._groups.placement_group_table(self._group)["bundles_to_node_id"]
        bundles: dict[str, list[int]] = {}
        for bundle in range(num_ranks):
            bundles.setdefault(node_ids[bundle], []).append(bundle)
        own = self._ray.get_runtime_context().get_node_id()
        order = sorted(bundles, key=lambda each: (-len(bundles[each]), each != own, nodes[each].host))
        return [RankSlot(nodes[node_id], bundle) for node_id in order for bundle in bundles[node_id]]

    def _check_size(self, num_ranks: int) -> None:
        if sum(node.num_units for node in self.list_nodes()) < num_ranks:
            raise ConfigError(
                f"{self._describe_need(num_ranks)}; start Ray on more hosts (`ray start --address={self.address}`), or "
                "lower --tensor-parallel-size or --pipeline-parallel-size"
            )

    def start_actor(self, actor_class: type, slot: RankSlot, *arguments: Any) -> Any:
        """An actor in the place of a rank; returns at once."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=slot.bundle)
        units = {"num_cpus": 1, "num_gpus": 0} if self._unit == "CPU" else {"num_cpus": 0, "num_gpus": 1}
        actor: Any = self._ray.remote(actor_class).options(scheduling_strategy=strategy, **units).remote(*arguments)
        self._actors.append(actor)
        return actor

    def get(self, reference: Any, seconds: float) -> Any:
        """What a call of an actor returned. Raises what it raised, or what Ray says of an actor that is gone or does
        not answer in time."""
        return self._ray.get(reference, timeout=seconds)

    def is_done(self, reference: Any) -> bool:
        """Whether ``get`` would return at once."""
        return bool(self._ray.wait([reference], timeout=0)[0])

    def close(self) -> None:
        """End the actors, free their places and leave the cluster. Idempotent; waits for some seconds at most."""
        actors, group, joined = self._actors, self._group, self._joined
        self._actors, self._group, self._joined = [], None, False

        def release() -> None:
            for actor in actors:
                with contextlib.suppress(Exception):
                    self._ray.kill(actor)
            if group is not None:
                with contextlib.suppress(Exception):
                    self._groups.remove_placement_group(group)
            if joined:
                with contextlib.suppress(Exception):
                    self._ray.shutdown()

        if actors or group is not None or joined:
            thread = threading.Thread(target=release, name="quire-ray-release", daemon=True)
            with contextlib.suppress(RuntimeError):  # where the interpreter ends already, and Ray with it
                thread.start()
                thread.join(_RELEASE_S)

    def _describe_need(self, num_ranks: int) -> str:
        nodes = self.list_nodes()
        total = sum(node.num_units for node in nodes)
        each = ", ".join(f"{node.host} {node.num_units}" for node in sorted(nodes, key=lambda node: node.host))
        free = ""
        if total >= num_ranks:  # what is free is known some time after a node has joined
            free = f", {int(self._ray.available_resources().get(self._unit, 0))} of them free"
        return f"{num_ranks} ranks take a {self._unit} each, and the Ray cluster has {total}{free} ({each})"


@contextlib.contextmanager
def _kept_signals() -> Iterator[None]:
    """Ray replaces the handler of SIGTERM of the process that joins it; who ends this process, its parent decides."""
    is_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if is_main and handler is not None:
                signal.signal(number, handler)
