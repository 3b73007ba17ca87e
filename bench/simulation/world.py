"""The world of the simulation, on a simulated clock: gateways and replicas use their own code as far as possible.

    a call ──> a gateway's way to choose ── a hop ──> Dispatcher, Pool ──> a worker runs it ── a hop ──> answered
               │ Fleet, Members, Discovery,           └ Reports, every 250 ms and when waiting changes ──> Fleet
               │ Replica, Window, Backlog, Forecast      (compute/)
               │ (gateway/), or RoundRobin, LeastCalls

Time, the hops between gateway and replica, and the workers are simulated. Gateways' own work takes no time: the
simulation compares where calls are sent, not how fast.
"""

import asyncio
import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol, cast

from unlatch.common.lane.body import Body
from unlatch.common.security.tls import ChannelSecurity
from unlatch.common.telemetry.internal_errors import InternalErrors
from unlatch.common.telemetry.processes import ProcessWatch
from unlatch.common.telemetry.recorder import Recorder
from unlatch.common.waiting.demand import UNKNOWN, Demand, Estimate
from unlatch.common.waiting.priority import NORMAL, RANKS
from unlatch.compute.call import Call as ReplicaCall
from unlatch.compute.call import Holder, Ran
from unlatch.compute.dispatch.dispatcher import Dispatcher
from unlatch.compute.dispatch.poison import Poison
from unlatch.compute.ipc.arena import InputArena, Segment, WorkerSegments
from unlatch.compute.ipc.frames import Done, Result
from unlatch.compute.metrics import ComputeMetrics
from unlatch.compute.pool.occupancy import Held, Occupancy
from unlatch.compute.pool.pool import Pool
from unlatch.compute.pool.run import Replied, Run, Usage
from unlatch.compute.pool.slot import Slot
from unlatch.compute.reports import Reports
from unlatch.compute.settings import ComputeSettings
from unlatch.gateway.fleet.discovery import Discovery
from unlatch.gateway.fleet.fleet import Fleet
from unlatch.gateway.fleet.replica import Replica, ReplicaEvents
from unlatch.gateway.fleet.routed import Routed
from unlatch.protos.unlatch_pb2 import Descriptor, Kernel, Welcome

# One way, with event loops, batching and network.
HOP_SECONDS = 0.001
_MAX_RUNS = 2


