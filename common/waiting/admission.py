"""Whether a call can be done before its deadline, by what runs have taken: at both ends of a lane."""

from unlatch.common.errors import DeadlineExceeded, ResourceExhausted
from unlatch.common.waiting.forecast import RunTimes

# What is predicted is a mean, and a call that is done too late has kept a worker from one that would not have been: so
# many times that must fit its deadline. It costs nothing when there is more to do than can be done.
MARGIN = 1.25
_SHORTEST_RETRY_SECONDS, _LONGEST_RETRY_SECONDS = 0.01, 10.0


def refusal_in_time(
    kernel: str,
    size: int,
    times: RunTimes,
    *,
    wait_seconds: float,
    cost_seconds: float,
    reply_seconds: float,
    left_seconds: float,
) -> ResourceExhausted | None:
    """Why a call is refused that has just come, if it could not wait, run, and be answered in what it has left."""
    needed = MARGIN * (wait_seconds + cost_seconds) + reply_seconds
    # One that finds an idle worker may try, whatever is expected of it: else nothing new would ever be learned.
    if not wait_seconds or needed <= left_seconds:
        return None
    if MARGIN * cost_seconds + reply_seconds > left_seconds:
        times.doubt(kernel, size)
    return ResourceExhausted(
        f"kernel {kernel} would be done in {needed:.2g} s, with what waits before it, and the deadline is in "
        f"{left_seconds:.2g} s",
        retry_after_milliseconds=retry_milliseconds(needed - left_seconds),
    )


def too_late(kernel: str) -> DeadlineExceeded:
    """What is told the caller of a call that has waited and cannot be in time any more."""
    return DeadlineExceeded(f"the deadline passed, or would have, while kernel {kernel} waited")


def retry_milliseconds(seconds: float) -> int:
    """When to come back, for a caller who is refused for so long."""
    return round(min(max(seconds, _SHORTEST_RETRY_SECONDS), _LONGEST_RETRY_SECONDS) * 1e3)
