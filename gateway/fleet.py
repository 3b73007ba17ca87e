"""The fleet: every replica that the gateway knows, and the calls that fit no replica's window yet.

A call is bound to a replica when that has room for it, not before: until then it can still go to any.
"""

import asyncio
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from typing import Protocol

from common.errors import NotFound, Unavailable, no_kernel
from common.lane_caller import LaneCaller
from common.policy import Policy, Waiting
from common.tls import ChannelSecurity
from gateway.replica import Outgoing, Replica
from protos.unlatch_pb2 import Kernel

# Refusing one takes about 30 µs.
_REFUSED_AT_ONCE = 32


class Routed(Outgoing, Waiting, Protocol):
    """A call that wants a replica."""

    def sent(self, replica: Replica, lane: LaneCaller, number: int) -> None:
        """It is on that lane to that replica now, under that number."""

    def unroutable(self, error: NotFound | Unavailable) -> None:
        """No replica takes it any more."""


class Watching(Protocol):
    """Who is told of the fleet's changes."""

    def fleet_changed(self, replica: Replica) -> None:
        """A replica came, went, drains, or serves something else."""


class Fleet:
    """Routes calls to replicas. `policy` is the order in which calls that fit no window wait."""

    def __init__(
        self,
        targets: Iterable[str],
        policy: Policy[Routed],
        watching: Watching,
        security: ChannelSecurity,
        grace_seconds: float,
    ) -> None:
        self._replicas = [Replica(target, self._changed, security, grace_seconds) for target in targets]
        self._policy = policy
        # How many calls of each kernel the policy holds.
        self._held: Counter[str] = Counter()
        self._watching = watching
        self._running: list[asyncio.Task[None]] = []

    @property
    def held(self) -> int:
        """How many calls fit no window yet."""
        return len(self._policy)

    @property
    def takes_calls(self) -> bool:
        """Whether any replica does."""
        return any(replica.takes_calls for replica in self._replicas)

    def serves(self, name: str) -> bool:
        """Whether any replica has a kernel of that name."""
        return any(name in replica.kernels for replica in self._replicas)

    def kernels(self) -> list[Kernel]:
        """What the fleet serves, by name."""
        served = {kernel.name: kernel for replica in self._replicas for kernel in replica.kernels.values()}
        return [served[name] for name in sorted(served)]

    def kernel(self, name: str, version: str) -> Kernel:
        """A kernel that some replica serves. Raises NotFound with near names, Unavailable when there is no replica."""
        for replica in self._replicas:
            # One that drains still says what it serves, but a call would wait for nothing.
            kernel = replica.kernels.get(name) if replica.takes_calls else None
            if kernel is not None and version in ("", kernel.version):
                return kernel
        if not self.takes_calls:
            raise Unavailable("no replica takes calls now", retry_after_milliseconds=1000)
        raise no_kernel(name, version, {kernel.name: kernel.version for kernel in self.kernels()})

    def route(self, call: Routed) -> None:
        """Send a call to a replica with room, or hold it until there is one; nobody overtakes a call of its kernel."""
        kernel = call.descriptor.request.kernel
        if kernel not in self._held and (replica := self._choose(call)) is not None:
            self._send(call, replica)
        else:
            self._hold(call)

    def withdraw(self, call: Routed) -> None:
        """A call that is held is wanted no more."""
        if self._policy.remove(call):
            kernel = call.descriptor.request.kernel
            self._held[kernel] -= 1
            if not self._held[kernel]:
                del self._held[kernel]

    def ended(self, call: Routed, replica: Replica, run_seconds: float) -> None:
        """A call that was sent has ended, and has cost so much; another may take its place."""
        replica.ended(call)
        self._policy.charge(call, run_seconds)
        if self.held:
            self._send_held()

    def start(self) -> None:
        """Open every lane."""
        self._running = [asyncio.create_task(replica.run()) for replica in self._replicas]

    async def close(self) -> None:
        """Close every lane."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _choose(self, call: Routed) -> Replica | None:
        request, size = call.descriptor.request, call.body.size
        for replica in self._replicas:
            if replica.has_room(size) and request.kernel in replica.kernels:
                return replica
        return None

    def _send(self, call: Routed, replica: Replica) -> None:
        call.sent(replica, *replica.send(call))

    def _hold(self, call: Routed) -> None:
        self._policy.add(call)
        self._held[call.descriptor.request.kernel] += 1

    def _send_held(self) -> None:
        # While no replica has room for anything, nobody is looked for among the many who may wait.
        while self._has_room and (found := self._next_held()) is not None:
            call, replica = found
            self.withdraw(call)
            self._send(call, replica)

    @property
    def _has_room(self) -> bool:
        return any(replica.has_room(0) for replica in self._replicas)

    def _next_held(self) -> tuple[Routed, Replica] | None:
        """The first call in order that has room now. A kernel whose replicas are full does not hold up the others."""
        full: set[str] = set()
        for call in self._policy:
            kernel = call.descriptor.request.kernel
            if kernel not in full:
                if (replica := self._choose(call)) is not None:
                    return call, replica
                full.add(kernel)
                if len(full) == len(self._held):
                    break
        return None

    def _changed(self, replica: Replica) -> None:
        self._watching.fleet_changed(replica)
        self._refuse_some()
        self._send_held()

    def _refuse_some(self) -> None:
        """Refuse the held calls of kernels that no replica has any more. By turns, since many may be held."""
        lost = {kernel: error for kernel in self._held if (error := self._refusal(kernel)) is not None}
        if not lost:
            return
        kernels = ((call, call.descriptor.request.kernel) for call in self._policy)
        for call, kernel in list(islice((found for found in kernels if found[1] in lost), _REFUSED_AT_ONCE)):
            self.withdraw(call)
            call.unroutable(lost[kernel])
        asyncio.get_running_loop().call_soon(self._refuse_some)

    def _refusal(self, kernel: str) -> NotFound | Unavailable | None:
        try:
            self.kernel(kernel, "")
        except (NotFound, Unavailable) as error:
            return error
        return None
