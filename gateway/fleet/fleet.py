"""The fleet: every replica that the gateway knows, and the calls that fit no replica's window yet.

    route ──> room somewhere ───────────────────────────────> sent to the replica that would be done with it first
      ├─ refused: by what replicas report and            ↑
      │  what is held here it could not be in time       │
      └─ no room: held, in the order of the policy ──────┘
            └─ refused: its time would be over before it is done; or nobody serves it any more

A call is bound to a replica when that has room for it, not before: until then it can still go to any.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from time import monotonic
from typing import Protocol

from unlatch.common.errors import DeadlineExceeded, NotFound, ResourceExhausted, Unavailable
from unlatch.common.waiting.admission import MARGIN, refusal_in_time, too_late
from unlatch.common.waiting.forecast import RunTimes
from unlatch.common.waiting.order import Policy, Waiting
from unlatch.gateway.fleet.catalogue import Catalogue, Offer
from unlatch.gateway.fleet.discovery import Discovery
from unlatch.gateway.fleet.ejection import CALL
from unlatch.gateway.fleet.members import Members, NewReplica
from unlatch.gateway.fleet.replica import Lane, Outgoing, Replica
from unlatch.gateway.fleet.status import Standing
from unlatch.protos.unlatch_pb2 import Kernel

# Refusing one takes about 30 µs.
_REFUSED_AT_ONCE = 32
# What a call of a kernel that has not run yet counts for in a window.
_UNKNOWN_SECONDS = 0.01
# What a call is expected to take beyond its wait and its run, to the replica and back to its caller.
_REPLY_SECONDS = 0.004
# Of many replicas so many are looked at by chance, and the best of them taken if it is idle enough to begin at once.
# Gateways that all take the best of a hundred take the same one, until the next report says that it is the worst.
_LOOKED_AT = 3
# Replicas that would be done within so much of one another are as good as each other: chance keeps gateways that have
# heard the same reports from sending all they have to the same one.
_EQUAL_SECONDS = 0.0005


class Routed(Outgoing, Waiting, Protocol):
    """A call that wants a replica."""

    # The fleet says what they are.
    cost_seconds: float
    long: bool
    together: int

    @property
    def deadline(self) -> float:
        """By the monotonic clock."""

    @property
    def avoids(self) -> Replica | None:
        """A replica that it is not to be sent to for now."""

    def sent(self, replica: Replica, lane: Lane, number: int) -> None:
        """It is on that lane to that replica now, under that number."""

    def unroutable(self, error: NotFound | Unavailable | ResourceExhausted | DeadlineExceeded) -> None:
        """No replica takes it any more, or could answer it in time."""


class Watching(Protocol):
    """Who is told of the fleet's changes."""

    def fleet_changed(self) -> None:
        """A replica came, went, drains, or serves something else."""


# A kernel, the version that is asked for, whether its calls are long, how many run together, and a replica that they
# are to avoid: where one finds no room none does.
_Kind = tuple[str, str, bool, int, Replica | None]


