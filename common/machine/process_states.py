"""States of processes on this machine, as the system reports them: running, waiting, or stopped by a signal.

A process is named to others by its number, which counts only within one PID namespace, until the machine starts anew.
"""

import os
from functools import cache
from pathlib import Path

from unlatch.protos.unlatch_pb2 import Process

RUNNABLE, STOPPED, TRACED, ENDED = b"R", b"T", b"t", b"Z"
# As far as the state in proc_pid_stat(5): a number and a name of at most 64 bytes come before it.
_HEAD_BYTES = 128
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PID_NAMESPACE = Path("/proc/self/ns/pid")


def this_process() -> Process:
    """Name this process. The name is empty where the system does not tell."""
    boot_id, namespace = _here()
    return Process(boot_id=boot_id, pid_namespace=namespace, pid=os.getpid()) if boot_id else Process()


def on_this_machine(process: Process) -> bool:
    """Whether a process runs under the same kernel as this one, in whatever container."""
    return bool(process.boot_id) and process.boot_id == _here()[0]


def is_stopped(process: Process) -> bool:
    """Whether a process is stopped (SIGSTOP, a terminal, a debugger). False where that cannot be seen from here."""
    if not on_this_machine(process) or process.pid_namespace != _here()[1]:
        return False
    try:
        stat = os.open(f"/proc/{process.pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return state_in(stat) in (STOPPED, TRACED)
    finally:
        os.close(stat)


def state_in(stat: int) -> bytes:
    """Return the state of the main thread of a process, whose /proc/PID/stat is open; "" if it has just ended."""
    try:
        head = os.pread(stat, _HEAD_BYTES, 0)
    except OSError:
        return b""
    return head[head.rindex(b")") + 2 :][:1]


@cache
def _here() -> tuple[str, int]:
    """Return this machine's boot and this process's PID namespace; "" and 0 where the system does not tell."""
    try:
        return _BOOT_ID.read_text().strip(), _PID_NAMESPACE.stat().st_ino
    except OSError:
        return "", 0
