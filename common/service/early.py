"""The first moments of a service's process, before its modules are loaded. They may take a second."""

import ctypes
import os
import signal
from types import FrameType

_STANDARD_ERROR = 2
_PR_SET_PDEATHSIG = 1


def take_over() -> None:
    """Open closed ones of the descriptors 0 to 2 on /dev/null, and let stop signals end this process with code 0.

    If 0 to 2 stayed closed, the next sockets would get these numbers, and what is printed would be written to them.
    SIGUSR1 and SIGUSR2 are ignored. SIGUSR2 asks a supervisor to restart its units, and is heard once there are units;
    SIGUSR1 asks a unit to reload its kernels. They would end any other process (systemctl sends a signal to all
    processes of a service).
    """
    while (opened := os.open(os.devnull, os.O_RDWR)) <= _STANDARD_ERROR:
        os.set_inheritable(opened, True)
    os.close(opened)
    for number in stop_signals():
        signal.signal(number, _end)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def stop_signals() -> list[signal.Signals]:
    """The signals that stop a service. SIGHUP is not one of them if it is ignored, as under nohup."""
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGTERM, signal.SIGINT, *hangup]


def die_with_parent(parent: int) -> None:
    """Make the kernel kill this process when `parent` ends. If it has ended already, exit now."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _end(_: int, __: FrameType | None) -> None:
    # Nothing has begun yet that would have to end in order.
    os._exit(0)