class Clock:
    """A simulated clock with its future events."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        """Schedule a function."""
        heapq.heappush(self._due, (self.now + seconds, next(self._numbers), what))

    def run(self, until: Callable[[], bool]) -> None:
        """Run all events in order until a condition holds."""
        while not until():
            self.now, _, what = heapq.heappop(self._due)
            what()


@dataclass(eq=False, slots=True)
class Arrival:
    """A call that arrives at a gateway, and the time that it takes on a worker of full speed."""

    at: float
    gateway: int
    kernel: str
    size: int
    seconds: float
    ended: float = math.nan


@dataclass(eq=False, slots=True)
class _Spec:
    name: str
    max_batch_size: int = 1
    pure: bool = False
    concurrency: int | None = None


@dataclass(eq=False, slots=True)
class _Landed:
    """A call in a replica's queue, with the attributes of compute's own calls."""

    arrival: Arrival
    gateway: int
    spec: _Spec
    size: int
    send: Callable[[], None]
    demand: Demand
    estimate: Estimate = UNKNOWN
    digest: bytes = b""
    ended: bool = False
    must_be_known: bool = False
    holder: Holder | None = None

    def release(self) -> None:
        """Ignored: the call has no memory."""

    def answer(self, _: object, __: memoryview, ___: Ran, sent: Callable[[], None]) -> None:
        self.ended = True
        self.send()
        sent()


class _Replies:
    """Reply segments, which are not simulated."""

    def give_back(self, segment: object) -> None:
        """Ignored: no segment was lent."""


@dataclass(frozen=True, slots=True)
class _Segment:
    view: memoryview


_NOWHERE = cast("Segment", _Segment(memoryview(b"")))
_REPLIES = cast("WorkerSegments", _Replies())


class _Slot:
    """A worker with a run and one staged behind it at most; none is staged behind a long one."""

    def __init__(
        self, number: int, clock: Clock, slowness: float, long_call_seconds: float, occupancy: Occupancy
    ) -> None:
        self.busy_seconds = 0.0
        self.dispatcher: Dispatcher
        self.worker = number
        self._occupancy = occupancy
        self._clock = clock
        self._slowness = slowness
        self._long_call_seconds = long_call_seconds
        self._runs: deque[Run] = deque()
        occupancy.changed(self)

    @property
    def in_flight(self) -> "_Slot":
        """The slot is the place of its worker's runs, too."""
        return self

    def __len__(self) -> int:
        return len(self._runs)

    @property
    def expected_end(self) -> float:
        return self._runs[0].begun + sum(run.expected_seconds for run in self._runs)

    def held(self) -> Held:
        runs = self._runs
        rank = (len(runs), 0, self.worker) if len(runs) < _MAX_RUNS else None
        is_long = any(run.first.estimate.long for run in runs)
        return rank, bool(runs), is_long, sum(run.expected_seconds for run in runs)

    def has_room(self, now: float) -> bool:
        if not self._runs:
            return True
        first = self._runs[0]
        return (
            len(self._runs) < _MAX_RUNS
            and not first.first.estimate.long
            and now - first.begun < self._long_call_seconds
        )

    def run(self, calls: Sequence[ReplicaCall], now: float) -> None:
        self._occupancy.changed(self)
        self._runs.append(Run(self.worker, dict.fromkeys(calls, 1), _NOWHERE, _REPLIES, now))
        if len(self._runs) == 1:
            self._begin()

    def _begin(self) -> None:
        run = self._runs[0]
        run.begin(self._clock.now)
        seconds = cast("_Landed", run.first).arrival.seconds * self._slowness
        self._clock.after(seconds, lambda: self._done(seconds))

    def _done(self, seconds: float) -> None:
        self._occupancy.changed(self)
        run = self._runs.popleft()
        self.busy_seconds += seconds
        if self._runs:
            self._begin()
        self.dispatcher.happened(run, Replied(_DONE, _RESULTS, Usage(seconds, seconds, finished=True)))
        self.dispatcher.assign()


_RESULTS = {1: Result(1, ())}
_DONE = Done((_RESULTS[1],), 0)


class _Pool(Pool):
    """A pool whose reserved workers stay free at all times, since calls that are not long arrive all the time."""

    def keeps_some_free(self, now: float) -> bool:  # noqa: ARG002 (Pool's own)
        return self._reserved_workers > 0


