"""An async worker's loop: run the coroutines of many calls at once, and send each reply when it is done.

    RunFrame ──> a task: input arrays ──> the kernel's coroutine ──> its outputs ──> in the Done frame, or in a segment
    Cancel   ──> the task is cancelled: the coroutine sees CancelledError

The frames are those of any worker (compute/ipc/frames.py). Failed tells what a run raised, or that it was cancelled.
Blocks tells that a coroutine blocks the event loop (compute/worker/steps.py). This process loads no gRPC.
"""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from unlatch import cancellation
from unlatch.common.errors import Cancelled, KernelError, ResourceExhausted, UnlatchError
from unlatch.compute.ipc import frames
from unlatch.compute.ipc.arena import Mapped
from unlatch.compute.ipc.memory_limits import Allowance
from unlatch.compute.worker import preload
from unlatch.compute.worker.beginning import (
    allowed,
    announce,
    failed_hook,
    misfit,
    run_hook,
    run_teardown,
    served,
    tell_failed_teardown,
)
from unlatch.compute.worker.catalogue import LoadError
from unlatch.compute.worker.kernel_call import explanation, input_arrays, outputs_of
from unlatch.compute.worker.reply import Packed, failed, packed, told, write
from unlatch.compute.worker.setup import give_way
from unlatch.compute.worker.steps import RunningCall, Steps, running
from unlatch.hooks import SETUPS, TEARDOWNS

# Frames that are read in one round of the event loop. To begin a call takes some 50 µs.
_FRAMES_AT_ONCE = 32
# A larger reply is written by a thread, so that other calls go on meanwhile.
_WRITTEN_AT_ONCE_BYTES = 1024 * 1024
# After this idle time the worker returns the memory that it keeps for its next call.
_IDLE_SECONDS = 3.0


def main(channel: socket.socket, max_reply_bytes: int) -> None:
    """Serve RunFrames until the dispatcher ends this worker or closes the channel."""
    with asyncio.Runner(loop_factory=_new_loop) as runner, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        runner.run(_main(channel, max_reply_bytes))


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        # Loaded after the fork: other workers have no use for it. An interpreter of the user's own may not have it.
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


async def _main(channel: socket.socket, max_reply_bytes: int) -> None:
    announce(channel)
    setups, teardowns = (preload.catalogue.hooks(which, of_async=True) for which in (SETUPS, TEARDOWNS))
    try:
        for hook in setups:
            await _finished(hook, run_hook(hook))
    except LoadError as error:
        misfit(channel, frames.Misfit(str(error), setup=True))
        return
    channel.send(frames.encode(frames.Ready(bool(teardowns))))
    await _readable(channel)
    memory_bytes = served(channel.recv(frames.FRAME_BYTES))
    if memory_bytes is None:
        return
    allowance = allowed(memory_bytes)
    give_way()
    await _AsyncWorker(channel, max_reply_bytes, allowance).serve()
    for hook in reversed(teardowns):
        try:
            await _finished(hook, run_teardown(hook))
        except LoadError as error:
            tell_failed_teardown(error)


async def _readable(channel: socket.socket) -> None:
    """Wait for the next frame. Tasks that a setup has started go on meanwhile."""
    loop = asyncio.get_running_loop()
    readable = loop.create_future()
    loop.add_reader(channel.fileno(), readable.set_result, None)
    await readable
    loop.remove_reader(channel.fileno())


async def _finished(hook: Callable[[], Any], begun: Any) -> None:
    """Wait for the end of a hook that is a coroutine function. Raises LoadError for whatever it raises."""
    if asyncio.iscoroutine(begun):
        try:
            await begun
        except BaseException as error:
            raise failed_hook(hook, error) from error


