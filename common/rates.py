"""Means of what was measured of late, and buckets of what may be used: the arithmetic of rates."""


class MovingMean:
    """A mean in which the latest values weigh most: each new one has `weight`, from 0 to 1.

    Begun at `start`. Without a start the first values are averaged, until the share of one is less than `weight`.
    """

    __slots__ = ("_count", "_weight", "value")

    def __init__(self, weight: float, *, start: float | None = None) -> None:
        self.value = start or 0.0
        self._weight = weight
        # How many values are averaged so far; a start is as good as all of those that are averaged.
        self._count = 0.0 if start is None else 1 / weight

    def add(self, value: float) -> None:
        """Take in one more value."""
        self._count += 1
        self.value += (value - self.value) * max(self._weight, 1 / self._count)


class TokenBucket:
    """Tokens that come back at `rate` a second, up to `capacity`. All times are seconds of one clock."""

    __slots__ = ("_at", "_left", "capacity", "rate")

    def __init__(self, rate: float, capacity: float, now: float) -> None:
        self.rate = rate
        self.capacity = capacity
        self._left = capacity
        self._at = now

    def left(self, now: float) -> float:
        """How many tokens there are; negative when more were taken than there were."""
        self._left = min(self.capacity, self._left + (now - self._at) * self.rate)
        self._at = now
        return self._left

    def take(self, amount: float, now: float) -> None:
        """Take tokens, and overdraw the bucket where it has fewer."""
        self._left = self.left(now) - amount

    def take_one(self, now: float) -> bool:
        """Take one token; False where there is none."""
        if self.left(now) < 1:
            return False
        self._left -= 1
        return True

    def seconds_until(self, amount: float, now: float) -> float:
        """Seconds until there are `amount` tokens."""
        return max(0.0, (amount - self.left(now)) / self.rate)