class SimulatedCompute:
    """A replica: its dispatcher, its workers, and its reports to listeners."""

    def __init__(self, clock: Clock, workers: int, slowness: float, phase: float) -> None:
        settings = ComputeSettings.model_construct(workers=workers, max_queued_calls=1_000_000)
        occupancy = Occupancy(workers)
        of_slot = clock, slowness, settings.long_call_seconds, occupancy
        self._slots = [_Slot(number, *of_slot) for number in range(workers)]
        recorder = Recorder()
        errors = InternalErrors(recorder)

        def now() -> float:
            return clock.now

        slots = cast("Sequence[Slot]", self._slots)
        pool = _Pool(slots, occupancy, InputArena(0), errors, reserved_workers=settings.workers_reserved)
        self._dispatcher = Dispatcher(
            pool,
            Poison(0.0, errors),
            ComputeMetrics(recorder, ProcessWatch(), lambda: len(self._dispatcher)),
            errors,
            settings,
            clock=now,
        )
        for slot in self._slots:
            slot.dispatcher = self._dispatcher
        self.listeners: list[Callable[[Any], None]] = []
        self._reports = Reports(pool, self._dispatcher, settings, errors)
        self._clock = clock
        self._slowness = slowness
        # The number of calls of each gateway. Gateways without calls share no window.
        self._calls: dict[int, int] = {}
        clock.after(phase * self._reports.look_seconds, self._look)

    @property
    def busy_seconds(self) -> float:
        """Seconds in which the workers have run."""
        return sum(slot.busy_seconds for slot in self._slots)

    @property
    def idle(self) -> int:
        """The number of workers without work."""
        return sum(not slot for slot in self._slots)

    @property
    def waiting(self) -> int:
        """The number of calls that wait here: in the backlog or staged."""
        return len(self._dispatcher) + sum(max(0, len(slot) - 1) for slot in self._slots)

    def send(self, arrival: Arrival, answered: Callable[[float], None]) -> None:
        """Take a call from a gateway; the answer has the duration of its run."""
        gateway = arrival.gateway
        self._calls[gateway] = self._calls.get(gateway, 0) + 1
        seconds = arrival.seconds * self._slowness

        def answer() -> None:
            self._calls[gateway] -= 1
            answered(seconds)

        def send() -> None:
            self._clock.after(HOP_SECONDS, answer)

        landed = cast(
            "ReplicaCall", _Landed(arrival, gateway, _Spec(arrival.kernel), arrival.size, send, _demand(arrival))
        )

        def land() -> None:
            self._dispatcher.admit(landed)
            self._dispatcher.offer(landed)

        self._clock.after(HOP_SECONDS, land)

    def report(self) -> Any:
        """The replica's present report."""
        return self._reports.load(max(1, sum(map(bool, self._calls.values()))))

    def _look(self) -> None:
        self._clock.after(self._reports.look_seconds, self._look)
        if self._reports.is_due() and self.listeners:
            load = self.report()
            self._clock.after(HOP_SECONDS, lambda: self._tell(load))

    def _tell(self, load: Any) -> None:
        for listener in self.listeners:
            listener(load)


class Gateway(Protocol):
    """A way to balance calls. `held` are the calls that have not been sent yet."""

    @property
    def held(self) -> int: ...

    def route(self, arrival: Arrival, ended: Callable[[Arrival], None]) -> None:
        """Have a call run on some replica."""


class RoundRobin:
    """Each replica in turn, whatever its load."""

    held = 0

    def __init__(self, computes: Sequence[SimulatedCompute], dice: random.Random) -> None:
        self._computes = computes
        self._next = dice.randrange(len(computes))

    def route(self, arrival: Arrival, ended: Callable[[Arrival], None]) -> None:
        self._next = (self._next + 1) % len(self._computes)
        self._computes[self._next].send(arrival, lambda _: ended(arrival))


class LeastCalls:
    """The replica with the fewest of this gateway's calls: the least connections, or requests, of most proxies."""

    held = 0

    def __init__(self, computes: Sequence[SimulatedCompute], dice: random.Random) -> None:
        self._computes = computes
        self._calls = [0] * len(computes)
        self._dice = dice

    def route(self, arrival: Arrival, ended: Callable[[Arrival], None]) -> None:
        fewest = min(self._calls)
        chosen = self._dice.choice([at for at, calls in enumerate(self._calls) if calls == fewest])
        self._calls[chosen] += 1

        def answered(_: float) -> None:
            self._calls[chosen] -= 1
            ended(arrival)

        self._computes[chosen].send(arrival, answered)


class _SimulatedReplica(Replica):
    """A gateway's own end of a replica, with a simulated lane."""

    def __init__(self, target: str, events: ReplicaEvents, compute: SimulatedCompute, kernels: Iterable[str]) -> None:
        super().__init__(target, events, ChannelSecurity(None, ""), 0.0, InternalErrors(Recorder()))
        self._compute = compute
        self._kernels = [Kernel(name=name, version="1", pure=True) for name in kernels]

    async def run(self) -> None:
        settings = ComputeSettings.model_construct()
        lane = _Lane(self._compute)
        welcome = Welcome(server=self.target, version="1", kernels=self._kernels)
        welcome.window_calls, welcome.window_bytes = settings.window_calls, settings.window_bytes
        self.reported(lane, self._compute.report())
        self.welcomed(lane, welcome)
        self._compute.listeners.append(lambda load: self.reported(lane, load))
        # Runs until the fleet is closed.
        await asyncio.Event().wait()


