"""A world by a clock of its own, for the simulation: gateways and replicas are their own code, as far as can be.

    a call ──> a gateway's way to choose ── a hop ──> Queue ──> a worker's hand ──> runs ── a hop ──> answered
               │ Fleet, Members, Discovery,           └ Reports, every 250 ms and when waiting changes ──> Fleet
               │ Replica, Window, Backlog, Forecast      (compute/)
               │ (gateway/), or RoundRobin, LeastCalls

Simulated are time, the way between gateway and replica, and the workers. Nothing here costs a gateway any time: what is
compared is where calls are sent, not how soon.
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
from unlatch.common.telemetry.recorder import Recorder
from unlatch.common.waiting.demand import UNKNOWN, Demand, Estimate
from unlatch.common.waiting.order import Policy
from unlatch.common.waiting.priority import NORMAL, RANKS
from unlatch.compute.call import Call as FrontCall
from unlatch.compute.dispatch.queue import Queue
from unlatch.compute.reports import Reports
from unlatch.compute.settings import ComputeSettings
from unlatch.gateway.fleet.discovery import Discovery
from unlatch.gateway.fleet.fleet import Fleet
from unlatch.gateway.fleet.replica import Replica, ReplicaEvents
from unlatch.gateway.fleet.routed import Routed
from unlatch.protos.unlatch_pb2 import Descriptor, Kernel, Welcome

# One way, with event loops, batching and network.
HOP_SECONDS = 0.001
_MOST_IN_HAND = 2


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


@dataclass(eq=False, slots=True)
class _Landed:
    """A call in a replica's queue, with the attributes of compute's own calls."""

    arrival: Arrival
    gateway: int
    answer: Callable[[float], None]
    spec: _Spec
    size: int
    demand: Demand
    estimate: Estimate = UNKNOWN
    begun: float = math.nan


class Pool:
    """A replica's workers, each with a run and one staged behind it at most; none is staged behind a long one."""

    def __init__(self, clock: Clock, settings: ComputeSettings, slowness: float) -> None:
        self.workers = workers = settings.workers
        self.slowness = slowness
        self.queue = Queue(Policy[FrontCall](), 1_000_000, settings.long_call_seconds)
        self.queue.feed(self)
        self.busy_seconds = 0.0
        self._clock = clock
        self._long_call_seconds = settings.long_call_seconds
        self._reserved = settings.workers_reserved
        # Other calls arrive all the time.
        self.keeps_some_free = self._reserved > 0
        self._hands: list[deque[_Landed]] = [deque() for _ in range(workers)]

    @property
    def busy_ratio(self) -> float:
        return sum(map(bool, self._hands)) / self.workers

    @property
    def idle(self) -> int:
        """The number of workers without work."""
        return self.workers - sum(map(bool, self._hands))

    @property
    def waiting(self) -> int:
        """The number of calls that wait here: queued or staged."""
        return len(self.queue) + sum(max(0, len(hand) - 1) for hand in self._hands)

    def has_room(self, *, long: bool) -> bool:
        if long and sum(map(_runs_long, self._hands)) >= self.workers - self._reserved:
            return False
        return any(map(self._takes_one, self._hands))

    def wait_seconds(self, before: float, *, short: bool) -> float:
        left, counted, idle = before, 0, False
        for hand in self._hands:
            if not (short and _runs_long(hand)):
                counted += 1
                idle = idle or not hand
                left += sum(call.estimate.seconds for call in hand)
                if hand:
                    left -= min(hand[0].estimate.seconds, self._clock.now - hand[0].begun)
        if not counted:
            return math.inf
        return 0.0 if idle and not before else left / counted

    def run(self, calls: Sequence[FrontCall]) -> None:
        call = cast("_Landed", calls[0])
        hand = min(filter(self._takes_one, self._hands), key=len)
        hand.append(call)
        if len(hand) == 1:
            self._begin(hand)

    def abandon(self, call: FrontCall) -> None:
        raise NotImplementedError  # no caller leaves in a simulation

    def _takes_one(self, hand: deque[_Landed]) -> bool:
        if not hand:
            return True
        soon = self._clock.now - hand[0].begun < self._long_call_seconds
        return len(hand) < _MOST_IN_HAND and not hand[0].estimate.long and soon

    def _begin(self, hand: deque[_Landed]) -> None:
        call = hand[0]
        call.begun = self._clock.now
        seconds = call.arrival.seconds * self.slowness
        self._clock.after(seconds, lambda: self._done(hand, seconds))

    def _done(self, hand: deque[_Landed], seconds: float) -> None:
        call = hand.popleft()
        self.busy_seconds += seconds
        self.queue.ran(cast("FrontCall", call), seconds, seconds, done=True)
        self._clock.after(HOP_SECONDS, lambda: call.answer(seconds))
        if hand:
            self._begin(hand)
        self.queue.pump()


