"""How long to wait before the next try of something that may fail again."""


class Backoff:
    """Ever longer, from the first wait to the longest, until something has come of a try."""

    def __init__(self, *, first_seconds: float, longest_seconds: float, free_tries: int = 0) -> None:
        self._first = first_seconds
        self._longest = longest_seconds
        self._free = free_tries
        self.failures = 0

    def failed(self) -> float:
        """It failed: how many seconds to wait now."""
        doublings = self.failures - self._free
        self.failures += 1
        # A power of two that no float holds is never reckoned.
        return min(self._longest, self._first * 2 ** min(doublings, 30)) if doublings >= 0 else 0.0

    def succeeded(self) -> None:
        """Something came of it."""
        self.failures = 0
