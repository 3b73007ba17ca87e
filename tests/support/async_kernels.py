"""`async def` kernels for the tests: each waits, reports what it sees, or misbehaves in one way."""

import asyncio
import os
import resource
import signal
import sys
import time
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64, Shaped

from unlatch import Bytes, KernelError, cancelled, kernel, setup, teardown

Vector = Float64[np.ndarray, "n"]
Number = Int64[np.ndarray, ""]

# The events of this process: what its hooks and kernels have seen.
_seen: list[str] = []
_running = 0
_shared: dict[int, np.ndarray[Any, Any]] = {}


class Scale(Enum):
    """A choice."""

    ONE = 1
    TEN = 10


class Pair(NamedTuple):
    """Two outputs."""

    twice: Vector
    names: Bytes[np.ndarray, "n"]


def note(record: str, what: str) -> None:
    """Add a line to a file, if one is named."""
    if record:
        with Path(record).open("a") as file:
            file.write(f"{what}\n")


def record_of_hooks() -> str:
    """Return the file that the environment names for the hooks."""
    return os.environ.get("HOOKS_RECORD", "")


@setup
async def connect() -> None:
    """Note that the loop runs, and fail if a test wants it."""
    await asyncio.sleep(0)
    if os.environ.get("HOOKS_FAIL"):
        raise ConnectionError("no such host")
    _seen.append("async setup")
    note(record_of_hooks(), f"async setup {os.getpid()}")


@setup
def configure() -> None:
    """Note that a plain setup ran, too."""
    _seen.append("plain setup")
    note(record_of_hooks(), f"plain setup {os.getpid()}")


@teardown
def forget() -> None:
    """Note that this ran at the end."""
    note(record_of_hooks(), f"plain teardown {os.getpid()}")


@teardown
async def disconnect() -> None:
    """Note that this ran at the end, on the loop."""
    await asyncio.sleep(0)
    note(record_of_hooks(), f"async teardown {os.getpid()}")


@kernel
def hooks_of_plain_worker() -> Bytes[np.ndarray, "n"]:
    """Return the setups that a plain worker has run."""
    return np.array(_seen, dtype=object)


@kernel
async def hooks_of_async_worker() -> Bytes[np.ndarray, "n"]:
    """Return the setups that an async worker has run."""
    return np.array(_seen, dtype=object)


@kernel
async def async_module_names() -> Bytes[np.ndarray, "names"]:
    """Return the names of all modules that the async worker has imported."""
    return np.array(sorted(sys.modules), dtype=object)


@kernel
async def async_pid() -> Number:
    """Return the pid of the async worker."""
    return np.array(os.getpid())


@kernel(pure=True)
async def waits(x: Vector, *, seconds: float = 0.01, record: str = "") -> Vector:
    """Wait, and double. Pure."""
    note(record, "begun")
    await asyncio.sleep(seconds)
    return x * 2


@kernel
async def waits_once(x: Vector, *, seconds: float = 0.01, record: str = "") -> Vector:
    """Wait, and treble. Not pure."""
    note(record, "begun")
    await asyncio.sleep(seconds)
    return x * 3


@kernel(pure=True)
async def pairs(x: Vector) -> Pair:
    """Return two outputs, one of them of byte strings."""
    await asyncio.sleep(0)
    return Pair(x * 2, np.array([str(value).encode() for value in x], dtype=object))


@kernel(pure=True)
async def returns(x: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """Return the input."""
    await asyncio.sleep(0)
    return x


@kernel(pure=True)
async def scaled(
    x: Vector, weights: Vector | None = None, *, by: Scale = Scale.ONE, add: tuple[float, ...] = ()
) -> Vector:
    """Scale the input, with all that a signature may have."""
    await asyncio.sleep(0)
    assert isinstance(by, Scale)
    assert isinstance(add, tuple)
    return x * by.value * (1.0 if weights is None else weights) + sum(add)


@kernel(concurrency=4)
async def at_most_four(*, seconds: float) -> Number:
    """Return how many calls of this kernel have run at once with this one."""
    global _running
    _running += 1
    most = 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        most = max(most, _running)
        await asyncio.sleep(0.005)
    _running -= 1
    return np.array(most)


@kernel
async def notices(*, record: str) -> Number:
    """Wait for ever, in tasks of its own. Note what a cancel does."""
    note(record, "begun")
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(3600))
            group.create_task(asyncio.sleep(3600))
    except asyncio.CancelledError:
        note(record, f"cancelled {cancelled()}")
        raise
    return np.array(0)


@kernel(pure=True)
async def swallows(*, record: str) -> Number:
    """Wait for ever, and go on when cancelled."""
    note(record, "begun")
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            note(record, "swallowed")


@kernel(pure=True)
async def blocks(*, seconds: float, record: str = "") -> Number:
    """Block the event loop."""
    note(record, "begun")
    time.sleep(seconds)  # noqa: ASYNC251 (this is the fault)
    return np.array(0)


@kernel
async def misbehaves(x: Vector, *, how: str) -> Vector:
    """Fail in one way."""
    await asyncio.sleep(0)
    match how:
        case "refuses":
            raise KernelError("x: wanted another vector")
        case "raises":
            raise LookupError("a secret of the server")
        case "cancels itself":
            raise asyncio.CancelledError
        case "exits":
            raise SystemExit(3)
        case "shape":
            return np.zeros(len(x) + 1)
        case "writes":
            x += 1
        case "nothing":
            return None  # type: ignore[return-value]
        case "memory":
            return np.ones(2**33)[: len(x)]
    return x


async def _exits() -> None:
    raise SystemExit(3)


@kernel(pure=True)
async def shares(x: Vector) -> Vector:
    """Return an array that all calls of this size share. No other call runs between the write and the return."""
    array = _shared.setdefault(len(x), np.empty(len(x)))
    await asyncio.sleep(0.01)
    array[:] = x
    return array


@kernel(pure=True)
async def leaves_a_timer(x: Vector, *, seconds: float) -> Vector:
    """Return a copy, and leave a timer that cancels the call's task later."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().call_later(seconds, task.cancel)
    await asyncio.sleep(0)
    return x + 0


@kernel
async def ends_the_loops_threads() -> Number:
    """End the threads of the event loop's executor."""
    await asyncio.get_running_loop().shutdown_default_executor()
    return np.array(0)


@kernel
async def opens_all_files(*, seconds: float) -> Number:
    """Leave no file descriptor free for a time."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    files = []
    try:
        while True:
            files.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        await asyncio.sleep(seconds)
    finally:
        for file in files:
            os.close(file)
    return np.array(len(files))


@kernel(pure=True)
async def dies(x: Vector, *, how: str, record: str = "") -> Vector:
    """End the process, each time."""
    note(record, "begun")
    await asyncio.sleep(0.05)
    if how == "exit":
        os._exit(3)
    if how == "child exits":
        child = asyncio.create_task(_exits())
        await asyncio.sleep(1)
        child.cancel()
    if how == "loop stops":
        asyncio.get_running_loop().stop()
        await asyncio.sleep(1)
    os.kill(os.getpid(), signal.SIGSEGV if how == "segfault" else signal.SIGKILL)
    return x


@kernel(pure=True, timeout=0.3)
async def limited(*, seconds: float) -> Number:
    """Wait, for longer than the kernel may run."""
    await asyncio.sleep(seconds)
    return np.array(0)