class Front:
    """A replica: its queue and workers, and the reports that it makes to those who listen."""

    def __init__(self, clock: Clock, workers: int, slowness: float, phase: float) -> None:
        settings = ComputeSettings.model_construct(workers=workers)
        self.pool = Pool(clock, settings, slowness)
        self.listeners: list[Callable[[Any], None]] = []
        self._reports = Reports(self.pool, self.pool.queue, settings)
        self._clock = clock
        # Number of calls of each gateway. Gateways without calls share no window.
        self._calls: dict[int, int] = {}
        clock.after(phase * self._reports.look_seconds, self._look)

    def send(self, arrival: Arrival, answered: Callable[[float], None]) -> None:
        """Take a call from a gateway; the answer has the duration of its run."""
        gateway = arrival.gateway
        self._calls[gateway] = self._calls.get(gateway, 0) + 1

        def answer(seconds: float) -> None:
            self._calls[gateway] -= 1
            answered(seconds)

        landed = cast(
            "FrontCall", _Landed(arrival, gateway, answer, _Spec(arrival.kernel), arrival.size, _demand(arrival))
        )

        def land() -> None:
            self.pool.queue.admit(landed)
            self.pool.queue.offer(landed)

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

    def __init__(self, fronts: Sequence[Front], dice: random.Random) -> None:
        self._fronts = fronts
        self._next = dice.randrange(len(fronts))

    def route(self, arrival: Arrival, ended: Callable[[Arrival], None]) -> None:
        self._next = (self._next + 1) % len(self._fronts)
        self._fronts[self._next].send(arrival, lambda _: ended(arrival))


class LeastCalls:
    """The replica with the fewest of this gateway's calls: the least connections, or requests, of most proxies."""

    held = 0

    def __init__(self, fronts: Sequence[Front], dice: random.Random) -> None:
        self._fronts = fronts
        self._calls = [0] * len(fronts)
        self._dice = dice

    def route(self, arrival: Arrival, ended: Callable[[Arrival], None]) -> None:
        fewest = min(self._calls)
        chosen = self._dice.choice([at for at, calls in enumerate(self._calls) if calls == fewest])
        self._calls[chosen] += 1

        def answered(_: float) -> None:
            self._calls[chosen] -= 1
            ended(arrival)

        self._fronts[chosen].send(arrival, answered)


class _SimulatedReplica(Replica):
    """A gateway's own end of a replica, with a simulated lane."""

    def __init__(self, target: str, events: ReplicaEvents, front: Front, kernels: Iterable[str]) -> None:
        super().__init__(target, events, ChannelSecurity(None, ""), 0.0, InternalErrors(Recorder()))
        self._front = front
        self._kernels = [Kernel(name=name, version="1", pure=True) for name in kernels]

    async def run(self) -> None:
        settings = ComputeSettings.model_construct()
        lane = _Lane(self._front)
        window = {"window_calls": settings.window_calls, "window_bytes": settings.window_bytes}
        self.reported(lane, self._front.report())
        self.welcomed(lane, Welcome(server=self.target, version="1", kernels=self._kernels, **window))
        self._front.listeners.append(lambda load: self.reported(lane, load))
        # Runs until the fleet is closed.
        await asyncio.Event().wait()


class _Lane:
    """A lane on which a call arrives one hop later."""

    def __init__(self, front: Front) -> None:
        self.finishing = self.ended = False
        self._front = front

    def call(self, _: Descriptor, __: Body, listener: Any, ___: Any = None) -> int:
        self._front.send(listener.arrival, listener.answered)
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
        self.fleet.ended(cast("Routed", self), self.replica, seconds, "OK")
        self.over(self.arrival)


@dataclass(eq=False, slots=True)
class Unlatch:
    """The gateway's own fleet, with replicas found by its own discovery: all of them, or a subset by its name."""

    name: str
    fronts: Sequence[Front]
    kernels: Sequence[str]
    most: int
    _descriptors: dict[str, Descriptor] = field(default_factory=dict)
    _fleet: Fleet = field(init=False)

    def __post_init__(self) -> None:
        by_address = dict(zip(addresses_of(len(self.fronts)), self.fronts, strict=True))
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
        self._fleet.start()
        for _ in range(4):
            await asyncio.sleep(0)
        assert sum(status.up for status in self._fleet.statuses()) == min(self.most, len(self.fronts))

    @property
    def held(self) -> int:
        return self._fleet.held

    async def close(self) -> None:
        """Drop all replicas."""
        await self._fleet.close()

    def route(self, arrival: Arrival, ended: Callable[[Arrival], None]) -> None:
        descriptor = self._descriptors[arrival.kernel]
        routed = _Routed(self._fleet, arrival, ended, descriptor, _Sized(arrival.size), _demand(arrival))
        self._fleet.route(cast("Routed", routed))


def addresses_of(replicas: int) -> list[str]:
    """The addresses by which gateways know the replicas."""
    return [f"replica-{number}:8011" for number in range(replicas)]


def _demand(arrival: Arrival) -> Demand:
    """What a call asks for: of one tenant and one priority, without a deadline, so that none is refused."""
    return Demand(arrival.kernel, arrival.size, "", RANKS[NORMAL], math.inf)


def _runs_long(hand: deque[_Landed]) -> bool:
    return any(call.estimate.long for call in hand)
