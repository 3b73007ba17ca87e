"""The fleet's replicas: who joins and leaves it, what they serve together, and who of them is ejected."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import structlog

from unlatch.gateway.fleet.catalogue import Catalogue
from unlatch.gateway.fleet.discovery import Discovery
from unlatch.gateway.fleet.replica import Keeper, Replica
from unlatch.gateway.fleet.status import Standing

log = structlog.get_logger()

# Until a replica whose lanes have ended, though it is in the fleet, has others.
_ANEW_SECONDS = 1.0


class Watching(Protocol):
    """Who is told of them."""

    def members_changed(self) -> None:
        """One came, went, drains, or serves something else."""

    def has_room(self) -> None:
        """One may have room for more."""


# How one is come by, from its address.
NewReplica = Callable[[str, Keeper], Replica]


class Members:
    """Every replica that discovery has found, and those that have left and still answer calls."""

    def __init__(self, discovery: Discovery, watching: Watching, new_replica: NewReplica) -> None:
        self._discovery = discovery
        self._watching = watching
        self._new_replica = new_replica
        self._replicas: dict[str, Replica] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._discovering: asyncio.Task[None] | None = None
        # What discovery found last.
        self._wanted: set[str] = set()
        self._closed = False
        self.catalogue = Catalogue(())
        # Whether any of them does.
        self.take_calls = False

    def __len__(self) -> int:
        return len(self._replicas)

    def standings(self) -> list[Standing]:
        """How each replica stands now. From any thread."""
        return [
            Standing(
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
        """Find them, and open a lane to each."""
        self._discovering = asyncio.create_task(self._discovery.run(self._found))

    async def close(self) -> None:
        """Close every lane."""
        self._closed = True
        tasks = [*self._running.values(), *filter(None, [self._discovering])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def changed(self) -> None:
        """What a replica serves or takes has changed."""
        self.catalogue = Catalogue(self._replicas.values())
        takers = [replica for replica in self._replicas.values() if replica.takes_calls]
        self.take_calls = bool(takers)
        if all(replica.ejection.ejected for replica in takers):
            for replica in takers:
                replica.ejection.pardon()
        self._watching.members_changed()

    def has_room(self) -> None:
        """A replica may have room for more."""
        self._watching.has_room()

    def failed(self, replica: Replica, weight: int) -> None:
        """A replica has done what counts against it: it is ejected if that was too much, but half of them at most."""
        if not replica.ejection.failed(weight):
            return
        counted = [other for other in self._replicas.values() if other.takes_calls or other is replica]
        if 2 * (sum(other.ejection.ejected for other in counted) + 1) > len(counted):
            return
        seconds = replica.ejection.eject()
        log.warning("replica is ejected", replica=replica.target, seconds=seconds)
        asyncio.get_running_loop().call_later(seconds, self.has_room)

    def _found(self, addresses: Sequence[str]) -> None:
        """The fleet is these, from now on."""
        for address in addresses:
            replica = self._replicas.get(address)
            if replica is None:
                self._join(address)
            else:
                replica.stay()
        self._wanted = set(addresses)
        for address in self._replicas.keys() - self._wanted:
            self._replicas[address].retire()

    def _gone(self, address: str, task: asyncio.Task[None]) -> None:
        """A replica that had left the fleet has answered its last call; or its task has failed, which none should."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("replica is given up", replica=address, exc_info=error)
        del self._replicas[address], self._running[address]
        if self._closed:
            return
        self.changed()
        if address in self._wanted:
            # It was back before its end, or has failed: it is opened anew.
            asyncio.get_running_loop().call_later(_ANEW_SECONDS, self._join_again, address)

    def _join(self, address: str) -> None:
        replica = self._replicas[address] = self._new_replica(address, self)
        task = self._running[address] = asyncio.create_task(replica.run())
        task.add_done_callback(partial(self._gone, address))

    def _join_again(self, address: str) -> None:
        if not self._closed and address in self._wanted and address not in self._replicas:
            self._join(address)