class Fleet:
    """Routes calls to replicas. `policy` is the order in which calls that fit no window wait."""

    def __init__(
        self, discovery: Discovery, policy: Policy[Routed], watching: Watching, new_replica: NewReplica
    ) -> None:
        self._members = Members(discovery, self, new_replica)
        self._policy = policy
        self._times = RunTimes()
        # How many calls of each kind the policy holds.
        self._held: Counter[_Kind] = Counter()
        self._watching = watching

    @property
    def held(self) -> int:
        """How many calls fit no window yet."""
        return len(self._policy)

    @property
    def alone(self) -> bool:
        """Whether there is but one replica: what is lost there can go nowhere else."""
        return len(self._members) < 2

    def expected_seconds(self, kernel: str, size: int) -> float:
        """What a run of so many bytes is expected to take, by those that were; 0 where nothing is known."""
        return self._times.expected(kernel, size)

    @property
    def takes_calls(self) -> bool:
        """Whether any replica does."""
        return self._members.take_calls

    @property
    def catalogue(self) -> Catalogue:
        """What the fleet serves."""
        return self._members.catalogue

    def serves(self, name: str) -> bool:
        """Whether any replica has a kernel of that name."""
        return self.catalogue.find(name, "") is not None

    def kernel(self, name: str, version: str) -> Kernel:
        """A kernel that some replica serves. Raises NotFound with near names, Unavailable when there is no replica."""
        return self._offer(name, version).kernel

    def standings(self) -> list[Standing]:
        """How each replica stands now. From any thread."""
        return self._members.standings()

    def route(self, call: Routed) -> None:
        """Send a call to a replica with room, or hold it until there is one; nobody overtakes a call of its kind.

        One that could not be in time is unroutable at once, by what runs have taken and what waits before it.
        """
        request = call.descriptor.request
        try:
            offer = self._offer(request.kernel, request.version)
        except (NotFound, Unavailable) as error:
            call.unroutable(error)
            return
        expected = self._times.expected(request.kernel, call.body.size)
        call.cost_seconds = expected or _UNKNOWN_SECONDS
        call.together = offer.kernel.max_batch_size if offer.kernel.batch else 1
        call.long = call.cost_seconds > min(replica.window.long_seconds for replica in offer.replicas)
        replica = self._choose(call, offer) if _kind(call) not in self._held else None
        refusal = self._refusal_in_time(call, offer, replica, expected)
        if refusal is not None:
            call.unroutable(refusal)
        elif replica is not None:
            self._policy.take_at_once(call)
            self._send(call, replica)
        else:
            self._policy.add(call)
            self._held[_kind(call)] += 1

    def withdraw(self, call: Routed) -> None:
        """A call that is held is wanted no more."""
        if self._policy.remove(call):
            self._not_held(call)

    def ended(self, call: Routed, replica: Replica, run_seconds: float, code: str = "") -> None:
        """A call that was sent has ended; another may take its place.

        It has run for so long, and the replica has answered with that status; "" where it has not answered.
        """
        replica.ended(call)
        self._policy.charge(call, run_seconds - call.cost_seconds)
        if code == "UNAVAILABLE":
            self._members.failed(replica, CALL)
        elif code:
            replica.ejection.succeeded()
        if code == "OK":
            self._learn(call, replica, run_seconds)
        if self.held:
            self._send_held()

    def start(self) -> None:
        """Open every lane."""
        self._members.start()

    async def close(self) -> None:
        """Close every lane."""
        await self._members.close()

    def members_changed(self) -> None:
        """What replicas serve or take has changed."""
        self._watching.fleet_changed()
        self._refuse_some()
        self._send_held()

    def has_room(self) -> None:
        """A replica may have room for more."""
        if self.held:
            self._send_held()

    def _offer(self, name: str, version: str) -> Offer:
        offer = self.catalogue.find(name, version)
        if offer is not None and offer.taken:
            return offer
        if offer is not None or not self.takes_calls:
            raise Unavailable("no replica takes calls now", retry_after_milliseconds=1000)
        raise self.catalogue.missing(name, version)

    def _choose(self, call: Routed, offer: Offer) -> Replica | None:
        """The replica that would be done with a call first, of a few with an idle worker, else of all with room."""
        roomy: list[Replica] = []
        if len(offer.replicas) > _LOOKED_AT:
            few = _roomy(call, random.sample(offer.replicas, _LOOKED_AT))
            roomy = [replica for replica in few if not replica.window.wait_seconds(long=call.long)]
        roomy = roomy or _roomy(call, offer.replicas)
        if len(roomy) < 2:
            return roomy[0] if roomy else None
        seconds = [replica.window.expected_seconds(call) for replica in roomy]
        good = min(seconds) + _EQUAL_SECONDS
        return random.choice([replica for replica, each in zip(roomy, seconds, strict=True) if each <= good])  # noqa: S311 (no secret)

    def _refusal_in_time(
        self, call: Routed, offer: Offer, replica: Replica | None, expected: float
    ) -> ResourceExhausted | None:
        """Why a call is refused that has just come, if it could not be in time."""
        window = None if replica is None else replica.window
        return refusal_in_time(
            call.descriptor.request.kernel,
            call.body.size,
            self._times,
            wait_seconds=self._wait_seconds(call, offer) if window is None else window.wait_seconds(long=call.long),
            cost_seconds=expected if window is None else expected * window.slowness,
            reply_seconds=_REPLY_SECONDS,
            left_seconds=call.deadline - monotonic(),
        )

    def _wait_seconds(self, call: Routed, offer: Offer) -> float:
        """How long a call would wait that is to be held: for what is held before it, and then at a replica."""
        takers = [replica for replica in offer.replicas if replica.takes_calls]
        before = self._policy.seconds_before(call, short=not call.long)
        workers = sum(replica.window.workers / replica.window.slowness for replica in takers)
        return before / workers + min(replica.window.wait_seconds(long=call.long) for replica in takers)

    def _send(self, call: Routed, replica: Replica) -> None:
        call.sent(replica, *replica.send(call))

    def _send_held(self) -> None:
        hopeless = 0
        while (found := self._next_held()) is not None:
            call, replica = found
            if not _is_hopeless(call, replica):
                self._policy.take_before_others(call)
                self._not_held(call)
                self._send(call, replica)
                continue
            self.withdraw(call)
            call.unroutable(too_late(call.descriptor.request.kernel))
            hopeless += 1
            if hopeless == _REFUSED_AT_ONCE:
                # By turns: after a standstill it may be all that wait.
                asyncio.get_running_loop().call_soon(self._send_held)
                return

    def _next_held(self) -> tuple[Routed, Replica] | None:
        """The first call in order that has room now. A kind whose replicas are full does not hold up the others."""
        # While none of them has room, nobody is looked for among the many who may wait.
        roomy = {kind: offer for kind in self._held if (offer := self._offer_with_room(kind)) is not None}
        for call in self._policy if roomy else ():
            if (offer := roomy.get(_kind(call))) is not None:
                if (replica := self._choose(call, offer)) is not None:
                    return call, replica
                del roomy[_kind(call)]
                if not roomy:
                    break
        return None

    def _offer_with_room(self, kind: _Kind) -> Offer | None:
        """What is offered of a kind, if any replica has room for some call of it."""
        kernel, version, long, together, avoids = kind
        offer = self.catalogue.find(kernel, version)
        if offer is None:
            return None
        fits = (one is not avoids and one.has_room(0, long=long, together=together) for one in offer.replicas)
        return offer if any(fits) else None

    def _not_held(self, call: Routed) -> None:
        kind = _kind(call)
        self._held[kind] -= 1
        if not self._held[kind]:
            del self._held[kind]

    def _learn(self, call: Routed, replica: Replica, run_seconds: float) -> None:
        kernel, size = call.descriptor.request.kernel, call.body.size
        expected = self._times.expected(kernel, size)
        # One replica is as fast as the mean of itself.
        if expected and len(self._members) > 1:
            replica.window.ran(expected, run_seconds)
        self._times.learn(kernel, size, run_seconds)

    def _refuse_some(self) -> None:
        """Refuse the held calls of kernels that no replica has any more. By turns, since many may be held."""
        lost: Mapping[_Kind, NotFound | Unavailable] = {
            kind: error for kind in self._held if (error := self._refusal(kind)) is not None
        }
        if not lost:
            return
        kinds = ((call, _kind(call)) for call in self._policy)
        for call, kind in list(islice((found for found in kinds if found[1] in lost), _REFUSED_AT_ONCE)):
            self.withdraw(call)
            call.unroutable(lost[kind])
        asyncio.get_running_loop().call_soon(self._refuse_some)

    def _refusal(self, kind: _Kind) -> NotFound | Unavailable | None:
        try:
            self._offer(kind[0], kind[1])
        except (NotFound, Unavailable) as error:
            return error
        return None


def _kind(call: Routed) -> _Kind:
    request = call.descriptor.request
    return request.kernel, request.version, call.long, call.together, call.avoids


def _roomy(call: Routed, replicas: Sequence[Replica]) -> list[Replica]:
    """Those of them that have room for a call."""
    size, long, together = call.body.size, call.long, call.together
    return [
        replica
        for replica in replicas
        if replica is not call.avoids and replica.has_room(size, long=long, together=together)
    ]


def _is_hopeless(call: Routed, replica: Replica) -> bool:
    """Whether a call whose turn it is would be done too late: it must not keep a worker from one that would not be."""
    wait = replica.window.wait_seconds(long=call.long)
    left = call.deadline - monotonic()
    return left < MARGIN * (wait + call.cost_seconds * replica.window.slowness) if wait else left < 0
