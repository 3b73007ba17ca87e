"""The fleet's members: which replicas join and leave it, what they serve together, and which of them are ejected."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

import structlog

from unlatch.common.telemetry.internal_errors import InternalErrors
from unlatch.gateway.fleet.catalogue import FleetCatalogue
from unlatch.gateway.fleet.discovery import Discovery
from unlatch.gateway.fleet.replica import Replica, ReplicaEvents
from unlatch.gateway.fleet.status import ReplicaStatus

log = structlog.get_logger()

# Until a replica is opened anew whose task has ended although it is in the fleet; and until discovery begins again
# that has failed by a mistake.
_ANEW_SECONDS = 1.0

# Makes a replica from its address.
NewReplica = Callable[[str, ReplicaEvents], Replica]


class Members:
    """Every replica that discovery has found, and those that have left and still answer calls.

    `changed` is called when a replica came, went, drains, or serves something else; `has_room` when one may have room.
    """

    def __init__(
        self,
        discovery: Discovery,
        new_replica: NewReplica,
        changed: Callable[[], None],
        has_room: Callable[[], None],
        errors: InternalErrors,
    ) -> None:
        self._discovery = discovery
        self._new_replica = new_replica
        self._tell_changed = changed
        self._has_room = has_room
        self._errors = errors
        self._events = ReplicaEvents(self.changed, has_room, self.failed)
        self._replicas: dict[str, Replica] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._discovering: asyncio.Task[None] | None = None
        # The addresses that discovery found last.
        self._wanted: set[str] = set()
        self._closed = False
        self.catalogue = FleetCatalogue(())
        # Whether any replica takes calls.
        self.take_calls = False

    def __len__(self) -> int:
        return len(self._replicas)

    def statuses(self) -> list[ReplicaStatus]:
        """The status of each replica. From any thread."""
        return [
            ReplicaStatus(
                target=replica.target,
                up=replica.takes_calls,
                calls=replica.window.calls,
                wait_seconds=replica.window.wait_seconds(),
                utilization=replica.window.utilization,
                ejected=replica.ejection.ejected,
                silent_seconds=replica.silent_seconds,
            )
            for replica in list(self._replicas.values())
        ]

    def start(self) -> None:
        """Find the replicas, and open a lane to each."""
        self._discovering = asyncio.create_task(self._discover())

    async def close(self) -> None:
        """Close every lane."""
        self._closed = True
        tasks = [*self._running.values(), *filter(None, [self._discovering])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def changed(self) -> None:
        """React to a change of a replica: of its kernels, or of whether it takes calls."""
        self.catalogue = FleetCatalogue(self._replicas.values())
        takers = [replica for replica in self._replicas.values() if replica.takes_calls]
        self.take_calls = bool(takers)
        if all(replica.ejection.ejected for replica in takers):
            for replica in takers:
                replica.ejection.pardon()
        self._tell_changed()

    def failed(self, replica: Replica, weight: int) -> None:
        """Count a replica's failure: the replica is ejected if that was one too many, but at most half of them are."""
        if not replica.ejection.failed(weight):
            return
        counted = [other for other in self._replicas.values() if other.takes_calls or other is replica]
        if 2 * (sum(other.ejection.ejected for other in counted) + 1) > len(counted):
            return
        seconds = replica.ejection.eject()
        log.warning("replica is ejected", replica=replica.target, seconds=seconds)
        asyncio.get_running_loop().call_later(seconds, self._has_room)

    async def _discover(self) -> None:
        """Follow what discovery finds, for ever: a mistake in it must not freeze the fleet as it is."""
        while True:
            with self._errors.guarded("discovery"):
                await self._discovery.run(self._found)
            await asyncio.sleep(_ANEW_SECONDS)

    def _found(self, addresses: Sequence[str]) -> None:
        """Make these addresses the fleet from now on."""
        self._wanted = set(addresses)
        for address in addresses:
            with self._errors.guarded("replica_joins"):
                replica = self._replicas.get(address)
                if replica is None:
                    self._join(address)
                else:
                    replica.stay()
        for address in self._replicas.keys() - self._wanted:
            with self._errors.guarded("replica_leaves"):
                self._replicas[address].retire()

    def _gone(self, address: str, task: asyncio.Task[None]) -> None:
        """Drop a replica that had left the fleet and answered its last call; or whose task failed, which none should.

        A replica that was back before its end, or has failed, is opened anew.
        """
        if not task.cancelled() and (error := task.exception()) is not None:
            self._errors.caught("replica", error)
            log.error("replica is given up", replica=address)
        del self._replicas[address], self._running[address]
        if self._closed:
            return
        if address in self._wanted:
            asyncio.get_running_loop().call_later(_ANEW_SECONDS, self._join_again, address)
        with self._errors.guarded("replica_gone"):
            self.changed()

    def _join(self, address: str) -> None:
        replica = self._replicas[address] = self._new_replica(address, self._events)
        task = self._running[address] = asyncio.create_task(replica.run())
        task.add_done_callback(partial(self._gone, address))

    def _join_again(self, address: str) -> None:
        with self._errors.guarded("replica_joins"):
            if not self._closed and address in self._wanted and address not in self._replicas:
                self._join(address)
