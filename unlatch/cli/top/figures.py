"""From readings to figures: rates over the last interval, quantiles, and the kernels that workers run."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from unlatch.cli.top.sources import Labels, Point, Reading, Seen

_CALLS = "unlatch_calls_total"
_BUCKETS = "unlatch_call_seconds_bucket"
_QUEUE = "unlatch_queue_depth"
_WORKER = "worker-"

Wanted = Callable[[Labels], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotFigures:
    """Figures of one slot of a pool. `kernel` is empty while the slot runs none.

    `calls` is the number that an async worker runs, None for any other worker; `blocks` names the kernels that have
    blocked its event loop since the last reading.
    """

    up: bool
    kernel: str
    running_seconds: float
    calls_per_second: float | None
    restarts: int
    calls: int | None = None
    blocks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessFigures:
    """Figures of one process. `history` is its utilisation over the last minute; `unit` is empty without units."""

    name: str
    unit: str
    replica: str
    utilization_ratio: float
    resident_bytes: float
    worker: SlotFigures | None
    history: tuple[Point, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Rates and latency of one kernel's calls, or of all. None after a single reading, or for latency without calls."""

    calls_per_second: float | None
    errors_per_second: Mapping[str, float]
    p50_seconds: float | None
    p99_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """All figures of one screen."""

    at: float
    sources: Sequence[Seen]
    processes: Sequence[ProcessFigures]
    calls: Traffic
    kernels: Mapping[str, Traffic]
    # Calls that wait for a worker, that wait for a replica's window, and that have not ended.
    queue_depth: float | None
    gateway_queue_depth: float | None
    in_flight: float | None


def figures(sources: Sequence[Seen], at: float) -> Figures:
    """Combine sources. A source is a gateway, a replica or, if it is a unit, both.

    Figures of callers come from gateways, or from the replicas if no gateway is read.
    """
    read = sorted((seen for seen in sources if seen.now is not None), key=lambda seen: not _has(seen, "gateway"))
    gateways, replicas = ([seen for seen in read if _has(seen, part)] for part in ("gateway", "compute"))
    of_gateways, of_replicas = _labelled("component", "gateway"), _labelled("component", "compute")
    telling, wanted = (gateways, of_gateways) if gateways else (replicas, of_replicas)
    kernels = {dict(labels)["kernel"] for seen in telling for labels in _now(seen, _CALLS) if wanted(labels)}
    return Figures(
        at=at,
        sources=sources,
        processes=_all_processes(read, named=len(sources) > 2),
        calls=_traffic(telling, wanted),
        kernels={name: _traffic(telling, _both(wanted, _labelled("kernel", name))) for name in sorted(kernels)},
        queue_depth=_total(replicas, _QUEUE, of_replicas),
        gateway_queue_depth=_total(gateways, _QUEUE, of_gateways),
        in_flight=_total(gateways, "unlatch_calls_in_flight", of_gateways),
    )


def increase(before: float | None, now: float) -> float:
    """The growth of a counter. A counter that fell was restarted, and a new series began at 0."""
    return now if before is None or now < before else now - before


def quantile(share: float, buckets: Mapping[float, float]) -> float | None:
    """Estimate the value below which that share of observations lies, as Prometheus's histogram_quantile does.

    `buckets` are cumulative counts by upper bound, infinity included. A quantile beyond the last finite bound is that
    bound. None without observations.
    """
    bounds = sorted(buckets)
    total = buckets[bounds[-1]] if bounds else 0.0
    if total <= 0:
        return None
    lower, below = 0.0, 0.0
    for bound in bounds:
        count = buckets[bound]
        if count >= share * total and count > below:
            within = (share * total - below) / (count - below)
            return lower if bound == float("inf") else lower + (bound - lower) * within
        lower, below = bound, count
    return lower


def _has(seen: Seen, component: str) -> bool:
    return any(map(_labelled("component", component), _now(seen, _QUEUE)))


def _now(seen: Seen, name: str) -> Mapping[Labels, float]:
    return seen.now.of(name) if seen.now else {}


def _total(sources: Sequence[Seen], name: str, wanted: Wanted) -> float | None:
    found = (value for seen in sources for labels, value in _now(seen, name).items() if wanted(labels))
    return sum(found) if sources else None


def _all_processes(sources: Sequence[Seen], *, named: bool) -> list[ProcessFigures]:
    """The processes of all sources; `named` adds their source's address."""
    return [process for seen in sources for process in _processes(seen, replica=seen.address if named else "")]


