"""The ways in which a worker exits, and what follows from each.

reason                a snake_case code, which metrics and logs carry: one of those below, never chosen by a worker
message               the same as a sentence, with what varies, for logs and callers
blames_call           the call that the worker ran counts as the cause of the exit (compute/dispatch/poison.py)
at_once               the slot is filled again at once, however often this happens
may_have_begun_next   the worker had sent a frame about its run, and may have begun the run that was staged behind it
"""

import signal
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True)
class Exit:
    """A way in which a worker process exits."""

    reason: str
    message: str
    blames_call: bool = True
    at_once: bool = False
    # Any exit may get this mark later. It is still the same exit, so this field is not compared.
    may_have_begun_next: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return self.message

    def with_detail(self, detail: str) -> "Exit":
        """Return the same exit with a detail in its message."""
        return replace(self, message=f"{self.message}: {detail}")


# Workers that we kill, although neither they nor their calls are to blame.
POOL_STOPS = Exit("pool_stopped", "the pool was stopped", blames_call=False)
ABANDONED = Exit("abandoned", "the worker ran a call that no caller waited for", blames_call=False, at_once=True)
TIMED_OUT = Exit("timed_out", "the kernel ran for longer than its timeout", blames_call=False, at_once=True)
# A mistake in our own code. If it happens again and again, the slot waits longer each time.
INTERNAL_ERROR = Exit(
    "internal_error",
    "the dispatcher met an internal error as it handled the worker",
    blames_call=False,
    may_have_begun_next=True,
)
# Workers that we kill for the memory or the number of their calls. Settings plan the exits in PLANNED.
OVER_LIMIT = Exit("memory_limit_exceeded", "the worker's memory was over the limit", blames_call=False, at_once=True)
GROWN = Exit(
    "recycled_after_growth", "the worker's memory had grown by recycle_growth_bytes", blames_call=False, at_once=True
)
HAS_RUN = Exit("recycled_after_calls", "the worker had run recycle_calls calls", blames_call=False, at_once=True)
PLANNED = (GROWN, HAS_RUN)
# Workers that we kill before they are ready.
MISFIT = Exit("unservable_kernels", "the pool cannot serve the worker's kernels", blames_call=False)
UNREADY = Exit("start_timed_out", "the worker was not ready in time", blames_call=False)
# Workers that we kill for what they did. A stopped worker may not be at fault: its slot is filled at once.
STOPPED = Exit("stopped", "the worker was stopped", at_once=True)
HALF_GONE = Exit("main_thread_ended", "the worker's main thread ended, and its process did not", at_once=True)
NO_FRAME = Exit("undecodable_frame", "the worker sent an undecodable frame", may_have_begun_next=True)
NOT_STARTING = Exit("unexpected_start_frame", "the worker sent a frame of its start after its start")
OTHER_CALL = Exit("unexpected_reply", "the worker answered a call that it was not running", may_have_begun_next=True)
UNASKED = Exit(
    "unexpected_frame", "the worker sent a frame that workers of its kind do not send", may_have_begun_next=True
)
UNSOUND_REPLY = Exit("invalid_reply", "the worker sent an invalid reply", may_have_begun_next=True)
HUNG_UP = Exit("socket_closed", "the worker closed its socket")
DEAF = Exit("socket_refused_frame", "the worker's socket refused a frame")

# The signals by which programs die, as strsignal(3) calls them. A kernel can choose any other too.
_SIGNALS: dict[int, Exit] = {
    number: Exit(reason, f"the worker was killed by {number.name}")
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


def by_itself(code: int | None) -> Exit:
    """Return the exit that an exit code means: negative for a signal, None if the forkserver did not report it."""
    if code is None:
        return Exit("unknown", "the worker ended, and its exit code is unknown")
    if code >= 0:
        return Exit("exited", f"the worker exited with code {code}")
    # Most real-time signals have no name.
    return _SIGNALS.get(-code, Exit("signal", f"the worker was killed by signal {-code}"))
