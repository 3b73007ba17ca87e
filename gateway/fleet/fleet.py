"""The fleet: every replica that the gateway knows, and the calls that fit no replica's window yet.

    route ──> a replica has room ───────────────────────────> sent to the replica that would finish it first
      ├─ refused: it could not be in time, by the        ↑
      │  replicas' reports and the backlog here          │
      └─ no room: held in the backlog, in its order ─────┘
            └─ refused: it would be done after its deadline; or no replica serves it any more

In this folder a call is an Execution (gateway/calls/execution.py), which the fleet knows as the protocol `Routed`. A
call is bound to a replica only when that replica has room. Until then it can go to any replica.
"""

import asyncio
import random
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeAlias, cast

from unlatch.common.errors import UnlatchError
from unlatch.common.fair import ByTurns
from unlatch.common.telemetry.internal_errors import InternalErrors
from unlatch.common.waiting.backlog import Backlog, Send
from unlatch.common.waiting.demand import Beside, Estimate
from unlatch.gateway.fleet.catalogue import Offer
from unlatch.gateway.fleet.discovery import Discovery
from unlatch.gateway.fleet.ejection import CALL
from unlatch.gateway.fleet.hold import Hold, HoldLimits, no_replica
from unlatch.gateway.fleet.members import Members, NewReplica
from unlatch.gateway.fleet.replica import Replica
from unlatch.gateway.fleet.routed import Routed
from unlatch.gateway.totals import MachineTotals
from unlatch.protos.unlatch_pb2 import Kernel

# Calls refused in one round of the event loop. Refusing a call takes about 30 µs.
_REFUSED_AT_ONCE = 32
# Seconds that a call of a kernel without a known run time counts for in a window.
_UNKNOWN_SECONDS = 0.01
# Expected time of the way to the replica and back: a call takes this beyond its wait and its run.
_REPLY_SECONDS = 0.004
# So many replicas are sampled at random first, and the best of them is taken if it has an idle worker. If all gateways
# took the best of a hundred replicas, they would all choose the same one, until its next report.
_LOOKED_AT = 3
# Replicas that would finish within so many seconds of one another count as equal, and one of them is chosen at random.
# Otherwise gateways with the same reports would all send to the same replica.
_EQUAL_SECONDS = 0.0005
_NO_HOLD = HoldLimits()
# Time for which the opening of a client's lane waits for the first replica. Clients give up after 10 s.
_KERNELS_SECONDS = 5.0

# The kind of a call: kernel, requested version, whether the call is long, how many calls may run together, how many
# beside one another, and the replica to avoid. If one call of a kind finds no room, no other call of that kind does.
_Kind: TypeAlias = tuple[str, str, bool, int, Beside | None, Replica | None]


