"""A slot: one place in the pool, and the process that fills it now. What a worker has in hand is its `Hand`'s."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress

import structlog

from unlatch.common.backoff import Backoff
from unlatch.common.kernel.spec import KernelSpec
from unlatch.compute.call import Call
from unlatch.compute.dispatch.queue import Queue
from unlatch.compute.intake.poison import Suspects
from unlatch.compute.ipc.frames import Done, Failed, Loaded, Misfit, Ready, Shrunk, ToDispatcher
from unlatch.compute.ipc.memory_limits import MemoryLimits
from unlatch.compute.metrics import WorkerMetrics
from unlatch.compute.pool import exits as ends
from unlatch.compute.pool.exits import End
from unlatch.compute.pool.forkserver import ForkServer, StartError
from unlatch.compute.pool.in_flight import Hand
from unlatch.compute.pool.process import WorkerProcess
from unlatch.compute.pool.recycling import Upkeep
from unlatch.compute.readiness import Readiness
from unlatch.compute.settings import ComputeSettings

log = structlog.get_logger()

# So many starts that fail in a row do so for a reason that lasts.
_MOST_VAIN_STARTS = 3


class Slot:
    """The queue is asked for more whenever the slot can take a call that it could not take before."""

    def __init__(
        self,
        number: int,
        forkserver: ForkServer,
        metrics: WorkerMetrics,
        queue: Queue,
        suspects: Suspects,
        readiness: Readiness,
        limits: MemoryLimits,
        settings: ComputeSettings,
    ) -> None:
        self.number = number
        self._forkserver = forkserver
        self._metrics = metrics
        self._queue = queue
        self._suspects = suspects
        self._readiness = readiness
        self._limits = limits
        self._settings = settings
        self._process: WorkerProcess | None = None
        self._ready: asyncio.Future[None] | None = None
        self._gone = asyncio.Event()
        self._gone.set()
        self._stopping = False
        # Of the worker that starts: its kernels so far, whose child it is, and why it cannot serve.
        self._loaded: dict[str, KernelSpec] = {}
        self._parent = self._unfit_parent = 0
        self._misfit = ""
        # Ends of a kernel's doing with no call finished between them; the first is made good at once.
        self._ends = Backoff(first_seconds=0.05, longest_seconds=5.0, free_tries=1)
        # A start costs more, where the kernels are loaded anew, and what is in its way takes longer to mend.
        self._start_failures = Backoff(first_seconds=0.1, longest_seconds=20.0)
        self._restarting: asyncio.Task[None] | None = None
        self._hand: Hand | None = None
        # Its worker's, while that is ready.
        self.upkeep: Upkeep | None = None

    @property
    def in_hand(self) -> int:
        """How many runs the worker holds."""
        return len(self._hand) if self._hand is not None else 0

    @property
    def runs_long(self) -> bool:
        """Whether the worker runs a call that takes long."""
        return self._hand is not None and self._hand.runs_long

    def seconds_left(self, now: float) -> float:
        """What its worker's runs are expected to take from now on."""
        return self._hand.seconds_left(now) if self._hand is not None else 0.0

    @property
    def bytes_in_hand(self) -> int:
        """How many bytes of tensors their calls bring."""
        return self._hand.bytes if self._hand is not None else 0

    @property
    def has_room(self) -> bool:
        """Whether the worker can take one run more."""
        return self.upkeep is not None and not self.upkeep.retires and self._hand is not None and self._hand.has_room

    async def start(self) -> None:
        """Fill the slot. Raises StartError when the worker does not become ready."""
        self._misfit, self._loaded = "", {}
        process, channel, self._parent = await self._forkserver.spawn_within(
            self._settings.worker_start_seconds, unfit=self._unfit_parent
        )
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        try:
            self._process = WorkerProcess(
                process, channel, self._on_frame, self._on_end, stopped_seconds=self._settings.stopped_worker_seconds
            )
        except ProcessLookupError as error:
            raise StartError(f"a worker ended as it was forked: {ends.by_itself(process.exitcode)}") from error
        except OSError as error:
            raise StartError(f"a worker did not start: {error}") from error
        self._hand = Hand(
            self.number,
            self._process,
            self._metrics,
            self._queue,
            self._suspects,
            kill_grace_seconds=self._settings.kill_grace_seconds,
            long_call_seconds=self._settings.long_call_seconds,
            max_reply_bytes=self._forkserver.max_reply_bytes,
        )
        self._gone.clear()
        self._metrics.started(self._process.pid, self._parent)
        late = loop.call_later(self._settings.worker_start_seconds, self._process.kill, ends.UNREADY)
        try:
            await self._ready
        finally:
            late.cancel()

    def run(self, calls: Sequence[Call]) -> None:
        """Give the worker a call, or several to run as one."""
        assert self._hand is not None
        self._hand.run(calls)

    def abandon(self, call: Call) -> None:
        """Nobody waits for a call any more, which this worker may have."""
        if self._hand is not None:
            self._hand.abandon(call)

    def sweep(self, dropped_inputs: list[int]) -> None:
        """Let the worker forget segments that are gone, and those of its own that it has not needed for a while."""
        if self._hand is not None:
            self._hand.sweep(dropped_inputs)

    def look(self) -> None:
        """See to it that the worker keeps to its limits."""
        if self.upkeep is not None:
            self.upkeep.look()
            self._metrics.memory_bytes = self.upkeep.taken_bytes

    async def stop(self) -> None:
        """End the worker for good, whatever it is doing, and wait until it is gone."""
        self._stopping = True
        if self._process is not None:
            self._process.kill(ends.POOL_STOPS)
        await self._gone.wait()

    def _on_frame(self, frame: ToDispatcher) -> None:
        if isinstance(frame, Done | Failed):
            assert self._hand is not None
            if self._hand.heard(frame):
                self._ends.succeeded()
                if self.upkeep is not None:
                    self.upkeep.rested()
                self._queue.pump()
        elif isinstance(frame, Shrunk):
            if self.upkeep is not None:
                self.upkeep.shrunk(frame)
        elif self._ready is None or self._ready.done():
            self._kill(ends.NOT_STARTING)
        else:
            self._starts(frame, self._ready)

    def _starts(self, frame: Loaded | Ready | Misfit, ready: asyncio.Future[None]) -> None:
        if isinstance(frame, Loaded):
            self._loaded[frame.kernel.name] = frame.kernel
        elif isinstance(frame, Misfit) or (why := self._limits.refusal(self._loaded.values())):
            # What its parent has failed to load, or should not have loaded, is the same for all its children.
            self._unfit_parent = self._parent
            self._give_up(frame.message if isinstance(frame, Misfit) else why)
        elif not self._readiness.fits(self._loaded):
            self._give_up("its kernels are not those of the workers that are up: their files have changed")
        else:
            self._is_ready(ready)

    def _is_ready(self, ready: asyncio.Future[None]) -> None:
        assert self._process is not None
        assert self._hand is not None
        with suppress(OSError):  # it has ended meanwhile: nothing is given to it before that is heard
            self.upkeep = Upkeep(self._process, self._hand, self._limits)
        ready.set_result(None)
        self._start_failures.succeeded()
        self._metrics.ready()
        self._readiness.up(self.number, self._loaded)
        self._queue.pump()

    def _kill(self, end: End) -> None:
        if self._process is not None:
            self._process.kill(end)

    def _give_up(self, why: str) -> None:
        # Told once the process is gone: whoever hears of it may fill the slot again.
        self._misfit = why
        self._kill(ends.MISFIT)

    def _on_end(self, end: End) -> None:
        self._metrics.ended("" if self._stopping else end.reason)
        hand, self._hand, self._process = self._hand, None, None
        if self.upkeep is not None:
            self.upkeep.close()
            self.upkeep = None
        lost = hand.lost(end, stopping=self._stopping) if hand is not None else 0
        ready, self._ready = self._ready, None
        self._gone.set()
        self._readiness.down(self.number)
        if ready is None or not ready.done():
            # It never was ready, and whoever starts it hears of that.
            if ready is not None:
                why = self._misfit or f"a worker ended before it was ready: {end}"
                lasting = end == ends.UNREADY or self._unfit_parent == self._parent
                ready.set_exception(StartError(why, lasting=lasting))
        elif not self._stopping:
            tell = log.info if end in ends.PLANNED else log.warning
            tell("worker ended", worker=self.number, reason=end.reason, message=str(end), calls_lost=lost)
            self._restarting = asyncio.create_task(self._restart(end))
        self._queue.pump()

    async def _restart(self, end: End) -> None:
        delay = 0.0 if end.at_once else self._ends.failed()
        while not self._stopping:
            await asyncio.sleep(delay)
            try:
                await self.start()
            except Exception as error:  # noqa: BLE001 (whatever it is, the slot must not stay empty)
                if not self._stopping:
                    delay = self._start_failures.failed()
                    lasting = self._start_failures.failures >= _MOST_VAIN_STARTS
                    lasting |= isinstance(error, StartError) and error.lasting
                    self._readiness.failed(self.number, str(error), lasting=lasting)
            else:
                return
