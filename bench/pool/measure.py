"""Figures of the pool under faults, overload and many small calls: replacement, cancel, order, batches."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from bench.bounds import Bound, Figures
from bench.processes import Child, load_core
from bench.subjects.oip import Work
from bench.subjects.subjects import Subject, await_ready, start

WORKERS = 2
SHORT_PER_SECOND = 200
LONG_BESIDE = 8
OVERLOAD = 2.0
BATCH_CALLERS = 256
MAP_CALLS_A_SECOND = 2000
# Weights of tenants. The heavy one sends ten times as many calls as either of the others.
WEIGHTS = {"heavy": 1.0, "equal": 1.0, "threefold": 3.0}


BOUNDS = (
    Bound(name="replacement_ms_p50", at_most=20.0),
    Bound(name="replacement_ms_p99", at_most=100.0),
    # The grace period of a cancelled run, and 50 ms.
    Bound(name="cancel_to_next_ms_p50", at_most=300.0),
    Bound(name="cancel_to_next_ms_p99", at_most=300.0),
    Bound(name="short_call_p99_ms", at_most=10.0),
    Bound(name="fair_share_error", at_most=10.0),
    Bound(name="goodput_ratio", at_least=0.95),
    Bound(name="refusal_ms_p99", at_most=5.0),
    Bound(name="batch_gain", at_least=5.0),
    Bound(name="batch_alone_ratio", at_most=1.1),
    Bound(name="map_cpu_fall", at_least=5.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """A mesh, its callers, and the duration of a measurement."""

    subject: Subject
    callers: Child
    rounds: int
    seconds: float

    def times(self, a_second: float) -> int:
        """The number of repetitions at this rate."""
        return round(a_second * self.rounds * self.seconds)

    def ask(self, figure: str, **how: Any) -> dict[str, Any]:
        """Have the callers measure a figure through the gateway."""
        return self.callers.ask(figure=figure, gateway=f"127.0.0.1:{self.subject.port}", **how)


def measure(
    work: Work, *, rounds: int, seconds: float, on_step: Callable[[str], None], only: frozenset[str] = frozenset()
) -> Figures:
    """Measure all figures of the pool, or the named ones, each on a mesh with the workers and settings it needs."""
    found: Figures = {}
    for workers, settings, figures in _meshes():
        wanted = [figure for figure in figures if not only or figure.__name__ in only]
        if not wanted:
            continue
        with ExitStack() as stack:
            on_step(f"pool · starting {workers} workers")
            subject = start(stack, "apart", workers=workers, settings=settings, log="pool")
            await_ready(subject, work)
            callers = stack.enter_context(Child("pool-callers", "bench.pool.callers", cpus=[load_core()]))
            for figure in wanted:
                on_step(f"pool · {figure.__name__}")
                found |= figure(Asking(subject=subject, callers=callers, rounds=rounds, seconds=seconds))
    return found


def _meshes() -> Iterator[tuple[int, dict[str, str], tuple[Callable[[Asking], Figures], ...]]]:
    """Numbers of workers, settings, and the figures to measure with them."""
    weights = ",".join(f"{name}={weight:g}" for name, weight in WEIGHTS.items())
    yield 1, {}, (replacement, goodput_to_spare)
    yield WORKERS, {"UNLATCH_RESERVED_WORKERS": "1"}, (short_call,)
    yield (
        WORKERS,
        {"UNLATCH_TENANT_WEIGHTS": weights},
        (cancel_to_next, fair_share, goodput, batch, batch_alone, map_cpu),
    )


def replacement(asking: Asking) -> Figures:
    """replacement_ms: from the SIGKILL of the only worker until its replacement runs a call that was made then."""
    found = asking.ask("replacement", root=asking.subject.process.pid, kills=asking.times(10))
    return _percentiles("replacement_ms", found["milliseconds"])


def cancel_to_next(asking: Asking) -> Figures:
    """cancel_to_next_ms: from when callers abandon endless loops on all workers until each core runs another call."""
    found = asking.ask(
        "cancel_to_next", metrics=asking.subject.metrics["dispatcher"], count=WORKERS, rounds=asking.times(7)
    )
    return _percentiles("cancel_to_next_ms", found["milliseconds"])


def short_call(asking: Asking) -> Figures:
    """short_call_p99_ms: latency of 200 calls of 1 ms a second, from when they are due, beside too many 500 ms calls.

    The long calls have background priority. One of the two workers is reserved for calls that are not long.
    """
    seconds = asking.rounds * asking.seconds
    found = asking.ask("short_beside_long", seconds=seconds, per_second=SHORT_PER_SECOND, beside=LONG_BESIDE)
    return {f"short_call_p{p}_ms": float(np.percentile(found["milliseconds"], p)) for p in (50, 99)}


def fair_share(asking: Asking) -> Figures:
    """fair_share_error: the largest deviation, in percent, of a tenant's processor time from its weighted share.

    One of two tenants has ten times as many waiting calls as the other, each five times as long. Measured once with
    equal weights, and once with three times the weight for the lighter tenant.
    """
    errors = {}
    for light in ("equal", "threefold"):
        found = asking.callers.ask(
            figure="fair_share",
            dispatcher=asking.subject.dispatcher_target(),
            seconds=asking.rounds * asking.seconds / 2,
            light=light,
            heavy="heavy",
        )
        errors[light] = share_error({light: found["light"], "heavy": found["heavy"]})
    return {"fair_share_error": max(errors.values()), **{f"fair_share_error_{k}": v for k, v in errors.items()}}


def share_error(used: dict[str, float]) -> float:
    """The largest deviation of a tenant's part from its weighted share, in percent of that share."""
    weights, total = sum(WEIGHTS[name] for name in used), sum(used.values())
    return max(abs(seconds / total / (WEIGHTS[name] / weights) - 1) for name, seconds in used.items()) * 100