class Fleet:
    """Route calls to replicas, and hold calls without room. `weights` are the tenants' shares in the backlog.

    `changed` is called when a replica joins, leaves or drains, or serves other kernels.
    """

    def __init__(
        self,
        discovery: Discovery,
        weights: Mapping[str, float],
        changed: Callable[[], None],
        new_replica: NewReplica,
        errors: InternalErrors,
        limits: HoldLimits = _NO_HOLD,
        totals: MachineTotals | None = None,
    ) -> None:
        self.hold = Hold(limits, partial(errors.caught, "hold"), totals)
        self.members = Members(discovery, new_replica, self._members_changed, self._has_room, errors, self.hold)
        self._errors = errors
        # Calls that replicas have, and have not answered.
        self.sent_calls = 0
        self._changed = changed
        self._backlog = Backlog[Routed](
            weights, reply_seconds=_REPLY_SECONDS, caught=partial(errors.caught, "held_call"), kind=_kind
        )
        self._sending = ByTurns(self._send_held, at_once=_REFUSED_AT_ONCE, caught=partial(errors.caught, "send_held"))
        self._refusing = ByTurns(
            self._refuse_unserved, at_once=_REFUSED_AT_ONCE, caught=partial(errors.caught, "refuse_held")
        )

    @property
    def held(self) -> int:
        """The number of calls that fit no window yet, or for which there is no replica."""
        return len(self._backlog) + len(self.hold)

    @property
    def holds_calls(self) -> bool:
        """Whether a new call waits until a replica takes calls (`hold`)."""
        return not self.members.available and self.hold.on

    async def until_known(self) -> None:
        """Wait until it is known what the fleet serves, as long as calls would wait, and not for long."""
        if self.members.catalogue.is_empty and self.holds_calls:
            with suppress(TimeoutError):
                async with asyncio.timeout(_KERNELS_SECONDS):
                    await self.hold.until_ended()

    @property
    def alone(self) -> bool:
        """Whether there is at most one replica, so that a lost call cannot be sent to another."""
        return len(self.members) < 2

    def expected_seconds(self, kernel: str, size: int) -> float:
        """Return the expected seconds of a run with `size` bytes of input, from past runs; 0 if unknown."""
        return self._backlog.forecast.expected(kernel, size)

    def kernel(self, name: str, version: str) -> Kernel:
        """Return a kernel that a replica serves. Raises NotFound with similar names, or Unavailable."""
        offer = self._offer(name, version)
        if isinstance(offer, UnlatchError):
            raise offer
        return offer.kernel

    def route(self, call: Routed) -> None:
        """Send a call to a replica with room, or hold it until there is one. Calls of a kind keep their order.

        If the call could not be answered in time, by past runs and the backlog, its `unroutable` is called at once.
        """
        try:
            refusal = self._route(call)
        except Exception as error:  # noqa: BLE001 (the call fails, those that are held go on)
            self._backlog.withdraw(call)
            refusal = self._errors.caught("route", error)
        if refusal is not None:
            call.unroutable(refusal)

    def withdraw(self, call: Routed) -> None:
        """Remove a held call for which no caller waits any more."""
        self._backlog.withdraw(call)

    def ended(self, call: Routed, replica: Replica, run_seconds: float, cost_seconds: float, code: str = "") -> None:
        """Learn from a sent call that has ended and left the replica's window, and send held calls.

        Its tenant is charged `cost_seconds`. `code` is the status of the replica's reply; "" without a reply, or where
        the replica ends.
        """
        self.sent_calls -= 1
        self._backlog.ran(call, cost_seconds)
        if code in ("UNAVAILABLE", "ABORTED"):
            self.members.failed(replica, CALL)
        elif code:
            replica.ejection.succeeded()
        if code == "OK":
            self._learn(call, replica, run_seconds)
        self._has_room()

    def _members_changed(self) -> None:
        """React to a change of the replicas or their kernels: refuse held calls that none serves, send the others."""
        with self._errors.guarded("fleet_changed"):
            self._changed()
        if self._backlog:
            self._refusing.start()
            self._sending.start()

    def _has_room(self) -> None:
        """Send held calls: a replica may have room for more."""
        if self._backlog.kinds:
            self._sending.start()

    def _offer(self, name: str, version: str) -> Offer | UnlatchError:
        """Return the offer for a kernel and a version, or the error of a call that no replica takes now."""
        offer = self.members.catalogue.find(name, version)
        if offer is not None and (offer.taken or self.hold.active):
            return offer
        if offer is not None or not self.members.take_calls:
            return no_replica()
        return self.members.catalogue.missing(name, version)

    def _route(self, call: Routed) -> UnlatchError | None:
        """Send or hold a call, or return the error that refuses it."""
        demand = call.demand
        offer = self._offer(demand.kernel, call.descriptor.request.version)
        if isinstance(offer, UnlatchError):
            return offer
        expected = self._backlog.forecast.expected(demand.kernel, demand.size)
        seconds = expected or _UNKNOWN_SECONDS
        kernel = offer.kernel
        together = kernel.max_batch_size if kernel.batch else 1
        if kernel.concurrency:
            beside = Beside(kernel.name, kernel.concurrency)
            call.estimate = Estimate(seconds / beside.runs, beside=beside)
        else:
            is_long = seconds > min([replica.window.long_seconds for replica in offer.replicas])
            call.estimate = Estimate(seconds, is_long, together)
        kinds = self._backlog.kinds
        replica = None if kinds and _kind(call) in kinds else self._choose(call, offer)
        refusal = self._refusal_in_time(call, offer, replica, expected)
        if refusal is not None:
            return refusal
        if replica is not None:
            self._backlog.take_at_once(call)
            self._send(call, replica)
        else:
            # This backlog has no bound and refuses nothing: max_live_calls bounds what the gateway holds.
            self._backlog.add(call)
        return None

    def _choose(self, call: Routed, offer: Offer) -> Replica | None:
        """Return the replica that would finish a call first: of a few with an idle worker, else of all with room."""
        roomy: list[Replica] = []
        if len(offer.replicas) > _LOOKED_AT:
            near = () if offer.near is None else (offer.near,)
            few = _roomy(call, [*near, *random.sample(offer.replicas, _LOOKED_AT)])
            roomy = [replica for replica in few if not replica.window.wait_seconds_of(call.estimate)]
        roomy = roomy or _roomy(call, offer.replicas)
        if len(roomy) < 2 and offer.near is None:
            return roomy[0] if roomy else None
        return _first_done(call, roomy, offer.near) if roomy else None

    def _refusal_in_time(
        self, call: Routed, offer: Offer, replica: Replica | None, expected: float
    ) -> UnlatchError | None:
        """Return the error for a new call that could not be answered in time; None if it could."""
        if replica is None:
            wait, run = self._wait_seconds(call, offer), expected
        else:
            wait = replica.window.wait_seconds_of(call.estimate)
            run = expected * replica.window.slowness_of(call.estimate)
        return self._backlog.refusal_in_time(call, wait_seconds=wait, run_seconds=run)

    def _wait_seconds(self, call: Routed, offer: Offer) -> float:
        """Return the seconds that a call would wait: behind the calls that are held here, and then at a replica."""
        takers = [replica for replica in offer.replicas if replica.takes_calls]
        is_long = call.estimate.long
        if not takers:
            # The call is held for a replica of which nothing is known yet.
            return 0.0
        wait = min(replica.window.wait_seconds_of(call.estimate) for replica in takers)
        if call.estimate.beside is not None:
            workers = sum(replica.window.of_async.workers for replica in takers)
            return self._backlog.seconds_before(call) / workers + wait if workers else wait
        before = self._backlog.seconds_before(call, short=not is_long)
        workers = sum(replica.window.workers / replica.window.slowness for replica in takers)
        return before / workers + wait

    def _send(self, call: Routed, replica: Replica) -> None:
        lane, number = replica.send(call)
        self.sent_calls += 1
        call.sent(replica, lane, number)

    def _send_held(self) -> Iterator[None]:
        """Send held calls as long as there is room. Yields after each call that is refused (a ByTurns step)."""
        # Only kinds with room are searched, because many calls of the other kinds may wait.
        offers = {kind: offer for kind in self._kinds() if (offer := self._offer_with_room(kind)) is not None}
        roomy: set[Hashable] = set(offers)
        while True:
            turn = self._backlog.next(roomy, lambda call: self._choose(call, offers[_kind(call)]), _seconds_until_done)
            if turn is None:
                return
            if not isinstance(turn, Send):
                self._refuse(turn.entry, turn.error)
                yield
                continue
            try:
                self._send(turn.entry, turn.place)
            except Exception as error:  # noqa: BLE001 (the call fails, the others go on)
                self._refuse(turn.entry, self._errors.caught("send_held", error))
                yield

    def _offer_with_room(self, kind: _Kind) -> Offer | None:
        """Return the offer for a kind of calls if a replica has room for a call of that kind, else None."""
        kernel, version, is_long, together, beside, avoids = kind
        offer = self.members.catalogue.find(kernel, version)
        if offer is None:
            return None
        any_such = Estimate(0.0, is_long, together, beside)
        fits = (replica is not avoids and replica.has_room(0, any_such) for replica in offer.replicas)
        return offer if any(fits) else None

    def _learn(self, call: Routed, replica: Replica, run_seconds: float) -> None:
        kernel, size, forecast = call.demand.kernel, call.demand.size, self._backlog.forecast
        expected = forecast.expected(kernel, size)
        # A single replica's speed is the mean, so there is no slowness to learn.
        if expected and len(self.members) > 1 and call.estimate.beside is None:
            replica.window.ran(expected, run_seconds)
        forecast.learn(kernel, size, run_seconds)

    def _refuse_unserved(self) -> Iterator[None]:
        """Refuse held calls of kernels that no replica has any more. Yields after each call (a ByTurns step)."""
        for call, error in self._backlog.refusals(self._unserved):
            self._refuse(call, error)
            yield

    def _unserved(self, kind: Hashable) -> UnlatchError | None:
        name, version, *_ = cast("_Kind", kind)
        offer = self._offer(name, version)
        return offer if isinstance(offer, UnlatchError) else None

    def _refuse(self, call: Routed, error: UnlatchError) -> None:
        with self._errors.guarded("refuse_held"):
            call.unroutable(error)

    def _kinds(self) -> list[_Kind]:
        return cast("list[_Kind]", list(self._backlog.kinds))


