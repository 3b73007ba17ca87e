"""Admission: whether a call can be answered before its deadline, by what runs have taken."""

from unlatch.common.errors import DeadlineExceeded, ResourceExhausted
from unlatch.common.waiting.demand import Demand
from unlatch.common.waiting.forecast import Forecast

# A prediction is a mean, and a call that is done too late has kept a worker from a call that would have been in time.
# So this many times the predicted seconds must fit before the deadline. The margin costs nothing under overload.
MARGIN = 1.25
_SHORTEST_RETRY_SECONDS, _LONGEST_RETRY_SECONDS = 0.01, 10.0


def refusal_in_time(
    demand: Demand,
    forecast: Forecast,
    *,
    wait_seconds: float,
    run_seconds: float,
    reply_seconds: float,
    left_seconds: float,
) -> ResourceExhausted | None:
    """The refusal of a new call that could not wait, run and be answered in the seconds left; None if it could."""
    needed = MARGIN * (wait_seconds + run_seconds) + reply_seconds
    # A call that finds an idle worker may try, whatever is expected of it: else nothing new would ever be learned.
    if not wait_seconds or needed <= left_seconds:
        return None
    if MARGIN * run_seconds + reply_seconds > left_seconds:
        forecast.doubt(demand.kernel, demand.size)
    return ResourceExhausted(
        f"kernel {demand.kernel} would be done in {needed:.2g} s, with what waits before it, and the deadline is in "
        f"{left_seconds:.2g} s",
        retry_after_milliseconds=retry_milliseconds(needed - left_seconds),
    )


def too_late(kernel: str) -> DeadlineExceeded:
    """The error of a call that has waited and cannot be in time any more."""
    return DeadlineExceeded(f"the deadline passed, or would have, while kernel {kernel} waited")


def retry_milliseconds(seconds: float) -> int:
    """How long a refused caller is told to wait when room is expected in `seconds`."""
    return round(min(max(seconds, _SHORTEST_RETRY_SECONDS), _LONGEST_RETRY_SECONDS) * 1e3)