def goodput_to_spare(asking: Asking) -> Figures:
    """The same with a core to spare, so that refusing takes no time from computing."""
    return {f"{name}_core_to_spare": value for name, value in goodput(asking).items()}


def goodput(asking: Asking) -> Figures:
    """goodput_ratio: calls of 10 ms answered within 100 ms at twice the pool's capacity, divided by its capacity.

    Capacity is measured before and after, by callers that wait. refusal_ms: from sending a call to its refusal.
    """
    before = asking.ask("capacity", seconds=asking.seconds)["per_second"]
    seconds = 2 * asking.seconds
    found = asking.ask("overload", seconds=seconds, per_second=OVERLOAD * before, seed=1)
    after = asking.ask("capacity", seconds=asking.seconds)["per_second"]
    refusals = found["refusal_milliseconds"]
    return {
        "goodput_ratio": found["answered"] / seconds / ((before + after) / 2),
        "capacity_per_second": (before + after) / 2,
        "overload_late_ratio": found["late"] / found["sent"],
        "overload_refused_ratio": len(refusals) / found["sent"],
        **(_percentiles("refusal_ms", refusals) if refusals else {}),
    }


def batch(asking: Asking) -> Figures:
    """batch_gain: 256 callers' rate of a kernel of 1 ms plus 10 µs a row, batched, over the same unbatched."""
    gains = []
    for _ in range(asking.rounds):
        rates = [
            asking.ask("rows", kernel=kernel, callers=BATCH_CALLERS, seconds=asking.seconds / 2)["per_second"]
            for kernel in ("costly_together", "costly_alone")
        ]
        gains.append(rates[0] / rates[1])
    return {"batch_gain": median(gains)}


def batch_alone(asking: Asking) -> Figures:
    """batch_alone_ratio: one caller's median latency of a kernel that is batched, over the same unbatched."""
    kernels = ["costly_together", "costly_alone"]
    found = asking.ask("alone", kernels=kernels, seconds=asking.rounds * asking.seconds / 3)
    return {"batch_alone_ratio": found[kernels[0]] / found[kernels[1]]}


def map_cpu(asking: Asking) -> Figures:
    """map_cpu_fall: CPU of worker and dispatcher for 20 µs calls made one by one unbatched, over a batched `map`."""
    calls = round(MAP_CALLS_A_SECOND * asking.seconds / 2)
    falls: list[float] = []
    cpu_us: dict[str, list[float]] = {"one_by_one": [], "mapped": []}
    for _ in range(asking.rounds):
        for way, kernel in (("one_by_one", "light_alone"), ("mapped", "light_together")):
            before = asking.subject.cpu()
            asking.ask(way, kernel=kernel, calls=calls)
            after = asking.subject.cpu()
            cpu_us[way].append(sum(after[name] - before[name] for name in ("workers", "dispatcher")) / calls * 1e6)
        falls.append(cpu_us["one_by_one"][-1] / cpu_us["mapped"][-1])
    return {"map_cpu_fall": median(falls), **{f"map_cpu_us_{way}": median(each) for way, each in cpu_us.items()}}


def _percentiles(name: str, values: list[float]) -> Figures:
    return {f"{name}_p{p}": float(np.percentile(values, p)) for p in (50, 99)}


# Figures that can be selected by name.
FIGURES = frozenset(figure.__name__ for _, _, figures in _meshes() for figure in figures)