class _AsyncWorker:
    """Run the calls of RunFrames as tasks. A call ends with one Done or Failed frame."""

    def __init__(self, channel: socket.socket, max_reply_bytes: int, allowance: Allowance) -> None:
        self._channel = channel
        self._max_reply_bytes = max_reply_bytes
        self._allowance = allowance
        self._mapped = Mapped()
        self._calls: dict[int, RunningCall] = {}
        # By call, the wait for a reply segment.
        self._segments: dict[int, asyncio.Future[int]] = {}
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._idle = self._loop.call_later(_IDLE_SECONDS, allowance.shrink)
        self._steps = Steps(
            lambda call, place: self._send(frames.Blocks(call, place)), lambda call: self._send(frames.Unblocks(call))
        )
        self._loop.set_task_factory(self._steps.task)
        cancellation.asked_of = _is_cancelled
        # A process that a kernel forks must not ask for this worker's calls.
        os.register_at_fork(after_in_child=partial(setattr, cancellation, "asked_of", bool))

    async def serve(self) -> None:
        """Run calls until the dispatcher ends this worker, or is gone."""
        self._loop.add_reader(self._channel.fileno(), self._readable)
        await self._over
        self._loop.remove_reader(self._channel.fileno())

    def _send(self, frame: frames.ToDispatcher) -> None:
        # The dispatcher reads at once, so this waits only if the dispatcher itself stands still. It may be gone.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._channel.send(frames.encode(frame))

    def _readable(self) -> None:
        for _ in range(_FRAMES_AT_ONCE):
            try:
                frame, fds, _, _ = socket.recv_fds(self._channel, frames.FRAME_BYTES, 1, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except ConnectionResetError:
                frame, fds = b"", []
            if not frame:
                self._end()
                return
            self._hear(frames.decode_for_worker(frame), fds)

    def _hear(self, message: frames.ToWorker, fds: list[int]) -> None:
        match message:
            case frames.RunFrame():
                self._begin(message)
            case frames.Cancel():
                for number in message.calls:
                    self._cancel(number)
            case frames.Learn():
                (self._mapped.learn_reply if message.writable else self._mapped.learn_input)(message.segment, fds[0])
            case frames.Lend():
                self._segments.pop(message.call).set_result(message.segment)
            case frames.Forget():
                self._mapped.forget(message.inputs, message.replies)
            case frames.Shrink():
                self._shrink(ran_short=False)
            case frames.End():
                self._end()

    def _end(self) -> None:
        if not self._over.done():
            self._over.set_result(None)

    def _begin(self, run: frames.RunFrame) -> None:
        if not self._calls:
            self._idle.cancel()
            self._steps.watch(busy=True)
        call = RunningCall(run.members[0].call)
        self._calls[call.number] = call
        # The task inherits the context, and so the call.
        token = running.set(call)
        try:
            self._loop.create_task(self._answer(call, run))
        finally:
            running.reset(token)

    def _cancel(self, number: int) -> None:
        call = self._calls.get(number)
        if call is not None:
            call.cancelled = True
            if call.wants_result and call.task is not None:
                call.task.cancel()

    async def _answer(self, call: RunningCall, run: frames.RunFrame) -> None:
        began = time.perf_counter_ns()
        call.task = asyncio.current_task()
        log = ""
        answer: frames.Done | frames.Failed
        try:
            reply, taken = await self._run(call, run, began)
            answer = await self._done(call, run, reply, taken)
        except MemoryError:
            error: UnlatchError = self._allowance.exceeded(preload.catalogue.specs[run.kernel])
            answer = failed(run.members[0], error, log, time.perf_counter_ns() - began, call.cpu_nanoseconds)
            # As soon as the run's arrays are gone.
            self._loop.call_soon(partial(self._shrink, ran_short=True))
        except BaseException as raised:  # noqa: BLE001 (a kernel may raise anything, and the worker goes on)
            if call.cancelled and isinstance(raised, asyncio.CancelledError):
                error = Cancelled(f"kernel {run.kernel} was cancelled")
            else:
                error, log = told(run.kernel, raised)
            answer = failed(run.members[0], error, log, time.perf_counter_ns() - began, call.cpu_nanoseconds)
        self._send(answer)
        del self._calls[call.number]
        if not self._calls:
            self._steps.watch(busy=False)
            self._idle = self._loop.call_later(_IDLE_SECONDS, self._allowance.shrink)

    async def _run(self, call: RunningCall, run: frames.RunFrame, began: int) -> tuple[Packed, int]:
        """Run the kernel's coroutine. Returns its outputs, and the nanoseconds that it took."""
        if call.cancelled:
            raise asyncio.CancelledError
        spec = preload.catalogue.specs[run.kernel]
        arrays = input_arrays(self._mapped, spec, run.members)
        try:
            result = preload.catalogue.functions[run.kernel](*arrays, **run.parameters)
            if spec.concurrency is not None:
                result = await result
        except (KernelError, TypeError, ValueError) as error:
            fault = explanation(spec, error)
            if fault is None:
                raise
            raise fault from error
        call.wants_result = False
        taken = time.perf_counter_ns() - began
        return packed(spec, outputs_of(spec, arrays, result), run.members, self._max_reply_bytes), taken

    async def _done(self, call: RunningCall, run: frames.RunFrame, reply: Packed, taken: int) -> frames.Done:
        """Write a reply: into the frame if it is small, else into a segment, which only the dispatcher can lend."""
        if reply.size <= frames.MAX_INLINE_BYTES:
            inline = bytearray(reply.size)
            results = write(reply, inline, run.members)
            return frames.Done(results, taken, call.cpu_nanoseconds, bytes(inline))
        wait = self._segments[call.number] = self._loop.create_future()
        self._send(frames.Wants(call.number))
        segment = await wait
        if segment == frames.NO_SEGMENT:
            raise ResourceExhausted("the replica cannot allocate shared memory for the reply")
        memory = self._mapped.reply(segment, reply.size)
        if reply.size <= _WRITTEN_AT_ONCE_BYTES:
            results = write(reply, memory, run.members)
        else:
            results = await self._loop.run_in_executor(None, write, reply, memory, run.members)
        return frames.Done(results, taken, call.cpu_nanoseconds)

    def _shrink(self, *, ran_short: bool) -> None:
        resident, data = self._allowance.shrink()
        self._send(frames.Shrunk(resident, data, ran_short))


def _is_cancelled() -> bool:
    call = running.get()
    return call is not None and call.cancelled
