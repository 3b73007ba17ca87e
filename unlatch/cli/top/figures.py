"""From readings to figures: rates over the last interval, quantiles, and the kernels that workers run."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from unlatch.cli.top.sources import Labels, Point, Reading, Seen

_CALLS = "unlatch_calls_total"
_BUCKETS = "unlatch_call_seconds_bucket"
_WORKER = "worker-"


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotFigures:
    """Figures of one slot of a pool. `kernel` is empty while the slot runs none."""

    up: bool
    kernel: str
    running_seconds: float
    calls_per_second: float | None
    restarts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessFigures:
    """Figures of one process. `history` is its utilisation over the last minute."""

    name: str
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
    """Combine sources. Figures of callers come from gateways, or from the replicas if no gateway is read."""
    read = [seen for seen in sources if seen.now is not None]
    dispatchers = [seen for seen in read if _is_dispatcher(seen)]
    gateways = [seen for seen in read if not _is_dispatcher(seen)]
    telling = gateways or dispatchers
    kernels = sorted({dict(labels)["kernel"] for seen in telling for labels in _now(seen, _CALLS)})
    return Figures(
        at=at,
        sources=sources,
        processes=_all_processes([*gateways, *dispatchers], named=len(sources) > 2),
        calls=_traffic(telling, lambda _: True),
        kernels={name: _traffic(telling, _is(name)) for name in kernels},
        queue_depth=_total(dispatchers, "unlatch_queue_depth"),
        gateway_queue_depth=_total(gateways, "unlatch_queue_depth"),
        in_flight=_total(gateways, "unlatch_calls_in_flight"),
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


def _is_dispatcher(seen: Seen) -> bool:
    return seen.now is not None and "unlatch_worker_up" in seen.now.series


def _now(seen: Seen, name: str) -> Mapping[Labels, float]:
    return seen.now.of(name) if seen.now else {}


def _total(sources: Sequence[Seen], name: str) -> float | None:
    return sum(sum(_now(seen, name).values()) for seen in sources) if sources else None


def _all_processes(sources: Sequence[Seen], *, named: bool) -> list[ProcessFigures]:
    """The processes of all sources; `named` adds their source's address."""
    return [process for seen in sources for process in _processes(seen, replica=seen.address if named else "")]


def _processes(seen: Seen, replica: str) -> list[ProcessFigures]:
    resident = _now(seen, "unlatch_process_resident_memory_bytes")
    return [
        ProcessFigures(
            name=(name := dict(labels)["process"]),
            replica=replica,
            utilization_ratio=utilization,
            resident_bytes=resident.get(labels, 0.0),
            worker=_worker(seen, name.removeprefix(_WORKER)) if name.startswith(_WORKER) else None,
            history=seen.history.get(name, ()),
        )
        for labels, utilization in sorted(_now(seen, "unlatch_process_utilization_ratio").items(), key=_by_name)
    ]


def _by_name(item: tuple[Labels, float]) -> tuple[bool, int, str]:
    """A sort key: the services' own processes first, then the processes that they started, workers by number."""
    name = dict(item[0])["process"]
    number = name.removeprefix(_WORKER)
    return name not in ("gateway", "dispatcher"), int(number) if number.isdecimal() else -1, name


def _worker(seen: Seen, slot: str) -> SlotFigures:
    def mine(name: str) -> dict[Labels, float]:
        return {labels: value for labels, value in _now(seen, name).items() if ("worker", slot) in labels}

    running = mine("unlatch_worker_running_seconds")
    kernel, seconds = next(((dict(labels)["kernel"], value) for labels, value in running.items()), ("", 0.0))
    return SlotFigures(
        up=any(mine("unlatch_worker_up").values()),
        kernel=kernel,
        running_seconds=seconds,
        calls_per_second=_rate([seen], "unlatch_worker_calls_total", lambda labels: ("worker", slot) in labels),
        restarts=round(sum(mine("unlatch_worker_restarts_total").values())),
    )


def _is(kernel: str) -> Callable[[Labels], bool]:
    return lambda labels: ("kernel", kernel) in labels


def _traffic(sources: Sequence[Seen], wanted: Callable[[Labels], bool]) -> Traffic:
    errors = {dict(labels)["code"] for seen in sources for labels in _now(seen, _CALLS) if wanted(labels)} - {"OK"}
    rates = {code: _rate(sources, _CALLS, _both(wanted, ("code", code))) or 0.0 for code in sorted(errors)}
    spread = _spread(sources, _both(wanted, ("stage", "total")))
    return Traffic(
        calls_per_second=_rate(sources, _CALLS, wanted),
        errors_per_second={code: rate for code, rate in rates.items() if rate},
        p50_seconds=quantile(0.5, spread),
        p99_seconds=quantile(0.99, spread),
    )


def _both(wanted: Callable[[Labels], bool], label: tuple[str, str]) -> Callable[[Labels], bool]:
    return lambda labels: wanted(labels) and label in labels


def _rate(sources: Sequence[Seen], name: str, wanted: Callable[[Labels], bool]) -> float | None:
    pairs = [(seen.before, seen.now) for seen in sources if seen.before is not None and seen.now is not None]
    if not pairs:
        return None
    return sum(_grown(before, now, name, wanted) / (now.at - before.at) for before, now in pairs)


def _grown(before: Reading, now: Reading, name: str, wanted: Callable[[Labels], bool]) -> float:
    past = before.of(name)
    return sum(increase(past.get(labels), value) for labels, value in now.of(name).items() if wanted(labels))


def _spread(sources: Sequence[Seen], wanted: Callable[[Labels], bool]) -> dict[float, float]:
    """Sum the buckets of observations between the last two readings of each source."""
    counts: dict[float, float] = defaultdict(float)
    for seen in sources:
        if seen.before is None or seen.now is None:
            continue
        past = seen.before.of(_BUCKETS)
        for labels, value in seen.now.of(_BUCKETS).items():
            if wanted(labels):
                counts[float(dict(labels)["le"])] += increase(past.get(labels), value)
    return counts
