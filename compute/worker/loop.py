"""A worker: the child's whole life. It reads a Run, calls the kernel on views of the arena, writes the reply in place.

Nothing here knows gRPC, the event loop or metrics. One thread, one loop, blocking reads: whatever the kernel does with
the interpreter lock concerns this process alone.
"""

import contextlib
import fcntl
import os
import select
import signal
import socket
import struct
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate
from mmap import mmap
from typing import Any

import numpy as np

from unlatch import cancellation
from unlatch.common.errors import Cancelled, Internal, ResourceExhausted, UnlatchError, opaque
from unlatch.common.kernel.datatypes import OBJECT, is_served
from unlatch.common.kernel.spec import ANY_LENGTH, ELLIPSIS, ArraySpec, KernelSpec, one_by_one
from unlatch.common.kernel.tensors import Array, dtype_name, pack_bytes, view
from unlatch.compute.ipc import frames as wire
from unlatch.compute.ipc.arena import ALIGNMENT, Mapped, offsets
from unlatch.compute.ipc.memory_limits import Allowance
from unlatch.compute.worker import preload

_NICE = 10
# A worker that has had nothing to do for this long gives back the memory that it keeps for the next call.
_RESTS_AFTER_SECONDS = 3
# `struct timeval`
_AFTER_A_WHILE, _NEVER = (struct.pack("ll", seconds, 0) for seconds in (_RESTS_AFTER_SECONDS, 0))


def main(channel: socket.socket, front_alive: int, max_reply_bytes: int, memory_bytes: int) -> None:
    """Serve Runs until the front closes the channel. The target of a forkserver's child."""
    _become_worker(front_alive)
    if preload.failure:
        channel.send(wire.encode(wire.Misfit(preload.failure)))
        # The front ends this process. One that had ended by itself might be gone before the front has heard why.
        channel.recv(1)
        return
    kernels = preload.catalogue.specs.values()
    if memory_bytes or any(spec.memory_bytes for spec in kernels):
        _wake_blas()
    allowance = Allowance(memory_bytes)
    for spec in kernels:
        channel.send(wire.encode(wire.Loaded(spec)))
    channel.send(wire.encode(wire.Ready()))
    _give_way()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        _Worker(channel, max_reply_bytes, allowance).serve()


