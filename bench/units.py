"""The gain by a second unit: the same calls to one unit and to two, by turns, with as many workers in all."""

from collections.abc import Callable
from contextlib import ExitStack

from bench.subjects import subjects
from bench.subjects.oip import Work
from bench.throughput import Cell
from bench.throughput import measure as measure_cells

NAMES = {"one unit": "1", "two units": "2"}
# Enough that the system divides them among units about equally.
CONNECTIONS = 16


def measure(works: dict[str, Work], *, rounds: int, seconds: float, on_step: Callable[[str], None]) -> list[Cell]:
    """Measure the cells of both, in the same way as throughput."""
    with ExitStack() as stack:
        on_step("units · starting one unit, and two")
        running = {
            name: subjects.start(
                stack, "unlatch", log=name.replace(" ", "-"), settings={"UNLATCH_UNITS": units}, connections=CONNECTIONS
            )
            for name, units in NAMES.items()
        }
        return measure_cells(
            works, running, None, rounds=rounds, seconds=seconds, on_step=on_step, only_works=frozenset()
        )
