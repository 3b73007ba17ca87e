"""Kernels that no user should write: they die, hang, send false frames to the dispatcher and overwrite its memory.

A test paces them by gates. A gate is a named pipe that a kernel opens for reading. A test that opens it for writing
knows that the kernel has come that far.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64, Shaped

from unlatch import KernelError, cancelled, kernel
from unlatch.compute.ipc import frames as wire
from unlatch.compute.worker import loop as worker_module
from unlatch.compute.worker import preload
from unlatch.compute.worker import reply as reply_module

Vector = Float64[np.ndarray, "n"]
Matrix = Float64[np.ndarray, "rows cols"]
Scalar = Float64[np.ndarray, ""]

_EVER = 3600.0
# A file in this directory that is named after a way to die makes the next worker take the file and die in that way.
_AT_START = Path(os.environ.get("FAULTS_DIRECTORY", "/nonexistent"))


# Time.


@kernel
def echo(x: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """Return the input."""
    return x


@kernel
def waits(x: Vector, *, gate: str) -> Vector:
    """Write the worker's pid beside the gate, wait until the gate opens, and return the input."""
    _pass(gate)
    return x


@kernel(pure=True)
def doubles(x: Vector, *, seconds: float = 0.0, record: str = "") -> Vector:
    """Return twice the input after that long. Each run adds its first value to the record."""
    _leave(record, x)
    time.sleep(seconds)
    return x * 2.0


@kernel
def doubles_once(x: Vector, *, seconds: float = 0.0, record: str = "") -> Vector:
    """Do the same in a kernel that is not pure: no value should be in the record twice."""
    _leave(record, x)
    time.sleep(seconds)
    return x * 2.0


@kernel(pure=True)
def repeats_when(x: Vector, *, times: int, there: str, record: str) -> Float64[np.ndarray, "m"]:
    """Return the input this many times, once that file exists. Each run adds its pid and first value to the record."""
    Path(f"{record}.pid").write_text(str(os.getpid()))
    _leave(record, x)
    while not Path(there).exists():
        time.sleep(0.002)
    return np.tile(x, times)


@kernel(pure=True)
def stays_at_first(x: Vector, *, record: str) -> Vector:
    """Return twice the input. The first run never ends."""
    first = not Path(record).exists()
    _leave(record, x)
    if first:
        time.sleep(_EVER)
    return x * 2.0


@kernel
def burns(*, seconds: float) -> Scalar:
    """Use that much processor time, and return how much it was."""
    return np.array(_burn(seconds))


@kernel
def burns_and_dies(*, seconds: float, record: str) -> Scalar:
    """Use that much processor time, write down how much it was, and die by SIGKILL."""
    Path(record).write_text(repr(_burn(seconds)))
    os.kill(os.getpid(), signal.SIGKILL)
    return np.array(0.0)