def _processes(seen: Seen, replica: str) -> list[ProcessFigures]:
    resident = _now(seen, "unlatch_process_resident_memory_bytes")
    return [
        ProcessFigures(
            name=(name := dict(labels)["process"]),
            unit=(unit := dict(labels).get("unit", "")),
            replica=replica,
            utilization_ratio=utilization,
            resident_bytes=resident.get(labels, 0.0),
            worker=_worker(seen, unit, name.removeprefix(_WORKER)) if name.startswith(_WORKER) else None,
            history=seen.history.get(labels, ()),
        )
        for labels, utilization in sorted(_now(seen, "unlatch_process_utilization_ratio").items(), key=_by_name)
    ]


def _by_name(item: tuple[Labels, float]) -> tuple[int, bool, int, str]:
    """A sort key: unit by unit the services' own processes, then the processes that they started, workers by number."""
    labels = dict(item[0])
    name = labels["process"]
    is_started = name not in ("gateway", "dispatcher", "unit")
    return _number(labels.get("unit", "")), is_started, _number(name.removeprefix(_WORKER)), name


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else -1


def _worker(seen: Seen, unit: str, slot: str) -> SlotFigures:
    def of_slot(labels: Labels) -> bool:
        return ("worker", slot) in labels and dict(labels).get("unit", "") == unit

    def mine(name: str) -> dict[Labels, float]:
        return {labels: value for labels, value in _now(seen, name).items() if of_slot(labels)}

    running = mine("unlatch_worker_running_seconds")
    at_once = mine("unlatch_worker_calls_in_flight")
    kernel, seconds = next(((dict(labels)["kernel"], value) for labels, value in running.items()), ("", 0.0))
    return SlotFigures(
        up=any(mine("unlatch_worker_up").values()),
        kernel=kernel,
        running_seconds=seconds,
        calls_per_second=_rate([seen], "unlatch_worker_calls_total", of_slot),
        restarts=round(sum(mine("unlatch_worker_restarts_total").values())),
        calls=round(sum(at_once.values())) if at_once else None,
        blocks=_grown_kernels(seen, "unlatch_worker_loop_blocked_total", of_slot),
    )


def _grown_kernels(seen: Seen, name: str, wanted: Wanted) -> tuple[str, ...]:
    """The kernels whose series of a counter have grown since the last reading."""
    if seen.before is None or seen.now is None:
        return ()
    grown = _increases(seen.before, seen.now, name, wanted)
    return tuple(sorted(dict(labels)["kernel"] for labels, value in grown.items() if value))


def _labelled(name: str, value: str) -> Wanted:
    return lambda labels: (name, value) in labels


def _both(one: Wanted, other: Wanted) -> Wanted:
    return lambda labels: one(labels) and other(labels)


def _traffic(sources: Sequence[Seen], wanted: Wanted) -> Traffic:
    errors = {dict(labels)["code"] for seen in sources for labels in _now(seen, _CALLS) if wanted(labels)} - {"OK"}
    rates = {code: _rate(sources, _CALLS, _both(wanted, _labelled("code", code))) or 0.0 for code in sorted(errors)}
    spread = _spread(sources, _both(wanted, _labelled("stage", "total")))
    return Traffic(
        calls_per_second=_rate(sources, _CALLS, wanted),
        errors_per_second={code: rate for code, rate in rates.items() if rate},
        p50_seconds=quantile(0.5, spread),
        p99_seconds=quantile(0.99, spread),
    )


def _rate(sources: Sequence[Seen], name: str, wanted: Wanted) -> float | None:
    pairs = [(seen.before, seen.now) for seen in sources if seen.before is not None and seen.now is not None]
    if not pairs:
        return None
    return sum(_grown(before, now, name, wanted) / (now.at - before.at) for before, now in pairs)


def _grown(before: Reading, now: Reading, name: str, wanted: Wanted) -> float:
    return sum(_increases(before, now, name, wanted).values())


def _spread(sources: Sequence[Seen], wanted: Wanted) -> dict[float, float]:
    """Sum the buckets of observations between the last two readings of each source."""
    counts: dict[float, float] = defaultdict(float)
    for seen in sources:
        if seen.before is None or seen.now is None:
            continue
        for labels, value in _increases(seen.before, seen.now, _BUCKETS, wanted).items():
            counts[float(dict(labels)["le"])] += value
    return counts


def _increases(before: Reading, now: Reading, name: str, wanted: Wanted) -> dict[Labels, float]:
    """The growth of each wanted series. A unit that was silent has not grown from 0, so it counts from now on."""
    past = before.of(name)
    returned = {("unit", unit) for unit in before.silent_units}
    return {
        labels: increase(past.get(labels), value)
        for labels, value in now.of(name).items()
        if wanted(labels) and returned.isdisjoint(labels)
    }
