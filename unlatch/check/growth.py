"""The growth of a kernel's time and memory with the size of its inputs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from unlatch.check.cases import Case, Cases
from unlatch.check.worker import CheckWorkers, Ended, Lost, Outcome
from unlatch.common.kernel.spec import KernelSpec

# The first of these lengths that fits is the shortest: an array may have many axes.
_SHORTEST, _STEPS = (16, 8, 4, 2), 6
# A size that takes longer than this is the last one: the next would take a multiple of it, and the user waits.
_SLOW_SECONDS = 0.4
_REPEATED_FOR_SECONDS, _REPEATS = 0.1, 20
# The fixed cost of a call hides how the rest grows, so only rows well above the minimum count.
_ABOVE_LEAST = 2.0
_LEAST_BYTES = 128 * 1024
_FITTED_ROWS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Figures of one size. Memory is the worker's peak beyond what it had before, without the call's own tensors."""

    length: int
    input_bytes: int
    seconds: float
    memory_bytes: int


@dataclass(slots=True)
class Growth:
    """The measured sizes; the reason why larger ones are missing; and the run that failed, if one did."""

    rows: list[Row] = field(default_factory=list)
    ended_by: str = ""
    failed: tuple[Case, Outcome] | None = None

    @property
    def time_exponent(self) -> float | None:
        """The power of the length with which time grows. None if too little was measured."""
        floor = _ABOVE_LEAST * min((row.seconds for row in self.rows), default=0.0)
        return _exponent([(row.length, row.seconds) for row in self.rows if row.seconds >= floor])

    @property
    def memory_exponent(self) -> float | None:
        """The power of the length with which memory grows. None if too little was measured."""
        return _exponent([(row.length, row.memory_bytes) for row in self.rows if row.memory_bytes >= _LEAST_BYTES])


async def measure(spec: KernelSpec, cases: Cases, workers: CheckWorkers, most_bytes: int) -> Growth:
    """Run a kernel at sizes up to inputs of `most_bytes`, each in a fresh worker, shortest first."""
    growth = Growth()
    ladder = lengths(cases.nbytes, most_bytes) if cases.grows else []
    for length in ladder:
        case = cases.of_length(length)
        async with workers.worker(spec) as worker:
            # A first run, so that one-time imports and allocations do not count.
            await worker.run(spec.name, cases.of_length(ladder[0]))
            outcome: Outcome = await worker.run(spec.name, case)
            if not isinstance(outcome, Ended):
                growth.ended_by = (
                    outcome.reason if isinstance(outcome, Lost) else (outcome.last_lines or [outcome.message])[-1]
                )
                growth.failed = case, outcome
                break
            seconds = [outcome.seconds]
            while len(seconds) < _REPEATS and sum(seconds) < _REPEATED_FOR_SECONDS:
                again = await worker.run(spec.name, case)
                if not isinstance(again, Ended):
                    break
                seconds.append(again.seconds)
        growth.rows.append(
            Row(length=length, input_bytes=case.nbytes, seconds=min(seconds), memory_bytes=outcome.memory_bytes)
        )
        if outcome.seconds > _SLOW_SECONDS:
            growth.ended_by = "larger ones would take too long"
            break
    return growth


def lengths(nbytes: Callable[[int], int], most_bytes: int) -> list[int]:
    """Lengths in equal ratios; the inputs of the last one have about `most_bytes`."""
    shortest = longest = next((length for length in _SHORTEST if nbytes(length) <= most_bytes), _SHORTEST[-1])
    while nbytes(longest * 2) <= most_bytes:
        longest *= 2
    # The power of two below may be only half of what fits.
    longest = max(
        length
        for length in (longest, longest * 5 // 4, longest * 3 // 2)
        if nbytes(length) <= most_bytes or length == longest
    )
    return sorted({round(shortest * (longest / shortest) ** (step / (_STEPS - 1))) for step in range(_STEPS)})


def _exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """The slope of the last points on logarithmic axes."""
    points = points[-_FITTED_ROWS:]
    if len(points) < 2:
        return None
    slope = np.polyfit([math.log(x) for x, _ in points], [math.log(y) for _, y in points], 1)[0]
    return float(slope)
