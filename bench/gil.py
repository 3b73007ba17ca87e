"""The reason for Unlatch: the same work on the event loop, in a thread pool, and through Unlatch, on 1 and 2 cores.

CPU-bound work is a pure-Python loop of about 10 ms that holds the GIL. Waiting work waits 10 ms. In Unlatch a plain
kernel that waits occupies a worker like any other, so its throughput is workers / 10 ms. An `async def` kernel waits on
an event loop, as an async handler does: the last two rows compare them with 500 callers. Callers of a plain kernel may
wait in large numbers too: one row has 500 calls waiting at once, and shows what that costs the gateway and the health
check.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from statistics import median

from bench.bounds import Bound
from bench.load.load import calls_for
from bench.processes import Child, cores, load_core
from bench.subjects.oip import Work
from bench.subjects.subjects import Subject, await_ready, check, start
from bench.throughput import loaded_with_cpu

IN_FLIGHT = 32
WAITING = 500
AWAITED = "awaited"


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A row of the table: one work, done in one way."""

    name: str
    subject: str
    work: str
    says: str
    in_flight: int = IN_FLIGHT
    request_id: str = ""
    # Each caller makes one call only, since the calls run one after another.
    once: bool = False


WAYS = (
    Way(name="cpu_inline", subject="inline", work="python_loop", says="CPU-bound · inline on the loop"),
    Way(name="cpu_threads", subject="threads", work="python_loop", says="CPU-bound · thread pool"),
    Way(name="cpu_unlatch", subject="unlatch", work="python_loop", says="CPU-bound · Unlatch"),
    Way(name="wait_inline", subject="inline", work="wait10", says="Wait · inline, blocking"),
    Way(name="wait_awaited", subject="inline", work="wait10", says="Wait · inline, awaited", request_id=AWAITED),
    Way(name="wait_threads", subject="threads", work="wait10", says="Wait · thread pool"),
    Way(name="wait_unlatch", subject="unlatch", work="wait10", says="Wait · Unlatch, in a worker"),
    Way(
        name="waiting_unlatch", subject="unlatch", work="wait10", says=f"Wait · Unlatch, {WAITING} callers waiting",
        in_flight=WAITING, once=True,
    ),
    Way(
        name="waiting_awaited", subject="inline", work="wait10", says=f"Wait · inline, awaited, {WAITING} callers",
        in_flight=WAITING, request_id=AWAITED,
    ),
    Way(
        name="waiting_async", subject="unlatch", work="wait10_async",
        says=f"Wait · Unlatch, async def, {WAITING} callers", in_flight=WAITING,
    ),
)  # fmt: skip
BOUNDS = (Bound(name="wait_async_vs_loop", at_least=0.6), Bound(name="wait_async_health_p99_ms", at_most=20.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Results of one way on a number of cores, over all rounds."""

    way: Way
    cores: int
    rates: list[float] = field(default_factory=list)
    health_p99_ms: list[float] = field(default_factory=list)
    failed_checks: list[int] = field(default_factory=list)
    failed_calls: list[int] = field(default_factory=list)
    cpu_us: list[dict[str, float]] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return median(self.rates)

    @property
    def p99_ms(self) -> float:
        return median(self.health_p99_ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class Idle:
    """The p99 of the health check without load: the share of the prober and the machine."""

    subject: str
    cores: int
    health_p99_ms: float


def measure(
    works: dict[str, Work], *, rounds: int, seconds: float, on_step: Callable[[str], None], names: frozenset[str]
) -> tuple[list[Row], list[Idle]]:
    """Measure all ways whose subject is in `names`, on one core (not the load generator's), then on two."""
    rows: list[Row] = []
    idle: list[Idle] = []
    for count in sorted({1, min(2, len(cores()))}):
        bound = _cores(count)
        with ExitStack() as stack:
            wanted = {way.subject for way in WAYS} & names
            subjects = {name: start(stack, name, cpus=bound, workers=count) for name in sorted(wanted)}
            probes = {name: _probe(stack, subject, works) for name, subject in subjects.items()}
            for name, probe in probes.items():
                probe.ask(do="start")
                time.sleep(0.5)
                idle.append(Idle(subject=name, cores=count, health_p99_ms=probe.ask(do="stop")["health"]["p99_ms"]))
            here = [Row(way=way, cores=count) for way in WAYS if way.subject in subjects]
            for row, number in _turns(here, rounds):
                on_step(f"{count} core(s) · round {number}/{rounds} · {row.way.says}")
                _visit(row, subjects[row.way.subject], works[row.way.work], probes[row.way.subject], seconds)
            rows += here
    return rows, idle


def _cores(count: int) -> list[int]:
    """A core that is not the load generator's, or two cores."""
    bound = [core for core in cores() if core != load_core()][:1] if count == 1 else cores()[-2:]
    return bound or cores()


def _turns(rows: list[Row], rounds: int) -> Iterator[tuple[Row, int]]:
    for number in range(1, rounds + 1):
        for row in rows:
            yield row, number


def _probe(stack: ExitStack, subject: Subject, works: dict[str, Work]) -> Child:
    await_ready(subject, works["identity_1k"])
    return stack.enter_context(
        Child(f"probe-{subject.name}", "bench.load.probe", "--health", f"127.0.0.1:{subject.health_port}")
    )


def _visit(row: Row, subject: Subject, work: Work, probe: Child, seconds: float) -> None:
    sent = replace(work, name=row.way.name, request_id=row.way.request_id)
    reply_bytes = check(subject, sent)
    in_flight = row.way.in_flight
    warm, _ = loaded_with_cpu(subject, sent, 2 * IN_FLIGHT, IN_FLIGHT, reply_bytes)
    calls = in_flight if row.way.once else calls_for(seconds, warm.calls_per_second, in_flight)
    probe.ask(do="start")
    loaded, cpu_us = loaded_with_cpu(subject, sent, calls, in_flight, reply_bytes)
    checks = probe.ask(do="stop")["health"]
    row.rates.append(loaded.calls_per_second)
    row.failed_calls.append(loaded.failed_calls)
    row.health_p99_ms.append(checks["p99_ms"])
    row.failed_checks.append(checks["failed"])
    row.cpu_us.append(cpu_us)


def figures(rows: Sequence[Row]) -> dict[str, float]:
    """Compare an `async def` kernel with an async handler, on the most cores: the median of the rounds' ratios."""
    found = {row.way.name: row for row in sorted(rows, key=lambda row: row.cores)}
    if not {"waiting_async", "waiting_awaited"} <= found.keys():
        return {}
    own, loop = found["waiting_async"], found["waiting_awaited"]
    ratio = median(a / b for a, b in zip(own.rates, loop.rates, strict=True))
    return {"wait_async_vs_loop": ratio, "wait_async_health_p99_ms": own.p99_ms}
