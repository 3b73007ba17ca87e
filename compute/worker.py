"""A worker: the child's whole life. It reads a Run, calls the kernel on views of the arena, writes the reply in place.

Nothing here knows gRPC, the event loop or metrics. One thread, one loop, blocking reads: whatever the kernel does with
the interpreter lock concerns this process alone.
"""

import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

from common.datatypes import is_served
from common.errors import Internal, ResourceExhausted, UnlatchError, opaque
from common.spec import ANY_LENGTH, ELLIPSIS, ArraySpec, KernelSpec
from common.tensors import Array, dtype_name, pack_bytes, view
from compute import preload, wire
from compute.arena import Mapped, offsets

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
# Larger allocations than this still come from mmap and go back to the kernel when freed.
_KEPT_BYTES = 512 * 1024 * 1024
_TOP_PAD_BYTES = 64 * 1024 * 1024
_NICE = 10


def main(channel: socket.socket, front_alive: int, max_reply_bytes: int) -> None:
    """Serve Runs until the front closes the channel. The target of a forkserver's child."""
    _become_worker(front_alive)
    if preload.failure:
        channel.send(wire.encode(wire.Misfit(preload.failure)))
        # The front ends this process. One that had ended by itself might be gone before the front has heard why.
        channel.recv(1)
        return
    for spec in preload.catalogue.specs.values():
        channel.send(wire.encode(wire.Loaded(spec)))
    channel.send(wire.encode(wire.Ready()))
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        _Worker(channel, max_reply_bytes).serve()


class _Worker:
    def __init__(self, channel: socket.socket, max_reply_bytes: int) -> None:
        self._channel = channel
        self._max_reply_bytes = max_reply_bytes
        self._mapped = Mapped()

    def serve(self) -> None:
        while True:
            frame, descriptors, _, _ = socket.recv_fds(self._channel, wire.FRAME_BYTES, wire.MOST_DESCRIPTORS)
            if not frame:
                return
            message = wire.decode_for_worker(frame)
            if isinstance(message, wire.Forget):
                self._mapped.forget(message.inputs, message.replies)
                continue
            if descriptors:
                self._learn(message, descriptors)
            self._channel.send(wire.encode(self._run(message)))

    def _learn(self, run: wire.Run, descriptors: list[int]) -> None:
        if run.input_is_new:
            self._mapped.learn_input(run.input_segment, descriptors.pop(0))
        if run.reply_is_new:
            self._mapped.learn_reply(run.reply_segment, descriptors.pop(0))

    def _run(self, run: wire.Run) -> wire.Done | wire.Failed:
        started = time.perf_counter_ns()
        log = ""
        try:
            spec = preload.catalogue.specs[run.kernel]
            arrays = self._arrays(spec, run)
            outputs = _call(preload.catalogue.functions[run.kernel], spec, arrays, run.parameters)
            taken = time.perf_counter_ns() - started
            return wire.Done(run.call, self._write(spec, outputs, run.reply_segment), taken)
        except UnlatchError as expected:
            error = expected
        except MemoryError:
            error = ResourceExhausted(f"kernel {run.kernel} needed more memory than its worker may have")
        except BaseException as unexpected:  # noqa: BLE001 (a kernel may raise anything, and the worker goes on)
            error, identity = opaque(f"kernel {run.kernel} failed")
            log = f"{identity} {_story(unexpected)}"
        taken = time.perf_counter_ns() - started
        return wire.Failed(run.call, error.code, error.message, error.field, log, taken)

    def _arrays(self, spec: KernelSpec, run: wire.Run) -> list[Array]:
        memory = self._mapped.input(run.input_segment) if run.input_segment >= 0 else b""
        return [
            view(array.name, memory, tensor.dtype, tensor.shape, tensor.offset, tensor.length)
            for array, tensor in zip(spec.inputs, run.tensors, strict=True)
        ]

    def _write(self, spec: KernelSpec, outputs: list[Array], segment: int) -> tuple[wire.Tensor, ...]:
        packed = [pack_bytes(output) if output.dtype.kind in "OSU" else output for output in outputs]
        lengths = [len(output) if isinstance(output, bytes) else output.nbytes for output in packed]
        starts, size = offsets(lengths)
        if size > self._max_reply_bytes:
            raise ResourceExhausted(
                f"kernel {spec.name} returned {size} bytes, more than max_reply_bytes={self._max_reply_bytes}"
            )
        memory = self._mapped.reply(segment, size)
        for output, start in zip(packed, starts, strict=True):
            if isinstance(output, bytes):
                memory[start : start + len(output)] = output
            else:
                native = output.dtype.newbyteorder("=")
                np.copyto(np.ndarray(output.shape, native, memory, start), output)
        return tuple(
            wire.Tensor(dtype_name(output), output.shape, start, length)
            for output, start, length in zip(outputs, starts, lengths, strict=True)
        )


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


def _named_lengths(spec: KernelSpec, arrays: list[Array]) -> dict[str, int]:
    """What each axis name means in this call. The front has seen to it that they agree."""
    lengths: dict[str, int] = {}
    for declared, array in zip(spec.inputs, arrays, strict=True):
        lengths.update(zip(*_axes(declared, array.shape), strict=True))
    lengths.pop(ANY_LENGTH, None)
    return lengths


def _axes(declared: ArraySpec, shape: tuple[int, ...]) -> tuple[list[str], list[int]]:
    """Declared axes and their lengths, without those that stand for any number of axes."""
    dims = declared.dims
    for index, dim in enumerate(dims):
        if dim == ELLIPSIS or dim.startswith("*"):
            after = len(dims) - index - 1
            return [*dims[:index], *dims[index + 1 :]], [*shape[:index], *shape[len(shape) - after :]]
    return list(dims), list(shape)


def _checked(spec: KernelSpec, declared: ArraySpec, output: Any, lengths: dict[str, int]) -> Array:
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
    dims, sizes = _axes(declared, array.shape)
    if len(dims) != len(sizes) or not all(
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
    # The loops that feed the workers get the processor first.
    os.setpriority(os.PRIO_PROCESS, 0, _NICE)
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Have glibc keep what NumPy frees: else every temporary is given back to the kernel and faulted in again."""
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    mallopt(_M_TOP_PAD, _TOP_PAD_BYTES)
