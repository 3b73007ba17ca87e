"""The pool: N slots, each filled by a worker process that is replaced when it ends.

A slot's number is what metrics and logs name; processes come and go in it. A worker has two calls in hand at most: the
one it runs and one staged behind it, so that it finds work when the loop that feeds it is busy elsewhere.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import structlog

from common.spec import KernelSpec
from compute.arena import InputArena
from compute.call import Call
from compute.forkserver import ForkServer
from compute.metrics import ComputeMetrics
from compute.slot import Slot

log = structlog.get_logger()

_SWEEP_SECONDS = 10.0


class Pool:
    """The workers of one replica."""

    def __init__(
        self,
        forkserver: ForkServer,
        workers: int,
        arena: InputArena,
        metrics: ComputeMetrics,
        on_room: Callable[[], None],
    ) -> None:
        self._arena = arena
        # Starting a worker blocks on the forkserver; one thread, so that starts do not race in multiprocessing.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="spawn")
        self._slots = [Slot(number, forkserver, self._starter, metrics, on_room) for number in range(workers)]
        self._sweeping: asyncio.Task[None] | None = None

    @property
    def kernels(self) -> dict[str, KernelSpec]:
        """What the workers serve, known once the pool has started."""
        return self._slots[0].kernels

    async def start(self) -> None:
        """Fill every slot. Raises StartError, with file and line, when the kernels do not load."""
        # All have started or failed before any failure ends the start: who is still being forked could not be stopped.
        results = await asyncio.gather(*(slot.start() for slot in self._slots), return_exceptions=True)
        for failure in filter(None, results):
            raise failure
        self._sweeping = asyncio.create_task(self._sweep())

    def has_room(self) -> bool:
        """Whether some worker can take one more call in hand."""
        return any(slot.has_room for slot in self._slots)

    def run(self, call: Call) -> None:
        """Give a call to the worker with least in hand."""
        min((slot for slot in self._slots if slot.has_room), key=_in_hand).run(call)

    async def stop(self) -> None:
        """End every worker, whatever it is doing, and wait until they are gone."""
        if self._sweeping is not None:
            self._sweeping.cancel()
        await asyncio.gather(*(slot.stop() for slot in self._slots))
        self._starter.shutdown(wait=False)

    async def _sweep(self) -> None:
        """Give memory back that has not been used for a while."""
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            dropped = self._arena.drop_idle()
            for slot in self._slots:
                slot.sweep(dropped)


def _in_hand(slot: Slot) -> tuple[int, int]:
    # Of two workers that both run a call, the next is staged behind the one with less to go through.
    return slot.in_hand, slot.bytes_in_hand
