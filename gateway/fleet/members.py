"""The fleet's members: which replicas join and leave it, what they serve together, and which of them are ejected."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from logging import INFO, WARNING

import structlog

from unlatch.common.machine.core_pressure import CorePressure
from unlatch.common.machine.process_states import is_stopped, on_this_machine
from unlatch.common.telemetry.internal_errors import InternalErrors
from unlatch.gateway.fleet.catalogue import FleetCatalogue
from unlatch.gateway.fleet.discovery import Discovery
from unlatch.gateway.fleet.hold import Hold, HoldLimits
from unlatch.gateway.fleet.replica import Replica, ReplicaEvents
from unlatch.gateway.fleet.silence import Circumstances, must_stay, too_few

log = structlog.get_logger()

# Until a replica is opened anew whose task has ended although it is in the fleet; and until discovery begins again
# that has failed by a mistake.
_ANEW_SECONDS = 1.0

# Makes a replica from its address.
NewReplica = Callable[[str, ReplicaEvents], Replica]


class Members:
    """Every replica that discovery has found, and those that have left and still answer calls.

    `changed` is called when a replica came, went, drains, or serves something else; `has_room` when one may have room.
    While calls are held because no replica takes calls (gateway/fleet/hold.py), the catalogue stays as it was: callers
    need it for their calls. Another replica may be there already, which discovery has yet to find.
    """

    def __init__(
        self,
        discovery: Discovery,
        new_replica: NewReplica,
        changed: Callable[[], None],
        has_room: Callable[[], None],
        errors: InternalErrors,
        hold: Hold | None = None,
    ) -> None:
        self._discovery = discovery
        self._new_replica = new_replica
        self._tell_changed = changed
        self._has_room = has_room
        self._errors = errors
        self._pressure = CorePressure()
        self._events = ReplicaEvents(self.changed, has_room, self.failed, self.missed)
        self._replicas: dict[str, Replica] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._discovering: asyncio.Task[None] | None = None
        # The addresses that discovery found last.
        self._wanted: set[str] = set()
        self._closed = False
        self.catalogue = FleetCatalogue(())
        # Whether any replica takes calls now.
        self.available = False
        # Whether callers may be sent here. While calls are held they may if replicas are looked up: no other gateway
        # finds them sooner. Where addresses are fixed, another gateway may well have a replica.
        self.take_calls = False
        self.hold = Hold(HoldLimits(), partial(errors.caught, "hold")) if hold is None else hold
        self.hold.on_end = self._hold_ended

    def __len__(self) -> int:
        return len(self._replicas)

    def __iter__(self) -> Iterator[Replica]:
        """Walk the replicas that were there at the start. Any thread may."""
        return iter(list(self._replicas.values()))

    def start(self) -> None:
        """Find the replicas, and open a lane to each. Calls are held until the first one is open."""
        self.hold.begin()
        self._discovering = asyncio.create_task(self._discover())

    async def close(self) -> None:
        """Close every lane."""
        self._closed = True
        self.hold.close()
        tasks = [*self._running.values(), *filter(None, [self._discovering])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def changed(self) -> None:
        """React to a change of a replica: of its kernels, or of whether it takes calls."""
        takers = self._takers()
        lost, self.available = self.available and not takers, bool(takers)
        if lost:
            self.hold.begin()
            # Replicas that have said that they drain are away as announced: for a reload, perhaps.
            level = INFO if all(replica.draining for replica in self._replicas.values()) else WARNING
            log.log(level, "no replica takes calls, they wait" if self.hold.on else "no replica takes calls")
        if takers or not self.hold.on:
            self.catalogue = FleetCatalogue(self._replicas.values())
        self.take_calls = self.available or (self.take_calls and self.hold.active and self._discovery.goes_on)
        self._pardon(takers)
        self._tell_changed()
        if takers:
            self.hold.end()

    def _pardon(self, takers: Sequence[Replica]) -> None:
        """Take ejected replicas back if there are no others."""
        if all(replica.ejection.ejected for replica in takers):
            for replica in takers:
                replica.ejection.pardon()

    def _hold_ended(self) -> None:
        with self._errors.guarded("hold"):
            self.changed()

    def failed(self, replica: Replica, weight: int) -> None:
        """Count a replica's failure. The replica is ejected if that was one too many and enough others are in use."""
        if not replica.ejection.failed(weight):
            return
        if too_few(known=self._known, in_use=self._in_use_besides(replica)):
            return
        seconds = replica.ejection.eject()
        log.warning("replica is ejected", replica=replica.target, seconds=seconds)
        asyncio.get_running_loop().call_later(seconds, self._has_room)

    def missed(self, replica: Replica, late_seconds: float) -> bool:
        """Count a report that a replica has missed, as a look found that came too late by some seconds.

        Returns whether the replica counts as lost (gateway/fleet/silence.py).
        """
        silence = replica.silence
        others = [other for other in self._takers() if other is not replica]
        silent = sum(other.silence.silent for other in others)
        # Replicas of an older version do not say where they run.
        near = on_this_machine(replica.process) or not replica.process.boot_id
        pressure = self._pressure.share(whole_machine=near)
        stopped = is_stopped(replica.process)
        silence.missed(Circumstances(late_seconds, pressure, len(others), silent, stopped))
        if not silence.too_long:
            return False
        in_use = self._in_use_besides(replica)
        why = must_stay(known=self._known, in_use=in_use, heard=len(others) - silent, stopped=stopped)
        if why and not silence.kept:
            log.warning("replica is silent, and is kept", replica=replica.target, message=why)
        silence.kept = bool(why)
        return not why

    @property
    def _known(self) -> int:
        """The number of replicas that belong to the fleet, whether they take calls or not."""
        return sum(not replica.retired for replica in self._replicas.values())

    def _takers(self) -> list[Replica]:
        return [replica for replica in self._replicas.values() if replica.takes_calls]

    def _in_use_besides(self, replica: Replica) -> int:
        return sum(other is not replica and not other.ejection.ejected for other in self._takers())

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
