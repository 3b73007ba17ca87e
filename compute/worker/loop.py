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
from unlatch.common.errors import Internal, UnlatchError, opaque
from unlatch.compute.ipc import frames
from unlatch.compute.ipc.arena import Mapped
from unlatch.compute.ipc.memory_limits import Allowance
from unlatch.compute.worker import preload
from unlatch.compute.worker.kernel_call import call_kernel, input_arrays
from unlatch.compute.worker.reply import encoded, failed, not_begun, traceback_text, write_outputs
from unlatch.compute.worker.setup import become_worker, give_way, seed_random_states, start_blas_threads

# After this idle time a worker returns the memory that it keeps for its next call.
_IDLE_SECONDS = 3
# Receive timeouts, as `struct timeval`. 0 waits without limit.
_UNTIL_IDLE, _WITHOUT_LIMIT = (struct.pack("ll", seconds, 0) for seconds in (_IDLE_SECONDS, 0))


def main(channel: socket.socket, dispatcher_alive: int, max_reply_bytes: int, memory_bytes: int) -> None:
    """Serve RunFrames until the dispatcher closes the channel.

    `dispatcher_alive` is the reading end of a pipe that breaks when the dispatcher ends.
    """
    become_worker(dispatcher_alive)
    seed_random_states()
    preload.grant_openmp()
    if preload.failure:
        channel.send(frames.encode(frames.Misfit(preload.failure)))
        # Wait for the dispatcher to end this process. If it ended by itself, it might be gone before the frame is read.
        channel.recv(1)
        return
    kernels = preload.catalogue.specs.values()
    if memory_bytes or any(spec.memory_bytes for spec in kernels):
        start_blas_threads()
    allowance = Allowance(memory_bytes)
    for spec in kernels:
        channel.send(frames.encode(frames.Loaded(spec)))
    channel.send(frames.encode(frames.Ready()))
    give_way()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        _Worker(channel, max_reply_bytes, allowance).serve()


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
        self._dispatcher_is_gone = False
        cancellation.asked_of = self._is_cancelled
        # A process that a kernel forks must not take this worker's frames.
        os.register_at_fork(after_in_child=partial(setattr, cancellation, "asked_of", bool))

    def serve(self) -> None:
        """Answer RunFrames until the dispatcher is gone."""
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
        """Wait for the next RunFrame and return it; None when the dispatcher is gone."""
        while True:
            self._shrink_if_due()
            if self._waiting or self._dispatcher_is_gone:
                break
            self._receive()
        # Read all other frames too, since one may cancel the next call.
        self._receive_all()
        return self._waiting.popleft() if self._waiting else None

    def _receive_all(self) -> None:
        """Handle all frames that have arrived, without waiting."""
        while not self._dispatcher_is_gone and self._incoming.poll(0):
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
            self._dispatcher_is_gone = True
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
        else:
            self._mapped.forget(message.inputs, message.replies)

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
        return self._dispatcher_is_gone or all(member.call in self._cancelled for member in self._running)

    def _run(self, run: frames.RunFrame, members: Sequence[frames.Member]) -> frames.Done | frames.Failed:
        """Run the kernel once, for these members (calls) together."""
        started = time.perf_counter_ns()
        log = ""
        self._running = members
        self._receiving.release()
        try:
            spec = preload.catalogue.specs[run.kernel]
            arrays = input_arrays(self._mapped, spec, members)
            with self._allowance.during(spec):
                outputs = call_kernel(preload.catalogue.functions[run.kernel], spec, arrays, run.parameters)
            taken = time.perf_counter_ns() - started
            results = write_outputs(self._mapped, spec, outputs, run.reply_segment, members, self._max_reply_bytes)
            return frames.Done(results, taken)
        except UnlatchError as expected:
            # An Internal error with a cause wraps the kernel's own exception. The kernel's author needs its traceback.
            log = traceback_text(expected) if isinstance(expected, Internal) and expected.__cause__ else ""
            # A traceback refers to frames, which refer to the error: the run's arrays would outlive the run.
            error = expected.with_traceback(None)
        except MemoryError:
            error = self._allowance.exceeded(preload.catalogue.specs[run.kernel])
            self._ran_short = True
        except BaseException as unexpected:  # noqa: BLE001 (a kernel may raise anything, and the worker goes on)
            error, identity = opaque(f"kernel {run.kernel} failed")
            log = f"{identity} {traceback_text(unexpected)}"
        finally:
            self._receiving.acquire()
        return failed(members[0], error, log, time.perf_counter_ns() - started)
