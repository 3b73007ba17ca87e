"""How a worker comes to its end, and what follows from it.

reason      a snake_case code, which metrics and logs carry: one of those below, nothing that a worker can choose
message     the same as a sentence, with what varies, for logs and callers
is_strike   the call that it ran is held to have done it (compute/intake/poison.py)
at_once     its slot is filled again at once, however often it happens
went_on     it had said something of the run that it was in, and may have begun what was staged behind it
"""

import signal
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True)
class End:
    """One way to end."""

    reason: str
    message: str
    is_strike: bool = True
    at_once: bool = False
    # Also seen afterwards, of any end: it makes no other end of it.
    went_on: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return self.message

    def with_detail(self, detail: str) -> "End":
        """The same end, with a detail in its message."""
        return replace(self, message=f"{self.message}: {detail}")


# By us, and nobody's fault or a caller's.
POOL_STOPS = End("pool_stopped", "the pool was stopped", is_strike=False)
ABANDONED = End("abandoned", "the worker ran a call that no caller waited for", is_strike=False, at_once=True)
TIMED_OUT = End("timed_out", "the kernel ran for longer than its timeout", is_strike=False, at_once=True)
# By us, because of what it has taken, by one call or by many; the latter as its settings plan it.
OVER_LIMIT = End("memory_limit_exceeded", "the worker's memory was over the limit", is_strike=False, at_once=True)
GROWN = End(
    "recycled_after_growth", "the worker's memory had grown by recycle_growth_bytes", is_strike=False, at_once=True
)
HAS_RUN = End("recycled_after_calls", "the worker had run recycle_calls calls", is_strike=False, at_once=True)
PLANNED = (GROWN, HAS_RUN)
# By us, before it was ready.
MISFIT = End("unservable_kernels", "the pool cannot serve the worker's kernels", is_strike=False)
UNREADY = End("start_timed_out", "the worker was not ready in time", is_strike=False)
# By us, because of what it did. What has stopped a worker may have come from outside: the next need not wait for it.
STOPPED = End("stopped", "the worker was stopped", at_once=True)
HALF_GONE = End("main_thread_ended", "the worker's main thread ended, and its process did not", at_once=True)
NO_FRAME = End("undecodable_frame", "the worker sent an undecodable frame", went_on=True)
NOT_STARTING = End("unexpected_start_frame", "the worker sent a frame of its start after its start")
OTHER_CALL = End("unexpected_reply", "the worker answered a call that it was not running", went_on=True)
UNSOUND_REPLY = End("invalid_reply", "the worker sent an invalid reply", went_on=True)
HUNG_UP = End("socket_closed", "the worker closed its socket")
DEAF = End("socket_refused_frame", "the worker's socket refused a frame")

# Those by which programs die, as strsignal(3) calls them. A kernel can choose any other too.
_SIGNALS: dict[int, End] = {
    number: End(reason, f"the worker was killed by {number.name}")
    for number, reason in {
        signal.SIGKILL: "killed",
        signal.SIGSEGV: "segmentation_fault",
        signal.SIGBUS: "bus_error",
        signal.SIGABRT: "aborted",
        signal.SIGFPE: "floating_point_exception",
        signal.SIGILL: "illegal_instruction",
        signal.SIGTERM: "terminated",
        signal.SIGSYS: "bad_system_call",
        signal.SIGXCPU: "cpu_time_limit_exceeded",
        signal.SIGTRAP: "trap",
    }.items()
}


# What multiprocessing says of a process whose forkserver has gone, and with it whoever would have known.
_UNSEEN_CODE = 255


def by_itself(code: int | None) -> End:
    """What an exit code says, as multiprocessing gives it: negative for a signal, None where it came too late."""
    if code is None or code == _UNSEEN_CODE:
        return End("unknown", "the worker ended, and its exit code is unknown")
    if code >= 0:
        return End("exited", f"the worker exited with code {code}")
    # Most real-time signals have no name.
    return _SIGNALS.get(-code, End("signal", f"the worker was killed by signal {-code}"))
