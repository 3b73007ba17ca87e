"""The beginning and the end of a worker of any kind: what it says of itself, its hooks, and its memory limit.

Loaded… ──> setups ──> Ready ──> Serve is heard: the memory limit holds ──> it serves ──> End is heard: teardowns
               └ raises: Misfit
"""

import socket
import sys
from collections.abc import Callable
from typing import Any

from unlatch.compute.ipc import frames
from unlatch.compute.ipc.memory_limits import Allowance
from unlatch.compute.worker import preload
from unlatch.compute.worker.catalogue import LoadError, described
from unlatch.compute.worker.setup import start_blas_threads
from unlatch.declaration import place_of


def announce(channel: socket.socket) -> None:
    """Tell the dispatcher all kernels that this worker has loaded."""
    for spec in preload.catalogue.specs.values():
        channel.send(frames.encode(frames.Loaded(spec)))


def misfit(channel: socket.socket, why: frames.Misfit) -> None:
    """Tell the dispatcher why this worker cannot serve, and wait to be ended.

    If it ended by itself, it might be gone before the frame is read.
    """
    channel.send(frames.encode(why))
    channel.recv(1)


def run_hook(hook: Callable[[], Any]) -> Any:
    """Run a setup, or begin it if it is a coroutine function. Raises LoadError for whatever it raises."""
    try:
        return hook()
    except BaseException as error:
        raise failed_hook(hook, error) from error


def failed_hook(hook: Callable[[], Any], error: BaseException) -> LoadError:
    """Return the error of a hook that has raised, with the line of the author's own code."""
    return LoadError(f"{described(place_of(hook), error)} (in {getattr(hook, '__name__', 'a hook')})")


def run_teardown(hook: Callable[[], Any]) -> Any:
    """Run a teardown, or begin it if it is a coroutine function. What it raises goes to the log: the worker ends."""
    try:
        return run_hook(hook)
    except LoadError as error:
        tell_failed_teardown(error)
        return None


def tell_failed_teardown(error: LoadError) -> None:
    """Write to the log that a teardown has failed. A worker has no other log than stderr."""
    sys.stderr.write(f"teardown failed: {error}\n")


def served(frame: bytes) -> int | None:
    """Return the memory limit of the Serve frame, which is the first one; None if the dispatcher is gone."""
    if not frame:
        return None
    message = frames.decode_for_worker(frame)
    # A dispatcher that stops may end a worker that is just ready.
    return message.memory_bytes if isinstance(message, frames.Serve) else None


def allowed(memory_bytes: int) -> Allowance:
    """Limit this process's memory from now on."""
    if memory_bytes or any(spec.memory_bytes for spec in preload.catalogue.specs.values()):
        start_blas_threads()
    return Allowance(memory_bytes)