class _Worker:
    def __init__(self, channel: socket.socket, max_reply_bytes: int, allowance: Allowance) -> None:
        self._channel = channel
        self._max_reply_bytes = max_reply_bytes
        self._allowance = allowance
        self._ran_short = self._asked_to_shrink = False
        # Whether there is nothing to give back: no kernel has run since it was.
        self._rests = True
        self._mapped = Mapped()
        self._waiting: deque[wire.Run] = deque()
        self._cancelled: set[int] = set()
        self._running: Sequence[wire.Member] = ()
        # Held except while a kernel runs: none of its threads may take a frame that this loop waits for.
        self._asking = threading.Lock()
        self._asking.acquire()
        self._speech = select.poll()
        self._speech.register(channel, select.POLLIN)
        self._front_is_gone = False
        cancellation.asked_of = self._is_cancelled

    def serve(self) -> None:
        while (run := self._next()) is not None:
            if self._rests:
                self._rest(after=_AFTER_A_WHILE)
            self._channel.send(self._answer(run))
            if self._cancelled:
                # Runs come in order: what is left of cancels up to this one came too late.
                self._cancelled = {call for call in self._cancelled if call > run.members[-1].call}

    def _answer(self, run: wire.Run) -> bytes:
        """Run a Run, as far as anybody waits for it; the frame that answers it."""
        wanted = [member for member in run.members if member.call not in self._cancelled]
        answer = self._run(run, wanted) if wanted else _unbegun(run)
        frame = wire.encode(answer)
        if len(frame) > wire.FRAME_BYTES and isinstance(answer, wire.Done):
            # Many calls of many outputs: each by itself fits.
            error = ResourceExhausted(f"kernel {run.kernel} has more outputs than can be told of {len(wanted)} calls")
            return wire.encode(_failed(wanted[0], error, "", answer.run_nanoseconds))
        return frame

    def _next(self) -> wire.Run | None:
        """The next Run; None when the front is gone."""
        while True:
            self._shrink_if_due()
            if self._waiting or self._front_is_gone:
                break
            self._hear_one()
        # All that was said meanwhile too, since it may be that nobody waits for the call that is next.
        self._hear()
        return self._waiting.popleft() if self._waiting else None

    def _hear(self) -> None:
        """Take in what the front has said."""
        while not self._front_is_gone and self._speech.poll(0):
            self._hear_one()

    def _hear_one(self) -> None:
        """Wait until the front says something, and take it in; give memory back where it has nothing to say."""
        try:
            frame, fds, _, _ = socket.recv_fds(self._channel, wire.FRAME_BYTES, 1)
        except BlockingIOError:
            self._allowance.shrink()
            self._rest(after=_NEVER)
            return
        except ConnectionResetError:
            frame, fds = b"", []
        if not frame:
            self._front_is_gone = True
            return
        message = wire.decode_for_worker(frame)
        if isinstance(message, wire.Run):
            self._waiting.append(message)
        elif isinstance(message, wire.Learn):
            (self._mapped.learn_reply if message.writable else self._mapped.learn_input)(message.segment, fds[0])
        elif isinstance(message, wire.Cancel):
            self._cancelled.update(message.calls)
        elif isinstance(message, wire.Shrink):
            self._asked_to_shrink = True
        else:
            self._mapped.forget(message.inputs, message.replies)

    def _shrink_if_due(self) -> None:
        if not self._ran_short and not self._asked_to_shrink:
            return
        resident, data = self._allowance.shrink()
        self._channel.send(wire.encode(wire.Shrunk(resident, data, self._ran_short)))
        self._ran_short = self._asked_to_shrink = False

    def _rest(self, *, after: bytes) -> None:
        """How long the next reads wait for a frame: for ever once there is nothing more to give back."""
        self._channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, after)
        self._rests = after == _NEVER

    def _is_cancelled(self) -> bool:
        # Any of a kernel's threads may ask; one that another is ahead of has been asked for.
        if self._asking.acquire(blocking=False):
            try:
                self._hear()
            finally:
                self._asking.release()
        return self._front_is_gone or all(member.call in self._cancelled for member in self._running)

    def _run(self, run: wire.Run, members: Sequence[wire.Member]) -> wire.Done | wire.Failed:
        """Run the kernel once, for these members together."""
        started = time.perf_counter_ns()
        log = ""
        self._running = members
        self._asking.release()
        try:
            spec = preload.catalogue.specs[run.kernel]
            arrays = self._gathered(spec, members)
            with self._allowance.during(spec):
                outputs = _call(preload.catalogue.functions[run.kernel], spec, arrays, run.parameters)
            taken = time.perf_counter_ns() - started
            return wire.Done(self._write(spec, outputs, run.reply_segment, members), taken)
        except UnlatchError as expected:
            # What we say is wrong with a kernel is a reading of what it raised, which its author wants to see.
            log = _story(expected) if isinstance(expected, Internal) and expected.__cause__ else ""
            # A traceback holds frames, this one too, which holds the error: the run's arrays would outlive it.
            error = expected.with_traceback(None)
        except MemoryError:
            error = self._allowance.exceeded(preload.catalogue.specs[run.kernel])
            self._ran_short = True
        except BaseException as unexpected:  # noqa: BLE001 (a kernel may raise anything, and the worker goes on)
            error, identity = opaque(f"kernel {run.kernel} failed")
            log = f"{identity} {_story(unexpected)}"
        finally:
            self._asking.acquire()
        return _failed(members[0], error, log, time.perf_counter_ns() - started)

    def _gathered(self, spec: KernelSpec, members: Sequence[wire.Member]) -> list[Array]:
        """The kernel's arrays: views of one member's bytes, or several members' side by side."""
        sources = [self._mapped.input(member.segment) if member.segment >= 0 else b"" for member in members]
        columns = zip(*(member.tensors for member in members), strict=True)
        return [
            _side_by_side(array.name, sources, column) if len(column) > 1 else _view(array.name, sources[0], column[0])
            for array, column in zip(spec.inputs, columns, strict=True)
        ]

    def _write(
        self, spec: KernelSpec, outputs: list[Array], segment: int, members: Sequence[wire.Member]
    ) -> tuple[wire.Result, ...]:
        """Write what the kernel returned, each output once, and say where each member's rows of it lie."""
        rows = [member.tensors[0].shape[0] for member in members] if len(members) > 1 else []
        packed = [_packed(output, rows) for output in outputs]
        starts, size = offsets([ends[-1] for _, ends in packed])
        if size > self._max_reply_bytes:
            raise ResourceExhausted(
                f"kernel {spec.name} returned {size} bytes, more than max_reply_bytes={self._max_reply_bytes}"
            )
        memory = self._mapped.reply(segment, size)
        tensors: list[list[wire.Tensor]] = []
        for output, (content, ends), start in zip(outputs, packed, starts, strict=True):
            if isinstance(content, bytes):
                memory[start : start + len(content)] = content
            else:
                native = content.dtype.newbyteorder("=")
                np.copyto(np.ndarray(content.shape, native, memory, start), content)
            dtype, shapes = dtype_name(output), [(count, *output.shape[1:]) for count in rows] or [output.shape]
            tensors.append(
                [
                    wire.Tensor(dtype, shape, start + before, end - before)
                    for shape, before, end in zip(shapes, (0, *ends), ends, strict=False)
                ]
            )
        return tuple(
            wire.Result(member.call, own) for member, own in zip(members, zip(*tensors, strict=True), strict=True)
        )


