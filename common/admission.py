"""Whether a call can be done before its deadline, by what runs have taken: at both ends of a lane."""

from common.errors import ResourceExhausted

# What is predicted is a mean, and a call that is done too late has kept a worker from one that would not have been: so
# many times that must fit its deadline. It costs nothing when there is more to do than can be done.
MARGIN = 1.25
_SHORTEST_RETRY_SECONDS, _LONGEST_RETRY_SECONDS = 0.01, 10.0


def needed_seconds(wait_seconds: float, cost_seconds: float, reply_seconds: float) -> float:
    """What a call must have left that is to wait, run, and be answered."""
    return MARGIN * (wait_seconds + cost_seconds) + reply_seconds


def too_late(kernel: str, needed_seconds: float, left_seconds: float) -> ResourceExhausted:
    """What is told the caller of a call that could not be in time."""
    return ResourceExhausted(
        f"kernel {kernel} would be done in {needed_seconds:.2g} s, with what waits before it, and the deadline is in "
        f"{left_seconds:.2g} s",
        retry_after_milliseconds=retry_milliseconds(needed_seconds - left_seconds),
    )


def retry_milliseconds(seconds: float) -> int:
    """When to come back, for a caller who is refused for so long."""
    return round(min(max(seconds, _SHORTEST_RETRY_SECONDS), _LONGEST_RETRY_SECONDS) * 1e3)
