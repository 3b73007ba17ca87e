"""Readiness: whether this replica takes calls.

A worker that ends is replaced within milliseconds, and calls wait for that. But if no worker can be started, because
the kernels do not load any more or take too long, and no worker is left, calls are refused with the reason until a
worker is up again. The reason is logged once, and not at every try.
"""

from collections.abc import Callable

import msgspec
import structlog

from unlatch.common.kernel.spec import KernelSpec

log = structlog.get_logger()


class ServedKernels:
    """The kernels that all workers of a replica serve, of every pool, and the slots of the workers that are up."""

    def __init__(self) -> None:
        # Always the same object.
        self.kernels: dict[str, KernelSpec] = {}
        self.up: set[int] = set()


class Readiness:
    """Knows which slots of a pool have a worker, and why starts fail.

    `on_change` is called with the reason when the pool stops taking calls, and with "" when it takes calls again or
    its kernels have changed.
    """

    def __init__(self, on_change: Callable[[str], None], served: ServedKernels | None = None) -> None:
        self._served = ServedKernels() if served is None else served
        self.kernels = self._served.kernels
        self._on_change = on_change
        self._up: set[int] = set()
        self._refuses = False
        # The reason why starts keep failing, and the reason of a failed start that was logged last.
        self._obstacle = self._said = ""

    def fits(self, kernels: dict[str, KernelSpec]) -> bool:
        """Whether a worker with these kernels may serve: they must be those of the workers that are up."""
        return not self._served.up or _are_alike(kernels, self.kernels)

    def up(self, worker: int, kernels: dict[str, KernelSpec]) -> None:
        """Note that a worker with fitting kernels takes calls."""
        self._up.add(worker)
        self._served.up.add(worker)
        self._obstacle = self._said = ""
        others = not _are_alike(kernels, self.kernels)
        news = self._refuses or (others and bool(self.kernels))
        self._refuses = False
        if others:
            self.kernels.clear()
            self.kernels.update(kernels)
        if news:
            log.info("replica takes calls again", kernels=len(kernels))
            self._on_change("")

    def down(self, worker: int) -> None:
        """Note that a worker has ended."""
        self._up.discard(worker)
        self._served.up.discard(worker)
        self._reconsider()

    def failed(self, worker: int, why: str, *, lasting: bool) -> None:
        """Note that a start failed; `lasting` when the next try will fail for the same reason."""
        if why != self._said:
            self._said = why
            log.error("worker did not start", worker=worker, message=why)
        if lasting:
            self._obstacle = why
            self._reconsider()

    def _reconsider(self) -> None:
        if self._obstacle and not self._up and not self._refuses:
            self._refuses = True
            log.error("replica takes no calls", message=self._obstacle)
            self._on_change(self._obstacle)


def _are_alike(some: dict[str, KernelSpec], others: dict[str, KernelSpec]) -> bool:
    # As they are sent: NaN, which may be a default, equals nothing.
    return msgspec.msgpack.encode(some) == msgspec.msgpack.encode(others)