@kernel
def half_busy(*, seconds: float, share: float) -> Scalar:
    """Keep a core busy for this share of this time by the clock."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        began, used = time.monotonic(), time.process_time()
        while time.process_time() - used < share * 0.02:
            pass
        time.sleep(max(0.0, began + 0.02 - time.monotonic()))
    return np.array(seconds)


@kernel
def dawdles(x: Vector, *, seconds: float) -> Vector:
    """Return the input after that long."""
    time.sleep(seconds)
    return x


@kernel
def waits_at_zero(x: Vector, *, gate: str) -> Vector:
    """Return the input; for 0, wait until the gate has opened."""
    if x[0] == 0:
        _pass(gate)
    return x


@kernel
def garbles(x: Vector) -> Shaped[np.ndarray, "n"]:
    """Return strings whose bytes, by a fault of the worker, are not valid UTF-8."""
    names = vars(reply_module)
    packed = names["pack_bytes"]

    def garbled(_: object) -> bytes:
        names["pack_bytes"] = packed
        return b"\xff" * 8

    names["pack_bytes"] = garbled
    return np.array(["a"] * len(x))


class Twins(NamedTuple):
    """Two outputs by name."""

    double: Vector
    length: Int64[np.ndarray, ""]


@kernel
def twins(x: Vector) -> Twins:
    """Return two named outputs."""
    return Twins(double=x * 2, length=np.array(len(x)))


# Deaths. Ways that leave the process alive wait for what the dispatcher does.


@kernel
def dies(x: Vector, *, how: str, gate: str = "") -> Vector:
    """Die, or misbehave, in one of the ways below, once the gate opens if there is one."""
    run = _local("run")
    _pass(gate)
    _WAYS[how](run.members[0].call)
    time.sleep(_EVER)
    return x


@kernel
def lies(x: Vector, *, how: str, gate: str) -> Vector:
    """Misbehave in one of the ways below that leave the worker alive, and then go on normally."""
    run = _local("run")
    _pass(gate)
    _WAYS[how](run.members[0].call)
    return x


@kernel
def dies_replying(x: Vector, *, how: str, gate: str = "") -> Vector:
    """Die when half of the answer is written."""
    run, mapped = _local("run"), _worker()._mapped
    reply = mapped.reply

    def half(segment: int, size: int) -> mmap.mmap:
        memory: mmap.mmap = reply(segment, size)
        memory[: size // 2] = bytes(size // 2)
        _pass(gate)
        _WAYS[how](run.members[0].call)
        time.sleep(_EVER)
        return memory

    mapped.reply = half
    return x


@kernel(pure=True)
def dies_at_first(x: Vector, *, record: str, times: int = 1, how: str = "sigkill") -> Vector:
    """Die this many times, as counted in the record, and then answer."""
    path = Path(record)
    died = len(path.read_bytes()) if path.exists() else 0
    if died < times:
        path.write_bytes(bytes(died + 1))
        _WAYS[how](_local("run").members[0].call)
        time.sleep(_EVER)
    return x


@kernel
def dies_while(x: Vector, *, record: str) -> Vector:
    """Die while that file exists."""
    if Path(record).exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return x


# Calls whose callers leave.


@kernel
def spins(*, seconds: float, record: str = "") -> Scalar:
    """Loop in pure Python without asking whether the caller has left; write down that the loop has begun."""
    if record:
        Path(record).write_text(str(os.getpid()))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    return np.array(seconds)


@kernel
def lingers(x: Vector, *, seconds: float) -> Vector:
    """Return the input after that long, or as soon as the caller has left."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not cancelled():
        time.sleep(0.005)
    return x


@kernel
def lingers_as_told(x: Vector) -> Vector:
    """Return the input after as many seconds as its first value says, or as soon as the caller has left."""
    return lingers(x, seconds=float(x[0]))


@kernel
def notices(*, seconds: float, record: str) -> Scalar:
    """Loop in pure Python, and ask only now and then; write down that the caller had left."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if cancelled():
            Path(record).write_text("noticed")
            break
    return np.array(seconds)


@kernel(timeout=0.5)
def timed(*, seconds: float) -> Scalar:
    """Loop. The kernel's timeout is half a second."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    return np.array(seconds)


@kernel
def dies_idle(x: Vector, *, how: str, gate: str) -> Vector:
    """Answer, and die once the gate opens."""

    def later() -> None:
        _pass(gate)
        _WAYS[how](0)

    _worker()  # The thread is found here: later it has other frames.
    threading.Thread(target=later, daemon=True).start()
    return x


@kernel
def leaves_child(x: Vector, *, record: str, how: str = "") -> Vector:
    """Start a process that outlives the call and has all its files; write down its pid; then die, if wanted."""
    child = os.fork()
    if child == 0:
        time.sleep(_EVER)
        os._exit(0)
    Path(record).write_text(str(child))
    if how:
        _WAYS[how](0)
    return x


@kernel
def hangs(x: Vector, *, how: str, record: str) -> Vector:
    """Write down the worker's pid, and then never return from C, with the interpreter lock held."""
    started = Path(record)
    started.with_suffix(".new").write_text(str(os.getpid()))
    started.with_suffix(".new").rename(started)
    if how == "sleep":
        ctypes.PyDLL(None).sleep(int(_EVER))
    elif how == "power":
        pow(3, 10**9)
    elif how == "regex":
        re.match(r"(a+)+$", "a" * 60 + "b")
    return x


@kernel
def leaves_thread(x: Vector, *, gate: str) -> Vector:
    """Start a thread that outlives the call, keeps a core busy and its process from ending until the gate opens."""
    passed = threading.Event()

    def spin() -> None:
        while not passed.is_set():
            pass

    def wait() -> None:
        _pass(gate)
        passed.set()

    for target in (spin, wait):
        threading.Thread(target=target).start()
    return x


