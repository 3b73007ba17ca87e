"""An async worker's loop: run the coroutines of many calls at once, and send each reply when it is done.

    RunFrame ──> a task: input arrays ──> the kernel's coroutine ──> its outputs ──> in the Done frame, or in a segment
    Cancel   ──> the task is cancelled: the coroutine sees CancelledError

The frames are those of any worker (compute/ipc/frames.py). Failed tells what a run raised, or that it was cancelled.
Blocks tells that a coroutine blocks the event loop (compute/worker/steps.py). This process loads no gRPC.
"""

import asyncio
import contextlib
import os
import select
import socket
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

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
from unlatch.compute.worker.reply import Packed, failed, own_copies, packed, told, write
from unlatch.compute.worker.setup import give_way_with_loop
from unlatch.compute.worker.steps import RunningCall, Steps, running
from unlatch.hooks import SETUPS, TEARDOWNS

Result = TypeVar("Result")

# Frames that are read in one round of the event loop. To begin a call takes some 50 µs.
_FRAMES_AT_ONCE = 32
# A cancelled task sees it in the next round of the event loop, and tasks that it waits for in the rounds before that.
_ROUNDS_OF_A_CANCEL = 4
# A larger reply is written by a thread, so that other calls go on meanwhile.
_WRITTEN_AT_ONCE_BYTES = 1024 * 1024
# After this idle time the worker returns the memory that it keeps for its next call.
_IDLE_SECONDS = 3.0


def main(channel: socket.socket, max_reply_bytes: int) -> None:
    """Serve RunFrames until the dispatcher ends this worker or closes the channel.

    If anything else ends the event loop (SystemExit in a task, `loop.stop()`), the process ends at once. An event loop
    that closes in order would cancel all calls first, and answer them with an error that is not theirs.
    """
    with asyncio.Runner(loop_factory=_new_loop) as runner, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        try:
            runner.run(_main(channel, max_reply_bytes))
        except (BrokenPipeError, ConnectionResetError):
            raise
        except BaseException as error:  # noqa: BLE001 (whatever it is, the loop has ended)
            traceback.print_exception(error)
            sys.stderr.flush()
            os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)


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
    give_way_with_loop()
    await _AsyncWorker(channel, max_reply_bytes, allowance).serve()
    for hook in reversed(teardowns):
        try:
            await _finished(hook, run_teardown(hook))
        except LoadError as error:
            tell_failed_teardown(error)


async def _readable(channel: socket.socket) -> None:
    """Wait for the next frame. Tasks that a setup has started go on meanwhile."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(channel.fileno(), readable.set)
    await readable.wait()
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
        # Of its own: a kernel may occupy the loop's threads, or end them.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="unlatch-replies")
        self._outgoing = select.poll()
        self._outgoing.register(channel, select.POLLOUT)
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
        encoded = frames.encode(frame)
        # The dispatcher may be gone.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while True:
                try:
                    self._channel.send(encoded)
                except BlockingIOError:
                    # uvloop has made the socket non-blocking. The dispatcher reads at once unless it stands still.
                    self._outgoing.poll()
                else:
                    return

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
            try:
                self._hear(frames.decode_for_worker(frame), fds)
            except Exception as error:  # noqa: BLE001 (a frame is lost, so the worker ends, and its exit settles its calls)
                self._fail(error)
                return

    def _hear(self, message: frames.ToWorker, fds: list[int]) -> None:
        match message:
            case frames.RunFrame():
                self._begin(message)
            case frames.Cancel():
                for number in message.calls:
                    self._cancel(number)
                self._loop.call_soon(self._cancel_heard, message.calls, _ROUNDS_OF_A_CANCEL)
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
        for wait in self._segments.values():
            # No segment is lent any more, and the wait for one is not cancelled.
            wait.set_result(frames.NO_SEGMENT)
        self._segments.clear()

    def _fail(self, error: BaseException) -> None:
        """End the worker because of an error of its own. Its exit settles its calls."""
        if not self._over.done():
            self._over.set_exception(error)

    def _begin(self, run: frames.RunFrame) -> None:
        if not self._calls:
            self._idle.cancel()
            self._steps.watch(busy=True)
        call = RunningCall(run.members[0].call)
        self._calls[call.number] = call
        # The task inherits the context, and so the call.
        token = running.set(call)
        try:
            # Not by the loop's factory, which a kernel may have replaced.
            self._steps.task(self._loop, self._answer(call, run)).add_done_callback(self._check)
        finally:
            running.reset(token)

    def _check(self, task: "asyncio.Task[None]") -> None:
        """End the worker if a call has ended without an answer: the exit of the worker settles its calls."""
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is not None:
            self._fail(error)

    def _cancel(self, number: int) -> None:
        call = self._calls.get(number)
        if call is not None:
            call.cancelled = True
            if call.wants_result and call.task is not None:
                call.task.cancel()

    def _cancel_heard(self, calls: list[int], rounds: int) -> None:
        """Tell that calls are cancelled, once their tasks have seen it and could end."""
        if rounds:
            self._loop.call_soon(self._cancel_heard, calls, rounds - 1)
        else:
            self._send(frames.CancelHeard(calls))

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
        arrays = input_arrays(self._mapped, spec, run.members, run.left_out)
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
        """Write a reply: into the frame if it is small, else into a segment, which only the dispatcher can lend.

        Other calls go on meanwhile. They may write to an array that the kernel has returned and keeps, so such an array
        is copied first. They may not cancel this: its segment would be lent again while a thread writes to it.
        """
        if reply.size <= frames.MAX_INLINE_BYTES:
            inline = bytearray(reply.size)
            results = write(reply, inline, run.members)
            return frames.Done(results, taken, call.cpu_nanoseconds, bytes(inline))
        reply = own_copies(reply)
        wait = self._segments[call.number] = self._loop.create_future()
        self._send(frames.Wants(call.number))
        segment = await _uncancelled(wait)
        if segment == frames.NO_SEGMENT:
            raise ResourceExhausted("the replica cannot allocate shared memory for the reply")
        memory = self._mapped.reply(segment, reply.size)
        if reply.size <= _WRITTEN_AT_ONCE_BYTES:
            results = write(reply, memory, run.members)
        else:
            writing = self._loop.run_in_executor(self._writer, write, reply, memory, run.members)
            results = await _uncancelled(writing)
        return frames.Done(results, taken, call.cpu_nanoseconds)

    def _shrink(self, *, ran_short: bool) -> None:
        resident, data = self._allowance.shrink()
        self._send(frames.Shrunk(resident, data, ran_short))


async def _uncancelled(future: "asyncio.Future[Result]") -> Result:
    """Wait for a future to its end, even if a timer that a kernel has left cancels this task meanwhile."""
    while not future.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.shield(future)
    return future.result()


def _is_cancelled() -> bool:
    call = running.get()
    return call is not None and call.cancelled
