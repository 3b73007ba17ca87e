"""Responsiveness under load: health checks, ServerLive and loop lag beside 64 calls of spin10."""

import time
from collections.abc import Callable, Mapping
from statistics import median

from bench.load.load import calls_for, load
from bench.processes import Child
from bench.scrape import scrape
from bench.subjects.oip import Work
from bench.subjects.subjects import Subject, check

IN_FLIGHT = 64
LAG = "unlatch_event_loop_lag_seconds"

Buckets = dict[float, float]


def measure(
    subject: Subject, work: Work, *, rounds: int, seconds: float, on_step: Callable[[str], None]
) -> dict[str, float | None]:
    """Latencies and loop lag at p99 in milliseconds, as medians over several stretches of load; failures are summed."""
    figures = []
    for number in range(rounds):
        on_step(f"{IN_FLIGHT} calls of {work.name} in flight: health, ServerLive, loop lag · {number + 1}/{rounds}")
        figures.append(_once(subject, work, seconds))
    return {
        name: sum(figure[name] or 0 for figure in figures) if "failed" in name else _median(name, figures)
        for name in figures[0]
    }


def _median(name: str, figures: list[dict[str, float | None]]) -> float | None:
    known = [value for figure in figures if (value := figure[name]) is not None]
    return median(known) if known else None


def _once(subject: Subject, work: Work, seconds: float) -> dict[str, float | None]:
    reply_bytes = check(subject, work)
    addresses = ["--health", f"127.0.0.1:{subject.health_port}", "--live", f"127.0.0.1:{subject.port}"]
    body = work.body()
    warm = load(subject.port, body, calls=2 * IN_FLIGHT, in_flight=IN_FLIGHT, reply_bytes=reply_bytes)
    with Child("probe-responsive", "bench.load.probe", *addresses) as probe:
        probe.ask(do="start")
        time.sleep(0.5)
        idle = probe.ask(do="stop")
        before = {name: lag_buckets(port, name) for name, port in subject.metrics.items()}
        probe.ask(do="start")
        calls = calls_for(seconds, warm.calls_per_second, IN_FLIGHT)
        loaded = load(subject.port, body, calls=calls, in_flight=IN_FLIGHT, reply_bytes=reply_bytes)
        beside = probe.ask(do="stop")
        lags = {name: p99_seconds(before[name], lag_buckets(port, name)) for name, port in subject.metrics.items()}
    return {
        "health_p99_ms": beside["health"]["p99_ms"],
        "health_max_ms": beside["health"]["max_ms"],
        "health_idle_p99_ms": idle["health"]["p99_ms"],
        "serverlive_p99_ms": beside["live"]["p99_ms"],
        "serverlive_max_ms": beside["live"]["max_ms"],
        "serverlive_idle_p99_ms": idle["live"]["p99_ms"],
        "probe_late_p99_ms": beside["health"]["late_p99_ms"],
        "failed_checks": beside["health"]["failed"] + beside["live"]["failed"],
        "responsive_calls_per_second": loaded.calls_per_second,
        "responsive_failed_calls": loaded.failed_calls,
        **{f"{name}_loop_lag_p99_ms": None if lag is None else lag * 1e3 for name, lag in lags.items()},
    }


def lag_buckets(port: int, process: str) -> Buckets:
    """Cumulative buckets of the lag histogram, from the series of `process` or the series without that label."""
    buckets: Buckets = {}
    for (name, labels), value in scrape(port).items():
        said = dict(labels)
        if name == f"{LAG}_bucket" and said.get("process", process) == process:
            bound = float(said["le"])
            buckets[bound] = buckets.get(bound, 0.0) + value
    return buckets


def p99_seconds(before: Mapping[float, float], after: Mapping[float, float]) -> float | None:
    """The 99th percentile of observations between two scrapes, linear within its bucket as Prometheus estimates it."""
    grown = sorted((bound, count - before.get(bound, 0.0)) for bound, count in after.items())
    if not grown or grown[-1][1] <= 0:
        return None
    rank = 0.99 * grown[-1][1]
    low, below = 0.0, 0.0
    for bound, count in grown:
        if count >= rank:
            return low if bound == float("inf") else low + (bound - low) * (rank - below) / (count - below)
        low, below = bound, count
    return low
