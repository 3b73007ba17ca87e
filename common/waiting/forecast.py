"""How long kernels run, learned from their runs: what waiting is predicted from, and what is long.

A kernel's time is kept by the size of its input, in classes of powers of two: few kernels are linear, and none need be.
A size that was never seen is expected to take what the nearest one did.

Calls are refused by what is expected here, and what is refused teaches nothing. So one run that stalls counts for no
more than a few of the others, and each refusal makes what it was for a little less certain, until a call may try.
"""

from dataclasses import dataclass

# A run counts for this much of what is expected next; the first few are averaged.
_NEWS = 0.2
# A run that took longer than so many of those before it counts as if it had not.
_MOST_OF_THE_MEAN = 4.0
_LEAST_SECONDS = 0.001
_DOUBT = 0.98


@dataclass(slots=True)
class _Learned:
    seconds: float = 0.0
    runs: int = 0


class RunTimes:
    """What was learned, bounded by kernels x classes of size."""

    def __init__(self) -> None:
        self._kernels: dict[str, dict[int, _Learned]] = {}

    def expected(self, kernel: str, size: int) -> float:
        """Seconds that a call of so many bytes is expected to take; 0 where nothing is known of the kernel."""
        classes = self._kernels.get(kernel)
        if not classes:
            return 0.0
        own = size.bit_length()
        learned = classes.get(own) or classes[min(classes, key=lambda other: abs(other - own))]
        return learned.seconds

    def learn(self, kernel: str, size: int, seconds: float) -> None:
        """A call has taken so long."""
        learned = self._kernels.setdefault(kernel, {}).setdefault(size.bit_length(), _Learned())
        if learned.runs:
            seconds = min(seconds, _MOST_OF_THE_MEAN * max(learned.seconds, _LEAST_SECONDS))
        learned.runs += 1
        learned.seconds += (seconds - learned.seconds) * max(_NEWS, 1 / learned.runs)

    def learn_at_least(self, kernel: str, size: int, seconds: float) -> None:
        """A call was ended after so long, before it was done."""
        if seconds > self.expected(kernel, size):
            self.learn(kernel, size, seconds)

    def doubt(self, kernel: str, size: int) -> None:
        """A call was refused for what it is expected to take."""
        learned = self._kernels.get(kernel, {}).get(size.bit_length())
        if learned is not None:
            learned.seconds *= _DOUBT