class _Lane:
    """A lane on which a call arrives one hop later."""

    def __init__(self, compute: SimulatedCompute) -> None:
        self.welcomed = True
        self.finishing = self.ended = False
        self._compute = compute

    def call(self, _: Descriptor, __: Body, listener: Any, ___: Any = None) -> int:
        self._compute.send(listener.arrival, listener.answered)
        return 0

    def cancel(self, number: int) -> None:
        raise NotImplementedError  # no caller leaves in a simulation

    def finish(self) -> None:
        self.finishing = True


@dataclass(slots=True)
class _Sized:
    size: int


@dataclass(eq=False, slots=True)
class _Routed:
    """A call in a gateway's fleet, without a deadline, so that it is never refused."""

    fleet: Fleet
    arrival: Arrival
    over: Callable[[Arrival], None]
    descriptor: Descriptor
    body: _Sized
    demand: Demand
    estimate: Estimate = UNKNOWN
    replica: Replica | None = None
    avoids: None = None

    def remaining_microseconds(self) -> int:
        return 0

    def started(self) -> bool:
        return False

    def sent(self, replica: Replica, _: object, __: int) -> None:
        self.replica = replica

    def unroutable(self, error: Exception) -> None:
        raise error

    def answered(self, seconds: float) -> None:
        assert self.replica is not None
        self.replica.ended(cast("Routed", self))
        self.fleet.ended(cast("Routed", self), self.replica, seconds, seconds, "OK")
        self.over(self.arrival)


@dataclass(eq=False, slots=True)
class Unlatch:
    """The gateway's own fleet, with replicas found by its own discovery: all of them, or a subset by its name."""

    name: str
    computes: Sequence[SimulatedCompute]
    kernels: Sequence[str]
    most: int
    _descriptors: dict[str, Descriptor] = field(default_factory=dict)
    _fleet: Fleet = field(init=False)

    def __post_init__(self) -> None:
        by_address = dict(zip(addresses_of(len(self.computes)), self.computes, strict=True))
        self._fleet = Fleet(
            Discovery(by_address, 3600.0, self.most, name=self.name, bound=False),
            {},
            lambda: None,
            lambda target, events: _SimulatedReplica(target, events, by_address[target], self.kernels),
            InternalErrors(Recorder()),
        )
        for kernel in self.kernels:
            self._descriptors[kernel] = Descriptor()
            self._descriptors[kernel].request.kernel = kernel

    async def open(self) -> None:
        """Find the replicas."""
        self._fleet.members.start()
        for _ in range(4):
            await asyncio.sleep(0)
        assert sum(replica.takes_calls for replica in self._fleet.members) == min(self.most, len(self.computes))

    @property
    def held(self) -> int:
        return self._fleet.held

    async def close(self) -> None:
        """Drop all replicas."""
        await self._fleet.members.close()

    def route(self, arrival: Arrival, ended: Callable[[Arrival], None]) -> None:
        descriptor = self._descriptors[arrival.kernel]
        routed = _Routed(self._fleet, arrival, ended, descriptor, _Sized(arrival.size), _demand(arrival))
        self._fleet.route(cast("Routed", routed))


def addresses_of(replicas: int) -> list[str]:
    """The addresses by which gateways know the replicas."""
    return [f"replica-{number}:8011" for number in range(replicas)]


def _demand(arrival: Arrival) -> Demand:
    """The demand of a call: one tenant and one priority for all, and no deadline, so that none is refused."""
    return Demand(arrival.kernel, arrival.size, "", RANKS[NORMAL], math.inf)
