"""The forecast of run times, learned from runs: what waiting times are predicted from, and which calls are long.

The forecast keeps a kernel's time by the size of its input, in classes of powers of two: few kernels are linear in it.
A class without a run is expected to take what the nearest class with runs took.

Calls are refused by the forecast, and a refused call teaches it nothing. So one run that stalls counts for no more than
a few of the others, and each refusal lowers the expectation that it was based on, until a call may try again.
"""

from unlatch.common.rates import MovingMean

# The weight of one run in what is expected next; the first few runs are averaged.
_WEIGHT = 0.2
# A run that took more than this many times the mean counts as if it had taken that.
_MAX_TIMES_THE_MEAN = 4.0
_LEAST_SECONDS = 0.001
_DOUBT = 0.98


class Forecast:
    """Expected run times. Their number is bounded by kernels x classes of size."""

    def __init__(self) -> None:
        self._kernels: dict[str, dict[int, MovingMean]] = {}

    def expected(self, kernel: str, size: int) -> float:
        """Seconds that a run of `size` bytes is expected to take; 0 where nothing is known of the kernel."""
        classes = self._kernels.get(kernel)
        if not classes:
            return 0.0
        own = size.bit_length()
        learned = classes.get(own) or classes[min(classes, key=lambda other: abs(other - own))]
        return learned.value

    def learn(self, kernel: str, size: int, seconds: float) -> None:
        """Learn from a run that took `seconds` to its end."""
        classes = self._kernels.setdefault(kernel, {})
        own = size.bit_length()
        learned = classes.get(own)
        if learned is None:
            learned = classes[own] = MovingMean(_WEIGHT)
        else:
            seconds = min(seconds, _MAX_TIMES_THE_MEAN * max(learned.value, _LEAST_SECONDS))
        learned.add(seconds)

    def learn_at_least(self, kernel: str, size: int, seconds: float) -> None:
        """Learn from a run that was ended after `seconds`, before it was done."""
        if seconds > self.expected(kernel, size):
            self.learn(kernel, size, seconds)

    def doubt(self, kernel: str, size: int) -> None:
        """Lower an expectation that a call was refused for."""
        learned = self._kernels.get(kernel, {}).get(size.bit_length())
        if learned is not None:
            learned.value *= _DOUBT