def _kind(call: Routed) -> _Kind:
    estimate = call.estimate
    version = call.descriptor.request.version
    return call.demand.kernel, version, estimate.long, estimate.together, estimate.beside, call.avoids


def _roomy(call: Routed, replicas: Sequence[Replica]) -> list[Replica]:
    """Return the replicas that have room for a call."""
    size, estimate, avoids = call.demand.size, call.estimate, call.avoids
    return [replica for replica in replicas if replica is not avoids and replica.has_room(size, estimate)]


def _first_done(call: Routed, roomy: Sequence[Replica], near: Replica | None) -> Replica | None:
    """Return the replica that would finish a call first: of those that count as equal the near one, else any of them.

    None if that is the near one and has no room: the call is held until it has room.
    """
    size, estimate = call.demand.size, call.estimate
    seconds = {replica: replica.expected_seconds(size, estimate) for replica in roomy}
    if near is not None and near not in seconds and near.soon_has_room(call):
        seconds[near] = near.expected_seconds(size, estimate, has_room=False)
    most = min(seconds.values()) + _EQUAL_SECONDS
    good = [replica for replica, each in seconds.items() if each <= most]
    first = near if near in good else random.choice(good)  # noqa: S311 (no secret)
    return first if first in roomy else None


def _seconds_until_done(call: Routed, replica: Replica) -> float:
    """Return the seconds until a held call would be done at a replica; 0 if a worker is idle, so the call may try."""
    wait = replica.window.wait_seconds_of(call.estimate)
    return wait + call.estimate.run_seconds * replica.window.slowness_of(call.estimate) if wait else 0.0