@kernel
def prints(x: Vector, *, megabytes: int, record: str = "") -> Vector:
    """Say so in a file, and then write this much to stdout and to stderr."""
    if record:
        Path(record).touch()
    for _ in range(megabytes):
        for stream in (1, 2):
            for _ in range(64):
                os.write(stream, b"." * (1 << 14) + b"\n")
    return x


def _leave(record: str, x: Vector) -> None:
    if record:
        line = f"{float(x[0])!r}\n".encode()
        fd = os.open(record, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, line)
        os.close(fd)


def _burn(seconds: float) -> float:
    began = time.process_time()
    while time.process_time() - began < seconds:
        pass
    return time.process_time() - began


def _pass(gate: str) -> None:
    if gate:
        Path(f"{gate}.pid").write_text(str(os.getpid()))
        with open(gate, "rb") as opened:
            opened.read(1)


_found: Any = None


def _worker() -> Any:
    """Find the object that serves this worker's calls."""
    global _found
    _found = _found or _local("self", lambda value: hasattr(value, "_channel"))
    return _found


def _end_this_thread() -> None:
    """End the main thread alone, unseen by Python, while another thread goes on."""
    threading.Thread(target=time.sleep, args=(_EVER,)).start()
    exit_of_one_thread = {"x86_64": 60, "aarch64": 93}[os.uname().machine]
    ctypes.CDLL(None).syscall(exit_of_one_thread, 0)


def _local(name: str, fits: Callable[[Any], bool] = lambda value: isinstance(value, wire.RunFrame)) -> Any:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        value = frame.f_locals.get(name)
        if value is not None and fits(value):
            return value
        frame = frame.f_back
    raise LookupError(name)


def _send(frame: Any) -> None:
    _worker()._channel.send(frame if isinstance(frame, bytes) else wire.encode(frame))


def _done(call: int, *tensors: tuple[Any, ...], nanoseconds: int = 1) -> list[Any]:
    """Make a Done frame as it is on the wire, right or wrong."""
    return ["done", [[call, [list(tensor) for tensor in tensors]]], nanoseconds]


def _grow(size: int, segment: int | None = None) -> None:
    replies = _worker()._mapped._replies
    number = next(iter(replies)) if segment is None else segment
    fd, _ = replies[number]
    os.ftruncate(fd, size)
    # Only the size is wrong: the whole segment could not be mapped.
    replies[number] = fd, mmap.mmap(fd, 1 << 24)


