"""A worker's loop: read a RunFrame, call the kernel on views of the arena, send the reply; until the dispatcher ends.

    loop ── setup        become a worker, give way
         ── kernel_call  input arrays, the kernel, checks of its outputs
         ── reply        outputs written in place, or an error

A worker has no gRPC, event loop or metrics. One thread reads with blocking calls. A kernel that holds the interpreter
lock therefore blocks only its own worker.
"""

import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Sequence
from functools import partial

from unlatch import cancellation
from unlatch.common.errors import UnlatchError
from unlatch.compute.ipc import frames
from unlatch.compute.ipc.arena import Mapped
from unlatch.compute.ipc.memory_limits import Allowance
from unlatch.compute.worker import preload
from unlatch.compute.worker.beginning import allowed, announce, misfit, run_hook, run_teardown, served
from unlatch.compute.worker.catalogue import LoadError
from unlatch.compute.worker.kernel_call import call_kernel, input_arrays
from unlatch.compute.worker.reply import encoded, failed, not_begun, packed, told, write
from unlatch.compute.worker.setup import become_worker, give_way, seed_random_states
from unlatch.hooks import SETUPS, TEARDOWNS

# After this idle time a worker returns the memory that it keeps for its next call.
_IDLE_SECONDS = 3
# Receive timeouts, as `struct timeval`. 0 waits without limit.
_UNTIL_IDLE, _WITHOUT_LIMIT = (struct.pack("ll", seconds, 0) for seconds in (_IDLE_SECONDS, 0))


def main(channel: socket.socket, dispatcher_alive: int, kind: str, max_reply_bytes: int) -> None:
    """Serve RunFrames until the dispatcher ends this worker or closes the channel.

    `dispatcher_alive` is the reading end of a pipe that breaks when the dispatcher ends.
    """
    become_worker(dispatcher_alive)
    seed_random_states()
    preload.grant_openmp()
    if preload.failure:
        misfit(channel, frames.Misfit(preload.failure))
    elif kind == frames.ASYNC:
        from unlatch.compute.worker import async_loop

        async_loop.main(channel, max_reply_bytes)
    else:
        _main(channel, max_reply_bytes)


def _main(channel: socket.socket, max_reply_bytes: int) -> None:
    announce(channel)
    setups, teardowns = (preload.catalogue.hooks(which, of_async=False) for which in (SETUPS, TEARDOWNS))
    try:
        for hook in setups:
            run_hook(hook)
    except LoadError as error:
        misfit(channel, frames.Misfit(str(error), setup=True))
        return
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        channel.send(frames.encode(frames.Ready(bool(teardowns))))
        memory_bytes = served(channel.recv(frames.FRAME_BYTES))
        if memory_bytes is None:
            return
        allowance = allowed(memory_bytes)
        give_way()
        _Worker(channel, max_reply_bytes, allowance).serve()
        for hook in reversed(teardowns):
            run_teardown(hook)


