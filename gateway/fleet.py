"""The fleet: every replica that the gateway knows, and the calls that fit no replica's window yet.

A call is bound to a replica when that has room for it, not before: until then it can still go to any.
"""

import asyncio
from collections.abc import Iterable
from typing import Protocol

from common.errors import NotFound, Unavailable, near
from common.policy import Policy
from gateway.replica import Outgoing, Replica
from protos.unlatch_pb2 import Kernel


class Routed(Outgoing, Protocol):
    """A call that wants a replica."""

    def sent(self, replica: Replica, number: int) -> None:
        """It is on that replica's lane now, under that number."""

    def unroutable(self, error: NotFound | Unavailable) -> None:
        """No replica takes it any more."""


class Watching(Protocol):
    """Who is told of the fleet's changes."""

    def fleet_changed(self, replica: Replica) -> None:
        """A replica came, went, drains, or serves something else."""


class Fleet:
    """Routes calls to replicas. `policy` is the order in which calls that fit no window wait."""

    def __init__(self, targets: Iterable[str], policy: Policy[Routed], watching: Watching) -> None:
        self._replicas = [Replica(target, self._changed) for target in targets]
        self._policy = policy
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

    def kernels(self) -> list[Kernel]:
        """What the fleet serves, by name."""
        served = {kernel.name: kernel for replica in self._replicas for kernel in replica.kernels.values()}
        return [served[name] for name in sorted(served)]

    def kernel(self, name: str, version: str) -> Kernel:
        """A kernel that some replica serves. Raises NotFound with near names, Unavailable when there is no replica."""
        other = None
        for replica in self._replicas:
            # One that drains still says what it serves, but a call would wait for nothing.
            kernel = replica.kernels.get(name) if replica.takes_calls else None
            if kernel is not None:
                if not version or version == kernel.version:
                    return kernel
                other = kernel
        if not self.takes_calls:
            raise Unavailable("no replica takes calls now", retry_after_milliseconds=1000)
        if other is not None:
            raise NotFound(f"kernel {name} has version {other.version}, not {version[:64]!r}", field="model_version")
        known = (kernel.name for kernel in self.kernels())
        raise NotFound(f"there is no kernel {name[:64]!r}{near(name, known)}", field="model_name")

    def route(self, call: Routed) -> None:
        """Send a call to a replica with room, or hold it until there is one."""
        if not self.held and (replica := self._choose(call)) is not None:
            self._send(call, replica)
        else:
            self._policy.add(call)

    def withdraw(self, call: Routed) -> None:
        """A call that is held is wanted no more."""
        self._policy.remove(call)

    def ended(self, call: Routed, replica: Replica) -> None:
        """A call that was sent has ended; another may take its place."""
        replica.ended(call)
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
        call.sent(replica, replica.send(call))

    def _send_held(self) -> None:
        while (call := self._policy.peek()) is not None and (replica := self._choose(call)) is not None:
            self._policy.remove(call)
            self._send(call, replica)

    def _changed(self, replica: Replica) -> None:
        self._watching.fleet_changed(replica)
        if not self.takes_calls:
            while (call := self._policy.next()) is not None:
                call.unroutable(Unavailable("no replica takes calls now", retry_after_milliseconds=1000))
        self._send_held()
