"""A slot: one place in the pool, the process that fills it now, and the calls in that process's hands."""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from itertools import count
from time import monotonic

import structlog

from common.datatypes import is_held, is_served
from common.errors import Unavailable, from_code
from common.spec import KernelSpec
from compute.arena import ReplySegments, Segment
from compute.call import Call
from compute.forkserver import ForkServer
from compute.metrics import ComputeMetrics
from compute.process import Frame, WorkerProcess
from compute.wire import Done, Failed, Forget, Loaded, Misfit, Run, Tensor

log = structlog.get_logger()

# One that runs and one staged.
_MOST_IN_HAND = 2
# A worker that keeps ending is started again ever more slowly, from the first of these to the second.
_FIRST_BACKOFF_SECONDS = 0.05
_LONGEST_BACKOFF_SECONDS = 5.0


class StartError(Exception):
    """A worker cannot start; the message says why, with file and line where a kernel module is at fault."""


class Slot:
    """`on_room` is called whenever the slot can take a call that it could not take before."""

    def __init__(
        self,
        number: int,
        forkserver: ForkServer,
        starter: Executor,
        metrics: ComputeMetrics,
        on_room: Callable[[], None],
    ) -> None:
        self.number = number
        self.kernels: dict[str, KernelSpec] = {}
        self._forkserver = forkserver
        self._starter = starter
        self._metrics = metrics.worker(number)
        self._on_room = on_room
        self._process: WorkerProcess | None = None
        self._ready: asyncio.Future[None] | None = None
        self._gone = asyncio.Event()
        self._gone.set()
        self._stopping = False
        self._ends_in_a_row = 0
        self._runs = count(1)
        self._in_hand: deque[tuple[int, Call, Segment]] = deque()
        self._replies = ReplySegments()
        self._known_inputs: set[int] = set()
        self._known_replies: set[int] = set()

    @property
    def in_hand(self) -> int:
        """How many calls the worker holds."""
        return len(self._in_hand)

    @property
    def bytes_in_hand(self) -> int:
        """How many bytes of tensors those calls bring."""
        return sum(call.block.size for _, call, _ in self._in_hand if call.block is not None)

    @property
    def has_room(self) -> bool:
        """Whether the worker can take one more."""
        return (
            self._ready is not None
            and self._ready.done()
            and len(self._in_hand) < _MOST_IN_HAND
            and self._process is not None
            and not self._process.ending
        )

    async def start(self) -> None:
        """Fill the slot. Raises StartError when the worker does not become ready."""
        loop = asyncio.get_running_loop()
        try:
            process, channel = await loop.run_in_executor(self._starter, self._forkserver.spawn)
            self._ready = loop.create_future()
            self._process = WorkerProcess(process, channel, self._on_frame, self._on_end)
        except (OSError, EOFError) as error:
            raise StartError(f"worker {self.number} did not start: {error}") from error
        self._gone.clear()
        self._metrics.started(self._process.pid, self._forkserver.pid)
        await self._ready

    def run(self, call: Call) -> None:
        """Give the worker a call."""
        assert self._process is not None
        number = next(self._runs)
        source, target = call.block, self._replies.lend()
        descriptors: list[int] = []
        input_is_new = source is not None and source.segment.number not in self._known_inputs
        if source is not None and input_is_new:
            self._known_inputs.add(source.segment.number)
            descriptors.append(source.segment.fd)
        reply_is_new = target.number not in self._known_replies
        if reply_is_new:
            self._known_replies.add(target.number)
            descriptors.append(target.fd)
        if not self._in_hand:
            self._begin(call)
        self._in_hand.append((number, call, target))
        run = Run(
            call=number,
            kernel=call.spec.name,
            tensors=call.tensors,
            parameters=call.arguments.parameters,
            input_segment=source.segment.number if source is not None else -1,
            reply_segment=target.number,
            input_is_new=input_is_new,
            reply_is_new=reply_is_new,
        )
        self._process.send(run, descriptors)

    def sweep(self, dropped_inputs: list[int]) -> None:
        """Let the worker forget segments that are gone, and those of its own that it has not needed for a while."""
        inputs = [number for number in dropped_inputs if number in self._known_inputs]
        replies = self._replies.drop_idle()
        self._known_inputs.difference_update(inputs)
        self._known_replies.difference_update(replies)
        if self._process is not None and (inputs or replies):
            self._process.send(Forget(inputs, replies))

    async def stop(self) -> None:
        """End the worker for good, whatever it is doing, and wait until it is gone."""
        self._stopping = True
        if self._process is not None:
            self._process.kill("the pool stops")
        await self._gone.wait()

    def _on_frame(self, frame: Frame) -> None:
        if isinstance(frame, Done | Failed):
            self._finished(frame)
        elif isinstance(frame, Loaded):
            self.kernels[frame.kernel.name] = frame.kernel
        elif isinstance(frame, Misfit):
            self._give_up(frame.message)
        elif self._ready is not None and not self._ready.done():
            self._ready.set_result(None)
            self._metrics.ready()
            self._on_room()

    def _finished(self, frame: Done | Failed) -> None:
        if not self._in_hand or self._in_hand[0][0] != frame.call:
            self._kill("it answered a call that it was not running")
            return
        _, call, segment = self._in_hand[0]
        if isinstance(frame, Done) and not _is_sound(frame.tensors, call, segment, self._forkserver.max_reply_bytes):
            self._kill("its reply is not what it can be")
            return
        self._in_hand.popleft()
        self._ends_in_a_row = 0
        self._metrics.ran(call.spec.name, "ok" if isinstance(frame, Done) else "error")
        if self._in_hand:
            self._begin(self._in_hand[0][1])
        run_seconds = frame.run_nanoseconds / 1e9
        call.release()
        if isinstance(frame, Done):
            self._answer(call, frame, segment, run_seconds)
        else:
            self._replies.give_back(segment)
            if frame.log:
                log.error("kernel failed", kernel=call.spec.name, worker=self.number, story=frame.log)
            call.fail(from_code(frame.code, frame.message, field=frame.field), run_seconds, self.number)
        self._on_room()

    def _answer(self, call: Call, done: Done, segment: Segment, run_seconds: float) -> None:
        replies = self._replies

        def sent() -> None:
            replies.give_back(segment)

        if call.ended:
            sent()
        else:
            call.answer(done.tensors, segment.view, run_seconds, self.number, sent)

    def _begin(self, call: Call) -> None:
        call.begun = monotonic()
        self._metrics.begins(call.begun, call.begun - call.landed)

    def _kill(self, why: str) -> None:
        if self._process is not None:
            self._process.kill(why)

    def _give_up(self, message: str) -> None:
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(StartError(message))
            self._ready = None
        self._kill("its kernels do not load")

    def _on_end(self, reason: str) -> None:
        self._metrics.ended("" if self._stopping else reason)
        self._process = None
        in_hand, self._in_hand = self._in_hand, deque()
        self._replies.close()
        self._replies = ReplySegments()
        self._known_inputs.clear()
        self._known_replies.clear()
        for _, call, segment in in_hand:
            segment.close()
            call.fail(Unavailable(f"worker {self.number} ended while it had the call: {reason}"), worker=self.number)
            call.release()
        ready, self._ready = self._ready, None
        self._gone.set()
        if ready is None or not ready.done():
            # It never was ready, and whoever starts it hears of that.
            if ready is not None:
                ready.set_exception(StartError(f"worker {self.number} ended before it was ready: {reason}"))
        elif not self._stopping:
            log.warning("worker ended", worker=self.number, reason=reason, calls_lost=len(in_hand))
            self._restarting = asyncio.create_task(self._restart())

    async def _restart(self) -> None:
        while not self._stopping:
            if self._ends_in_a_row:
                delay = _FIRST_BACKOFF_SECONDS * 2 ** min(self._ends_in_a_row - 1, 10)
                await asyncio.sleep(min(delay, _LONGEST_BACKOFF_SECONDS))
            self._ends_in_a_row += 1
            try:
                await self.start()
            except StartError as error:
                log.error("worker did not start", worker=self.number, reason=str(error))
            else:
                return


def _is_sound(tensors: tuple[Tensor, ...], call: Call, segment: Segment, max_reply_bytes: int) -> bool:
    """Whether a reply is one that the front can send on: whatever a worker writes, it must not hurt the front."""
    if len(tensors) != len(call.spec.outputs):
        return False
    end = 0
    for tensor in tensors:
        if not is_served(tensor.dtype) or not is_held(tensor.dtype, tensor.shape, tensor.length):
            return False
        end = max(end, tensor.offset + tensor.length)
    return end <= max_reply_bytes and segment.follow_growth_to(end)