class _Worker:
    """Answer RunFrames in order, one at a time. Meanwhile a kernel's threads may ask whether it is cancelled."""

    def __init__(self, channel: socket.socket, max_reply_bytes: int, allowance: Allowance) -> None:
        self._channel = channel
        self._max_reply_bytes = max_reply_bytes
        self._allowance = allowance
        self._ran_short = self._asked_to_shrink = False
        # True while there is no memory to return, because no kernel has run since memory was last returned.
        self._is_idle = True
        self._mapped = Mapped()
        self._waiting: deque[frames.RunFrame] = deque()
        self._cancelled: set[int] = set()
        self._running: Sequence[frames.Member] = ()
        # Held except while a kernel runs, so that none of its threads can take a frame that this loop waits for.
        self._receiving = threading.Lock()
        self._receiving.acquire()
        self._incoming = select.poll()
        self._incoming.register(channel, select.POLLIN)
        self._is_over = False
        cancellation.asked_of = self._is_cancelled
        # A process that a kernel forks must not take this worker's frames.
        os.register_at_fork(after_in_child=partial(setattr, cancellation, "asked_of", bool))

    def serve(self) -> None:
        """Answer RunFrames until the dispatcher ends this worker, or is gone."""
        while (run := self._next()) is not None:
            if self._is_idle:
                self._set_idle(idle=False)
            self._channel.send(self._answer(run))
            if self._cancelled:
                # RunFrames come in order, so cancels of calls up to this one came too late.
                self._cancelled = {call for call in self._cancelled if call > run.members[-1].call}

    def _answer(self, run: frames.RunFrame) -> bytes:
        """Run the calls (members) that are not cancelled; return the encoded frame that answers the RunFrame."""
        wanted = [member for member in run.members if member.call not in self._cancelled]
        return encoded(self._run(run, wanted) if wanted else not_begun(run), run, wanted)

    def _next(self) -> frames.RunFrame | None:
        """Wait for the next RunFrame and return it; None at the end."""
        while True:
            self._shrink_if_due()
            if self._waiting or self._is_over:
                break
            self._receive()
        # Read all other frames too, since one may cancel the next call.
        self._receive_all()
        return self._waiting.popleft() if self._waiting else None

    def _receive_all(self) -> None:
        """Handle all frames that have arrived, without waiting."""
        while not self._is_over and self._incoming.poll(0):
            self._receive()

    def _receive(self) -> None:
        """Wait for one frame and handle it. If none comes for a while, return memory to the system."""
        try:
            frame, fds, _, _ = socket.recv_fds(self._channel, frames.FRAME_BYTES, 1)
        except BlockingIOError:
            self._allowance.shrink()
            self._set_idle(idle=True)
            return
        except ConnectionResetError:
            frame, fds = b"", []
        if not frame:
            self._is_over = True
            return
        message = frames.decode_for_worker(frame)
        if isinstance(message, frames.RunFrame):
            self._waiting.append(message)
        elif isinstance(message, frames.Learn):
            (self._mapped.learn_reply if message.writable else self._mapped.learn_input)(message.segment, fds[0])
        elif isinstance(message, frames.Cancel):
            self._cancelled.update(message.calls)
        elif isinstance(message, frames.Shrink):
            self._asked_to_shrink = True
        elif isinstance(message, frames.Forget):
            self._mapped.forget(message.inputs, message.replies)
        else:
            # End: the dispatcher sends it once there is no run.
            self._is_over = True

    def _shrink_if_due(self) -> None:
        if not self._ran_short and not self._asked_to_shrink:
            return
        resident, data = self._allowance.shrink()
        self._channel.send(frames.encode(frames.Shrunk(resident, data, self._ran_short)))
        self._ran_short = self._asked_to_shrink = False

    def _set_idle(self, *, idle: bool) -> None:
        """Set how long reads wait for a frame: without limit once there is no more memory to return."""
        timeout = _WITHOUT_LIMIT if idle else _UNTIL_IDLE
        self._channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        self._is_idle = idle

    def _is_cancelled(self) -> bool:
        # Any of a kernel's threads may ask. If another thread is receiving, this one need not.
        if self._receiving.acquire(blocking=False):
            try:
                self._receive_all()
            finally:
                self._receiving.release()
        return self._is_over or all(member.call in self._cancelled for member in self._running)

    def _run(self, run: frames.RunFrame, members: Sequence[frames.Member]) -> frames.Done | frames.Failed:
        """Run the kernel once, for these members (calls) together."""
        started = time.perf_counter_ns()
        self._running = members
        self._receiving.release()
        log = ""
        try:
            spec = preload.catalogue.specs[run.kernel]
            arrays = input_arrays(self._mapped, spec, members, run.left_out)
            with self._allowance.during(spec):
                outputs = call_kernel(preload.catalogue.functions[run.kernel], spec, arrays, run.parameters)
            taken = time.perf_counter_ns() - started
            reply = packed(spec, outputs, members, self._max_reply_bytes)
            results = write(reply, self._mapped.reply(run.reply_segment, reply.size), members)
            return frames.Done(results, taken)
        except MemoryError:
            error: UnlatchError = self._allowance.exceeded(preload.catalogue.specs[run.kernel])
            self._ran_short = True
        except BaseException as raised:  # noqa: BLE001 (a kernel may raise anything, and the worker goes on)
            error, log = told(run.kernel, raised)
        finally:
            self._receiving.acquire()
        return failed(members[0], error, log, time.perf_counter_ns() - started)