def _view(name: str, memory: mmap | bytes, tensor: wire.Tensor) -> Array:
    return view(name, memory, tensor.dtype, tensor.shape, tensor.offset, tensor.length)


def _side_by_side(name: str, sources: Sequence[mmap | bytes], tensors: Sequence[wire.Tensor]) -> Array:
    """Tensors as one array along the first axis, as a tensor alone is: on an aligned boundary, and read-only."""
    first = tensors[0]
    if first.dtype == OBJECT:
        array = np.concatenate([_view(name, source, tensor) for source, tensor in zip(sources, tensors, strict=True)])
    else:
        # Their bytes one after the other are the whole's: no array is made of each.
        room = np.empty(sum(tensor.length for tensor in tensors) + ALIGNMENT, np.uint8)
        memory, start = room.data, -room.ctypes.data % ALIGNMENT
        at = start
        for source, tensor in zip(sources, tensors, strict=True):
            memory[at : (at := at + tensor.length)] = memoryview(source)[tensor.offset : tensor.offset + tensor.length]
        shape = (sum(tensor.shape[0] for tensor in tensors), *first.shape[1:])
        array = np.ndarray(shape, first.dtype, room, start)
    array.flags.writeable = False
    return array


def _packed(output: Array, rows: Sequence[int]) -> tuple[Array | bytes, list[int]]:
    """An output as it is written, and the byte at which each member's rows end; without rows, all are one member's."""
    until = list(accumulate(rows))
    if output.dtype.kind not in "OSU":
        each = output.nbytes // len(output) if rows and len(output) else 0
        return output, [count * each for count in until] or [output.nbytes]
    parts = [pack_bytes(part) for part in np.split(output, until[:-1])] if rows else [pack_bytes(output)]
    return b"".join(parts), list(accumulate(map(len, parts)))


def _unbegun(run: wire.Run) -> wire.Failed:
    return _failed(run.members[0], Cancelled(f"kernel {run.kernel} was not begun: nobody waits for it"), "", 0)


def _failed(member: wire.Member, error: UnlatchError, log: str, nanoseconds: int) -> wire.Failed:
    return wire.Failed(member.call, error.code, error.message, error.field, log, nanoseconds)


