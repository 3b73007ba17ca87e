"""The replicas of a unit: a compute service in this process, the next one that takes its place, and siblings'."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from logging import INFO

import grpc.aio
import structlog
from prometheus_client.registry import Collector

from unlatch.common.backoff import Backoff
from unlatch.common.errors import Unavailable
from unlatch.common.lane.local import LocalLane
from unlatch.common.machine.cgroups import granted_memory
from unlatch.common.net.rpc import abort
from unlatch.common.security.tls import ChannelSecurity
from unlatch.common.telemetry.internal_errors import InternalErrors
from unlatch.common.telemetry.processes import ProcessWatch
from unlatch.compute.errors import StartError
from unlatch.compute.server import ComputeService, new_service
from unlatch.compute.settings import ComputeSettings
from unlatch.gateway.fleet.replica import Replica, ReplicaEvents
from unlatch.unit.place import Place
from unlatch.unit.settings import LOCAL

log = structlog.get_logger()

NewLane = Callable[[ComputeService], LocalLane]


class LocalCompute:
    """The compute service of a unit. When kernels are reloaded, another one takes its place."""

    def __init__(self, settings: ComputeSettings, processes: ProcessWatch, place: Place | None = None) -> None:
        self._settings = settings
        self._processes = processes
        self._units = 1 if place is None else place.units
        self._target = LOCAL if place is None else place.lanes(place.number)
        self._service: ComputeService | None = None
        self._started = asyncio.Event()
        self._lane: LocalLane | None = None
        # When the drain of this unit is over, once it has begun.
        self._drained_at: float | None = None

    @property
    def collectors(self) -> Sequence[Collector]:
        """The metrics of the present service. Any thread may read this."""
        service = self._service
        return service.collectors if service is not None else ()

    def replica(self, target: str, events: ReplicaEvents, errors: InternalErrors) -> Replica:
        """Make the gateway's end of this replica, or of the replica of a sibling."""
        if target == self._target:
            return LocalReplica(target, events, errors, self)
        return SiblingReplica(target, events, ChannelSecurity(), 0.0, errors)

    async def start(self) -> None:
        """Start a service. Raises StartError."""
        service = new_service(self._settings, self._processes, granted_memory() // self._units)
        try:
            await service.start()
        except BaseException:
            await service.close()
            raise
        self._service = service
        self._started.set()

    async def replace(self) -> None:
        """Close the service as `close` does, and start another; again and again if its start fails."""
        await self.close()
        tries = Backoff(first_seconds=0.1, longest_seconds=5.0)
        while True:
            try:
                await self.start()
            except StartError as error:
                delay = tries.failed()
                log.error("replica did not start", message=str(error), after_seconds=delay)
                await asyncio.sleep(delay)
            else:
                return

    async def close(self) -> None:
        """Let the service answer its calls within the drain time, and end it and its workers."""
        service, self._service = self._service, None
        if service is None:
            return
        self._started.clear()
        until = self._drained_at or asyncio.get_running_loop().time() + self._settings.drain_seconds
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await service.drain()
        finally:
            if self._lane is not None:
                self._lane.close()
            await service.close()

    async def open(self, request: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """Open a lane to a sibling's gateway. Ends the RPC UNAVAILABLE if this unit takes no calls."""
        service = self._service
        if service is None or self._drained_at is not None:
            await abort(context, Unavailable("this unit takes no calls now"))
        await service.open(request, context)

    def leave_siblings(self) -> None:
        """Ask the siblings for no more calls: this unit begins to drain. Its own calls go on to come here."""
        self._drained_at = asyncio.get_running_loop().time() + self._settings.drain_seconds
        if self._service is not None:
            self._service.lanes.leave_remote()

    async def carry(self, new_lane: NewLane) -> LocalLane:
        """Wait until there is a service, and carry calls to it on a new lane until the lane has ended."""
        while self._service is None:
            await self._started.wait()
        service = self._service
        lane = self._lane = new_lane(service)
        try:
            await service.carry(lane)
        finally:
            self._lane = None
        return lane


class SiblingReplica(Replica):
    """The gateway's end of another unit's replica. A call's way there and back is two gRPC messages."""

    way_seconds = 0.002
    way_seconds_per_byte = 4e-9
    # No warning, because the supervisor logs that a unit has ended, and starts it again.
    away_level = INFO


class LocalReplica(Replica):
    """The gateway's end of a compute service in the same process, on one lane after another."""

    def __init__(self, target: str, events: ReplicaEvents, errors: InternalErrors, compute: LocalCompute) -> None:
        super().__init__(target, events, ChannelSecurity(), 0.0, errors)
        self._compute = compute

    async def run(self) -> None:
        """Carry calls until the task is cancelled, when the unit ends."""
        try:
            while True:
                lane = await self._compute.carry(self._local_lane)
                self.lost(lane, "its workers are replaced")
        finally:
            self.takes_calls = False

    def _local_lane(self, service: ComputeService) -> LocalLane:
        lane = LocalLane(
            service.accept,
            lambda welcome: self.welcomed(lane, welcome),
            lambda: self.drains(lane),
            lambda load: self.reported(lane, load),
            self._errors.caught,
        )
        return lane
