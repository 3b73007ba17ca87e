"""Calls a second and CPU time of each call, for every work and subject. Each round measures every cell once."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from statistics import median

from bench.load.load import Load, calls_for, load
from bench.subjects.oip import Work
from bench.subjects.subjects import Bare, Subject, await_ready, check


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Results of one work with one number of calls in flight, on one subject, over all rounds."""

    work: str
    in_flight: int
    subject: str
    rates: list[float] = field(default_factory=list)
    mean_ms: list[float] = field(default_factory=list)
    cpu_us: list[dict[str, float]] = field(default_factory=list)
    failed_calls: list[int] = field(default_factory=list)

    @property
    def case(self) -> str:
        return f"{self.work}_c{self.in_flight}"

    @property
    def rate(self) -> float:
        return median(self.rates)

    def cpu(self) -> dict[str, float]:
        """Median CPU microseconds of a call, by process."""
        names = dict.fromkeys(name for once in self.cpu_us for name in once)
        return {name: median(once.get(name, 0.0) for once in self.cpu_us) for name in names}


CASES: dict[tuple[str, int], tuple[str, ...]] = {
    ("identity_1k", 1): ("echo", "recipe", "apart", "unlatch"),
    ("identity_1k", 32): ("echo", "recipe", "apart", "unlatch", "plaintext", "tls", "one unit", "two units"),
    ("identity_1m", 1): ("echo", "recipe", "unlatch"),
    ("identity_1m", 32): ("echo", "recipe", "apart", "unlatch", "plaintext", "tls", "one unit", "two units"),
    ("spin10", 1): ("recipe", "unlatch"),
    ("spin10", 32): ("recipe", "apart", "unlatch", "bare", "one unit", "two units"),
    ("elementwise", 32): ("recipe", "unlatch", "bare"),
}
WARM_CALLS = {"identity_1k": 1_500, "identity_1m": 96}
WARM_CALLS_OTHERWISE = 64


def measure(
    works: dict[str, Work],
    subjects: dict[str, Subject],
    bare: Bare | None,
    *,
    rounds: int,
    seconds: float,
    on_step: Callable[[str], None],
    only_works: frozenset[str],
) -> list[Cell]:
    """Run all cells that these subjects allow."""
    cells = _cells({*subjects, *(["bare"] if bare is not None else [])}, only_works)
    for subject in subjects.values():
        await_ready(subject, works["identity_1k"])
    replies = dict(_checked(works, subjects, cells))
    rates: dict[tuple[str, str], float] = {}
    for number in range(rounds + 1):  # round 0 warms up, and shows how many calls fill the time
        for cell in cells:
            on_step(f"round {number}/{rounds} · {cell.case} · {cell.subject}")
            if cell.subject == "bare":
                if number and bare is not None:
                    rate, cpu = bare.run(works[cell.work], seconds)
                    _note(cell, rate, 0.0, {"workers": cpu}, 0)
                continue
            key = (cell.case, cell.subject)
            calls = calls_for(seconds, rates[key], cell.in_flight) if number else _warm_calls(cell)
            loaded, cpu_us = loaded_with_cpu(
                subjects[cell.subject], works[cell.work], calls, cell.in_flight, replies[(cell.subject, cell.work)]
            )
            rates[key] = loaded.calls_per_second
            if number:
                _note(cell, loaded.calls_per_second, loaded.mean_ms, cpu_us, loaded.failed_calls)
    on_step("checking replies")
    dict(_checked(works, subjects, cells))
    return cells


def _cells(subjects: Collection[str], only_works: frozenset[str]) -> list[Cell]:
    return [
        Cell(work=name, in_flight=in_flight, subject=subject)
        for (name, in_flight), wanted in CASES.items()
        if not only_works or name in only_works
        for subject in wanted
        if subject in subjects
    ]


def _warm_calls(cell: Cell) -> int:
    calls = WARM_CALLS.get(cell.work, WARM_CALLS_OTHERWISE)
    return max(cell.in_flight, calls // 4 if cell.in_flight == 1 else calls)


def loaded_with_cpu(
    subject: Subject, work: Work, calls: int, in_flight: int, reply_bytes: int
) -> tuple[Load, dict[str, float]]:
    """Measure one stretch of load, and the CPU microseconds a call of each of the subject's processes."""
    body = work.body()
    before = subject.cpu()
    loaded = load(
        subject.port,
        body,
        calls=calls,
        in_flight=in_flight,
        reply_bytes=reply_bytes,
        tls=bool(subject.ca),
        clients=subject.connections,
    )
    after = subject.cpu()
    spent = {name: (after[name] - before.get(name, 0.0)) / calls * 1e6 for name in after}
    spent["load generator"] = loaded.generator_cpu_us_per_call
    return loaded, spent


def _checked(
    works: dict[str, Work], subjects: dict[str, Subject], cells: list[Cell]
) -> Iterator[tuple[tuple[str, str], int]]:
    for subject, work in dict.fromkeys((cell.subject, cell.work) for cell in cells if cell.subject != "bare"):
        yield (subject, work), check(subjects[subject], works[work])


def _note(cell: Cell, rate: float, mean_ms: float, cpu_us: dict[str, float], failed: int) -> None:
    cell.rates.append(rate)
    cell.mean_ms.append(mean_ms)
    cell.cpu_us.append(cpu_us)
    cell.failed_calls.append(failed)