def _call(
    function: Callable[..., Any], spec: KernelSpec, arrays: list[Array], parameters: wire.Parameters
) -> list[Array]:
    try:
        result = function(*arrays, **parameters)
    except ValueError as error:
        if "read-only" in str(error):
            raise Internal(
                f"kernel {spec.name} writes to its input; inputs are read-only, so it must copy first"
            ) from error
        raise
    outputs = list(result) if isinstance(result, tuple) else [result]
    if len(outputs) != len(spec.outputs):
        raise Internal(f"kernel {spec.name} returned {len(outputs)} results, but declares {len(spec.outputs)}")
    lengths = _named_lengths(spec, arrays)
    return [_checked(spec, array, output, lengths) for array, output in zip(spec.outputs, outputs, strict=True)]


def _named_lengths(spec: KernelSpec, arrays: list[Array]) -> dict[str, int | tuple[int, ...]]:
    """What each axis name means in this call. The front has seen to it that they agree."""
    lengths: dict[str, int | tuple[int, ...]] = {}
    for declared, array in zip(spec.inputs, arrays, strict=True):
        dims, sizes, many, several = one_by_one(declared.dims, array.shape)
        lengths.update(zip(dims, sizes, strict=True))
        lengths[many] = tuple(several)
    for anything in (ANY_LENGTH, ELLIPSIS, ""):
        lengths.pop(anything, None)
    return lengths


def _checked(spec: KernelSpec, declared: ArraySpec, output: Any, lengths: dict[str, int | tuple[int, ...]]) -> Array:
    """An output that is what the kernel declares. Raises Internal: it is the kernel's fault, not the caller's."""
    if not isinstance(output, np.ndarray | np.generic):
        raise Internal(f"kernel {spec.name} returned a {type(output).__name__} for {declared.name}, not an array")
    array = np.asarray(output)
    if not is_served(dtype_name(array)):
        raise Internal(f"kernel {spec.name} returned {array.dtype} for {declared.name}, which no datatype carries")
    if declared.dtypes and dtype_name(array) not in declared.dtypes:
        raise Internal(
            f"kernel {spec.name} returned {array.dtype} for {declared.name}, "
            f"but declares {' or '.join(declared.dtypes)}"
        )
    dims, sizes, many, several = one_by_one(declared.dims, array.shape)
    fits = len(dims) == len(sizes) and lengths.get(many, tuple(several)) == tuple(several)
    if not fits or not all(
        size == (int(dim) if dim.isdecimal() else lengths.get(dim, size)) for dim, size in zip(dims, sizes, strict=True)
    ):
        raise Internal(
            f"kernel {spec.name} returned shape {array.shape} for {declared.name}, "
            f"but declares ({', '.join(declared.dims)})"
        )
    return array


def _story(error: BaseException) -> str:
    """A traceback that fits a frame; its end tells most."""
    story = "".join(traceback.format_exception(error))[-wire.FRAME_BYTES // 4 :]
    return story.encode(errors="replace").decode()


def _wake_blas() -> None:
    """Let BLAS have its threads and their buffers: where OpenBLAS is refused them later it ends the process."""
    square = np.zeros((128, 128))
    square @ square


def _become_worker(front_alive: int) -> None:
    # A process group of its own: a terminal's Ctrl-C is the front's business, and what a kernel starts ends with it.
    os.setpgid(0, 0)
    # The front alone holds the other end of this pipe. When the front is gone, however it went, the kernel sends SIGIO
    # to the group; its default action ends even a worker that is deep in C and holds the interpreter lock.
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    # Opened anew, since whom to signal belongs to the open file: on a shared one only the last worker would be told.
    own = os.open(f"/proc/self/fd/{front_alive}", os.O_RDONLY | os.O_NONBLOCK)
    os.close(front_alive)
    fcntl.fcntl(own, fcntl.F_SETOWN, -os.getpgid(0))
    fcntl.fcntl(own, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A kernel's prints belong in the log, and never on the protocol of whoever reads the service's stdout.
    os.dup2(2, 1)


def _give_way() -> None:
    """From now on the loops that feed the workers get the processor first: nobody waits for a start any more."""
    os.setpriority(os.PRIO_PROCESS, 0, _NICE)
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
