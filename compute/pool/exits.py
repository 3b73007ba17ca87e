"""How a worker comes to its end, and what follows from it.

reason      a metric's label: one of those below, nothing that a worker can choose
story       the same with what varies, for logs and callers
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
    story: str = ""
    is_strike: bool = True
    at_once: bool = False
    # Also seen afterwards, of any end: it makes no other end of it.
    went_on: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return self.story or self.reason

    def with_detail(self, detail: str) -> "End":
        """The same end, told with what is not in its reason."""
        return replace(self, story=f"{self.reason}: {detail}")


# By us, and nobody's fault or a caller's.
POOL_STOPS = End("the pool stops", is_strike=False)
ABANDONED = End("it ran a call that nobody waited for", is_strike=False, at_once=True)
TIMED_OUT = End("its kernel ran for longer than its timeout", is_strike=False, at_once=True)
# By us, because of what it has taken, by one call or by many; the latter as its settings plan it.
OVER_LIMIT = End("its memory is over the limit", is_strike=False, at_once=True)
GROWN = End("its memory has grown", is_strike=False, at_once=True)
HAS_RUN = End("it has run its number of calls", is_strike=False, at_once=True)
PLANNED = (GROWN, HAS_RUN)
# By us, before it was ready.
MISFIT = End("its kernels are not what the pool can serve", is_strike=False)
UNREADY = End("it was not ready in time", is_strike=False)
# By us, because of what it did. What has stopped a worker may have come from outside: the next need not wait for it.
STOPPED = End("it was stopped", at_once=True)
HALF_GONE = End("its main thread ended without it", at_once=True)
NO_FRAME = End("it sent a frame that is none", went_on=True)
NOT_STARTING = End("it speaks as if it were starting")
OTHER_CALL = End("it answered a call that it was not running", went_on=True)
UNSOUND_REPLY = End("its reply is not what it can be", went_on=True)
HUNG_UP = End("it closed its socket")
DEAF = End("its socket refuses frames")

# Those by which programs die. A kernel can choose any other too.
_SIGNALS: dict[int, End] = {
    number: End(f"{number.name} ended it")
    for number in (
        *(signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL),
        *(signal.SIGTERM, signal.SIGSYS, signal.SIGXCPU, signal.SIGTRAP),
    )
}


# What multiprocessing says of a process whose forkserver has gone, and with it whoever would have known.
_UNSEEN_CODE = 255


def by_itself(code: int | None) -> End:
    """What an exit code says, as multiprocessing gives it: negative for a signal, None where it came too late."""
    if code is None or code == _UNSEEN_CODE:
        return End("it ended in a way that nobody saw")
    if code >= 0:
        return End("it exited", f"it exited with code {code}")
    # Most real-time signals have no name.
    return _SIGNALS.get(-code, End("another signal ended it", f"signal {-code} ended it"))