def _claim_grown(call: int, claimed: int, size: int) -> None:
    _grow(size)
    _send(_done(call, ("float64", (claimed // 8,), 0, claimed)))


_GOOD = ("float64", (1,), 0, 8)

_WAYS: dict[str, Callable[[int], Any]] = {
    "sigkill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "sigsegv": lambda _: ctypes.string_at(0),
    "sigbus": lambda _: os.kill(os.getpid(), signal.SIGBUS),
    "exit": lambda _: os._exit(3),
    "real-time signal": lambda _: os.kill(os.getpid(), 35),
    "abort": lambda _: ctypes.CDLL(None).abort(),
    "stops": lambda _: os.kill(os.getpid(), signal.SIGSTOP),
    "main thread ends": lambda _: _end_this_thread(),
    "waits": lambda _: _pass(str(_AT_START / "gate")),
    "hangs": lambda _: ctypes.PyDLL(None).sleep(int(_EVER)),
    "forkserver": lambda _: os.kill(os.getppid(), signal.SIGKILL),
    "closes": lambda _: _worker()._channel.shutdown(socket.SHUT_RDWR),
    "garbage": lambda _: _send(b"\xc1" + os.urandom(1000)),
    "empty map": lambda _: _send(b"\x80"),
    "unknown frame": lambda _: _send(["nonsense", 1]),
    "other call": lambda call: _send(_done(call + 999, _GOOD)),
    "no output": lambda call: _send(_done(call)),
    "too many outputs": lambda call: _send(_done(call, _GOOD, _GOOD)),
    "outside": lambda call: _send(_done(call, ("float64", (1,), 1 << 40, 8))),
    "before": lambda call: _send(_done(call, ("float64", (1,), -8, 8))),
    "longer than segment": lambda call: _send(_done(call, ("float64", (1 << 40,), 0, 1 << 43))),
    "negative length": lambda call: _send(_done(call, ("float64", (1,), 0, -8))),
    "offsets overflow": lambda call: _send(_done(call, ("float64", (1,), (1 << 64) - 8, 8))),
    "unserved dtype": lambda call: _send(_done(call, ("float128", (1,), 0, 16))),
    "shape disagrees": lambda call: _send(_done(call, ("float64", (5,), 0, 8))),
    "negative shape": lambda call: _send(_done(call, ("float64", (-1, -1), 0, 8))),
    "endless shape": lambda call: _send(_done(call, ("float64", ((1 << 64) - 1,), 0, 8))),
    "negative time": lambda call: _send(_done(call, _GOOD, nanoseconds=-(1 << 62))),
    "endless time": lambda call: _send(_done(call, _GOOD, nanoseconds=(1 << 64) - 1)),
    "negative code": lambda call: _send(["failed", call, -1, "", "", "", 1]),
    "endless code": lambda call: _send(["failed", call, 1 << 40, "", "", "", 1]),
    "code of success": lambda call: _send(["failed", call, 0, "", "", "", 1]),
    "another misfit": lambda _: _send(["misfit", "no"]),
    "another start": lambda _: _send(["ready"]),
    "another kernel": lambda _: _send(wire.encode(wire.Loaded(preload.catalogue.specs["echo"]))),
    "grown beyond memory": lambda call: _claim_grown(call, 1 << 46, 1 << 50),
    "grown beyond limit": lambda call: _claim_grown(call, 1 << 30, 1 << 40),
}


# Attempts of a worker on the memory that it shares with the dispatcher.


@kernel
def tampers(x: Vector, *, how: str) -> Shaped[np.ndarray, ""]:
    """Try one of them; return the name of the error that stopped it, or "done"."""
    try:
        _ATTEMPTS[how](_worker()._mapped)
    except OSError as error:
        return np.array(errno.errorcode[error.errno or 0])
    return np.array("done")


def _input_fd(_: Any) -> int:
    """Open a descriptor of an input segment anew for reading and writing."""
    for number in os.listdir("/proc/self/fd"):
        try:
            if "unlatch-input" in os.readlink(f"/proc/self/fd/{number}"):
                return os.open(f"/proc/self/fd/{number}", os.O_RDWR)
        except FileNotFoundError:
            continue
    raise LookupError("no input segment")


def _reply_fd(mapped: Any) -> int:
    fd, _ = next(iter(mapped._replies.values()))
    return int(fd)


def _unprotect(mapped: Any) -> None:
    memory = next(iter(mapped._inputs.values()))
    address = np.frombuffer(memory, np.uint8).ctypes.data
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(len(memory)), mmap.PROT_READ | mmap.PROT_WRITE):
        raise OSError(ctypes.get_errno(), "mprotect")


def _punch(fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    keep_size, punch_hole = 1, 2
    if libc.fallocate(fd, keep_size | punch_hole, ctypes.c_long(0), ctypes.c_long(4096)):
        raise OSError(ctypes.get_errno(), "fallocate")


_ATTEMPTS: dict[str, Callable[[Any], Any]] = {
    "truncate input": lambda mapped: os.ftruncate(_input_fd(mapped), 0),
    "grow input": lambda mapped: os.ftruncate(_input_fd(mapped), 1 << 40),
    "write input": lambda mapped: os.pwrite(_input_fd(mapped), b"x" * 4096, 0),
    "punch input": lambda mapped: _punch(_input_fd(mapped)),
    "map input": lambda mapped: mmap.mmap(_input_fd(mapped), 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE),
    "unprotect input": _unprotect,
    "seal input": lambda mapped: fcntl.fcntl(_input_fd(mapped), fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
    "truncate reply": lambda mapped: os.ftruncate(_reply_fd(mapped), 0),
    "shorten reply": lambda mapped: os.ftruncate(_reply_fd(mapped), 4096),
    "write-seal reply": lambda mapped: fcntl.fcntl(_reply_fd(mapped), fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
}


@kernel
def scribbles(*, megabytes: int, seconds: float) -> Float64[np.ndarray, "n"]:
    """Return ones. For a while after the answer a thread writes noise over the whole of every reply segment."""
    mapped = _worker()._mapped

    def scribble() -> None:
        noise = os.urandom(4096)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for _, memory in list(mapped._replies.values()):
                for at in range(0, len(memory) - len(noise), len(noise)):
                    memory[at : at + len(noise)] = noise

    threading.Thread(target=scribble, daemon=True).start()
    return np.ones(megabytes << 17)


@kernel
def grows(x: Vector, *, size: int) -> Vector:
    """Enlarge the reply segment to this size before the answer is written to it."""
    _grow(size, _local("run").reply_segment)
    return x


# Calls that run as one. Each returns, row by row, how many rows its run had.

Rows = Float64[np.ndarray, "rows n"]
Seen = Int64[np.ndarray, "rows"]


class Together(NamedTuple):
    """A result, and beside each row the number of the run's rows."""

    y: Rows
    seen: Seen


class Mixed(NamedTuple):
    """Two arrays as they came, and beside each row the number of the run's rows."""

    a: Shaped[np.ndarray, "rows ..."]
    b: Shaped[np.ndarray, "rows *more"]
    seen: Seen


def _seen(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.full(len(x), len(x))


@kernel(pure=True, batch=True, max_batch_size=4096)
def scaled(x: Rows, *, factor: float = 1.0, label: str = "") -> Together:
    """Multiply each row by a factor."""
    return Together(x * factor, _seen(x))


@kernel(pure=True, batch=True, max_batch_size=4096)
def rescaled(x: Rows, *, factor: float = 1.0) -> Together:
    """Do the same under another name."""
    return Together(x * factor, _seen(x))


@kernel(pure=True)
def scaled_alone(x: Rows, *, factor: float = 1.0) -> Together:
    """Do the same in a kernel whose calls never run as one."""
    return Together(x * factor, _seen(x))


@kernel(pure=True, batch=True, max_batch_size=8)
def scaled_by_eight(x: Rows, *, factor: float = 1.0) -> Together:
    """Do the same for at most eight rows at a time."""
    return Together(x * factor, _seen(x))


@kernel(batch=True, max_batch_size=4096)
def mixed(a: Shaped[np.ndarray, "rows ..."], b: Shaped[np.ndarray, "rows *more"]) -> Mixed:
    """Return the input, of any dtype."""
    return Mixed(a, b, _seen(a))


@kernel(batch=True)
def addresses(x: Rows) -> Int64[np.ndarray, "rows 3"]:
    """Return each row's address modulo 64, whether it can be written to, and the number of the run's rows."""
    return np.full((len(x), 3), [x.ctypes.data % 64, x.flags.writeable, len(x)])


@kernel(batch=True, max_batch_size=4096)
def stretched(x: Float64[np.ndarray, "rows"], *, length: int) -> Float64[np.ndarray, "rows length"]:
    """Repeat each number this many times."""
    return np.repeat(x[:, None], length, axis=1)


@kernel(batch=True, max_batch_size=4096)
def picky(x: Rows) -> Together:
    """Refuse numbers below zero, each in another way."""
    worst = x.min(initial=0.0)
    if worst == -1:
        raise KernelError(f"no {x[x < 0][0]:g} please")
    if worst == -2:
        raise ValueError("a secret of the server")
    if worst == -3:
        raise MemoryError
    if worst == -4:
        return Together(x[1:], _seen(x))
    if worst == -5:
        return Together(x.astype("f4"), _seen(x))
    if worst == -6:
        sys.exit(3)
    if worst == -7:
        x += 1
    return Together(x, _seen(x))


@kernel(pure=True, batch=True, timeout=1.5)
def slow(x: Rows) -> Together:
    """Take three tenths of a second for each row."""
    time.sleep(0.3 * len(x))
    return Together(x, _seen(x))


@kernel(batch=True, max_batch_size=4096)
def deadly(x: Rows) -> Together:
    """Die of numbers below zero."""
    if (x < 0).any():
        os.kill(os.getpid(), signal.SIGKILL)
    return Together(x, _seen(x))


@kernel(pure=True, batch=True, max_batch_size=4096)
def deadly_pure(x: Rows) -> Together:
    """Die of numbers below zero, in a pure kernel."""
    return deadly(x)


@kernel(batch=True, max_batch_size=4096)
def waits_together(x: Rows, *, gate: str, record: str = "") -> Together:
    """Wait until the gate opens, and then write down whether all callers have left."""
    _pass(gate)
    if record:
        Path(record).write_text(str(cancelled()))
    return Together(x, _seen(x))


@kernel(batch=True)
def stays_until_left(x: Rows, *, record: str) -> Together:
    """Write down that it runs, and then that all callers have left, as soon as they have."""
    Path(record).write_text("runs")
    while not cancelled():
        time.sleep(0.001)
    Path(record).write_text("left")
    return Together(x, _seen(x))


@kernel(batch=True)
def spins_together(x: Rows, *, record: str) -> Together:
    """Loop in pure Python without asking whether callers have left; write down the number of rows."""
    Path(record).write_text(str(len(x)))
    while True:
        pass


@kernel(batch=True, timeout=0.5)
def timed_together(x: Rows) -> Together:
    """Loop without end if a number is below zero. The kernel's timeout is less than a third of a second."""
    while (x < 0).any():
        pass
    return Together(x, _seen(x))


@kernel(pure=True, batch=True, timeout=0.5)
def timed_pure(x: Rows) -> Together:
    """Do the same in a pure kernel."""
    return timed_together(x)


@contextmanager
def _dispatcher_stopped() -> Iterator[None]:
    """Keep the dispatcher from acting on one of several frames before the next one is sent."""
    dispatcher = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[1]
    os.kill(int(dispatcher), signal.SIGSTOP)
    try:
        while Path(f"/proc/{dispatcher}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.001)
        yield
    finally:
        os.kill(int(dispatcher), signal.SIGCONT)


@kernel(batch=True)
def lies_together(x: Float64[np.ndarray, "rows"], *, how: str) -> Float64[np.ndarray, "rows"]:
    """Answer for several calls with a false frame, in one of the ways below."""
    calls = [member.call for member in _local("run").members]
    if len(calls) > 1:
        with _dispatcher_stopped():
            for frame in _LIES_TOGETHER[how](calls):
                _send(frame)
        time.sleep(_EVER)
    return x


def _all_done(calls: list[int]) -> list[Any]:
    return ["done", [[call, [list(_GOOD)]] for call in calls], 1]


_FAILURE = (3, "", "", "", 1)

_LIES_TOGETHER: dict[str, Callable[[list[int]], Any]] = {
    "twice": lambda calls: [_all_done([*calls, calls[0]])],
    "one in another's place": lambda calls: [_all_done([*calls[1:], calls[1]])],
    "of the next run": lambda calls: [_all_done([*calls[1:], calls[-1] + 1])],
    "some": lambda calls: [_all_done(calls[:1])],
    "one by one": lambda calls: [_all_done([call]) for call in calls],
    "more": lambda calls: [_all_done([*calls, calls[-1] + 999])],
    "none": lambda _: [["done", [], 1]],
    "one is no array": lambda calls: [["done", [[calls[0], []], *_all_done(calls[1:])[1]], 1]],
    "done after failed": lambda calls: [["failed", calls[0], *_FAILURE], _all_done(calls)],
    "failed twice": lambda calls: [["failed", call, *_FAILURE] for call in calls],
    "failed after done": lambda calls: [_all_done(calls), ["failed", calls[0], *_FAILURE]],
    "another call failed": lambda calls: [["failed", calls[-1] + 999, *_FAILURE]],
}


# Starts of workers.


def _at_start() -> None:
    """Die in the forkserver's new child, if a test wants that."""
    for way in sorted(_AT_START.glob("*.start")) if _AT_START.is_dir() else ():
        try:
            way.unlink()
        except FileNotFoundError:
            continue
        how = way.name.partition(".")[0]
        if how in _BEGINNINGS:
            worker_module.main = _misbegin(how)
        else:
            _WAYS[how](0)
        return


# False frames on the socket of a worker, which then waits.
_BEGINNINGS: dict[str, Callable[[Any], Any]] = {
    "silent": lambda _: None,
    "closes": lambda channel: channel.close(),
    "garbage": lambda channel: channel.send(b"\xc1garbage"),
    "empty map": lambda channel: channel.send(b"\x80"),
    "unknown frame": lambda channel: channel.send(wire.encode(["nonsense", 1])),
    "other call": lambda channel: channel.send(wire.encode(_done(999, _GOOD))),
}


def _misbegin(how: str) -> Callable[..., None]:
    def main(channel: Any, *_: Any) -> None:
        os.setpgid(0, 0)
        _BEGINNINGS[how](channel)
        time.sleep(_EVER)

    return main


def _at_fork() -> None:
    """End the forkserver when it has a new child and has not reported it yet, if a test wants that."""
    wanted = _AT_START / "forkserver.fork"
    if wanted.exists():
        wanted.unlink()
        os.kill(os.getpid(), signal.SIGKILL)


os.register_at_fork(after_in_child=_at_start, after_in_parent=_at_fork)
