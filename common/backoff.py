"""Exponential backoff: the wait before the next try of something that may fail again."""


class Backoff:
    """Doubles the wait with each failure, from the first to the longest, until a success."""

    def __init__(self, *, first_seconds: float, longest_seconds: float, free_tries: int = 0) -> None:
        self._first = first_seconds
        self._longest = longest_seconds
        self._free = free_tries
        self.failures = 0

    def failed(self) -> float:
        """Count a failure. Returns the seconds to wait before the next try."""
        doublings = self.failures - self._free
        self.failures += 1
        # Bounded, since a float cannot hold every power of two.
        return min(self._longest, self._first * 2 ** min(doublings, 30)) if doublings >= 0 else 0.0

    def succeeded(self) -> None:
        """Count a success: the next failure is the first again."""
        self.failures = 0
