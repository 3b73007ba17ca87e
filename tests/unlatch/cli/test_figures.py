"""The figures that `top` computes from scrapes, and how it draws them: on any terminal, for any kernel name."""

import io
import math
from bisect import bisect_left
from itertools import accumulate

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from unlatch.cli.top.figures import Figures, figures, increase, quantile
from unlatch.cli.top.screen import ASCII, UNICODE, Signs, bar, duration, screen, sparkline
from unlatch.cli.top.sources import Labels, Reading, Seen
from unlatch.common.telemetry.recorder import LATENCY_BUCKETS

HOSTILE = "[bold red]x[/] \x1b[2J\u202e日本語" + "n" * 300


def labels(**values: str) -> Labels:
    return tuple(sorted(values.items()))


def dispatcher(address: str, at: float, *, calls: float, workers: int = 2, kernel: str = "burns") -> Reading:
    names = ["dispatcher", "forkserver", *(f"worker-{slot}" for slot in range(workers))]
    return Reading(
        at,
        {
            "unlatch_process_utilization_ratio": {labels(process=name): 0.5 for name in names},
            "unlatch_process_resident_memory_bytes": {labels(process=name): 2.0**20 for name in names},
            "unlatch_worker_up": {labels(worker=str(slot)): 1.0 for slot in range(workers)},
            "unlatch_worker_running_seconds": {labels(worker="0", kernel=kernel): 1.5},
            "unlatch_worker_calls_total": {labels(worker="0", kernel=kernel, outcome="ok"): calls},
            "unlatch_worker_restarts_total": {labels(worker="1", reason="killed"): 2.0},
            "unlatch_queue_depth": {labels(component="compute"): 3.0},
            "unlatch_calls_total": {labels(component="compute", kernel=kernel, code="OK"): calls},
        },
    )


def gateway(at: float, *, good: float, bad: float, kernel: str = "burns") -> Reading:
    buckets = {0.1: good / 2, 1.0: good + bad, math.inf: good + bad}
    return Reading(
        at,
        {
            "unlatch_process_utilization_ratio": {labels(process="gateway"): 0.25},
            "unlatch_calls_total": {
                labels(component="gateway", kernel=kernel, code="OK"): good,
                labels(component="gateway", kernel=kernel, code="INTERNAL"): bad,
            },
            "unlatch_call_seconds_bucket": {
                labels(component="gateway", kernel=kernel, stage="total", le=str(bound)): count
                for bound, count in buckets.items()
            },
            "unlatch_queue_depth": {labels(component="gateway"): 0.0},
            "unlatch_calls_in_flight": {labels(component="gateway"): 7.0},
        },
    )


def seen(address: str, before: Reading | None, now: Reading) -> Seen:
    history = dict.fromkeys(now.of("unlatch_process_utilization_ratio"), ((now.at, 0.5),))
    return Seen(address=address, before=before, now=now, history=history)


def one_mesh(kernel: str = "burns", workers: int = 2) -> Figures:
    door = seen("g:1", gateway(10, good=10, bad=2, kernel=kernel), gateway(12, good=30, bad=6, kernel=kernel))
    replica = seen(
        "f:1", dispatcher("f:1", 10, calls=5), dispatcher("f:1", 12, calls=9, workers=workers, kernel=kernel)
    )
    return figures([replica, door], 12.0)


def test_rates_are_of_the_last_interval() -> None:
    """Calls and errors a second come from the time between two scrapes. The gateway is first, workers go by number."""
    shown = one_mesh()
    assert shown.calls.calls_per_second == 12.0
    assert shown.calls.errors_per_second == {"INTERNAL": 2.0}
    assert shown.kernels["burns"].calls_per_second == 12.0
    assert (shown.queue_depth, shown.gateway_queue_depth, shown.in_flight) == (3.0, 0.0, 7.0)
    assert [process.name for process in shown.processes] == [
        "gateway",
        "dispatcher",
        "forkserver",
        "worker-0",
        "worker-1",
    ]
    first, second = (process.worker for process in shown.processes[-2:])
    assert first is not None
    assert second is not None
    assert (first.kernel, first.running_seconds, first.calls_per_second, first.restarts) == ("burns", 1.5, 2.0, 0)
    assert (second.kernel, second.restarts) == ("", 2)


def unit(at: float, *, good: float, bad: float, calls: float) -> Reading:
    """The series of a gateway and a replica in one process."""
    parts = gateway(at, good=good, bad=bad), dispatcher("u:1", at, calls=calls)
    names = {name for part in parts for name in part.series}
    series = {name: {**parts[0].of(name), **parts[1].of(name)} for name in names}
    shares = {labels(process=name): 0.5 for name in ("worker-1", "worker-0", "forkserver", "unit")}
    return Reading(at, {**series, "unlatch_process_utilization_ratio": shares})


def test_unit_is_a_gateway_and_a_replica() -> None:
    """Both are read at the same address. Calls are counted once, as at the gateway, and each queue by itself."""
    shown = figures([seen("u:1", unit(10, good=10, bad=2, calls=5), unit(12, good=30, bad=6, calls=9))], 12.0)
    assert shown.calls.calls_per_second == 12.0
    assert shown.kernels["burns"].calls_per_second == 12.0
    assert (shown.queue_depth, shown.gateway_queue_depth, shown.in_flight) == (3.0, 0.0, 7.0)
    assert [process.name for process in shown.processes] == ["unit", "forkserver", "worker-0", "worker-1"]
    first = shown.processes[2].worker
    assert first is not None
    assert (first.kernel, first.calls_per_second) == ("burns", 2.0)


def units(at: float, *readings: Reading | None) -> Reading:
    """The series of several units as their supervisor serves them. A unit without a reading did not answer."""
    series: dict[str, dict[Labels, float]] = {
        "unlatch_process_utilization_ratio": {labels(process="supervisor"): 0.01},
        "unlatch_unit_up": {
            labels(unit=str(number)): float(reading is not None) for number, reading in enumerate(readings)
        },
    }
    for number, reading in enumerate(readings):
        for name, found in reading.series.items() if reading else ():
            of_unit = {labels(**dict(key), unit=str(number)): value for key, value in found.items()}
            series[name] = {**series.get(name, {}), **of_unit}
    return Reading(at, series)


def test_units_are_told_apart_and_added_up() -> None:
    """Calls and queues are sums over all units, and each process is shown with the number of its unit."""
    before = units(10, unit(10, good=10, bad=2, calls=5), unit(10, good=100, bad=20, calls=50))
    now = units(12, unit(12, good=30, bad=6, calls=9), unit(12, good=140, bad=28, calls=58))
    shown = figures([seen("u:1", before, now)], 12.0)
    assert shown.calls.calls_per_second == 12.0 + 24.0
    assert shown.calls.errors_per_second == {"INTERNAL": 2.0 + 4.0}
    assert shown.kernels["burns"].calls_per_second == 36.0
    assert (shown.queue_depth, shown.gateway_queue_depth, shown.in_flight) == (6.0, 0.0, 14.0)
    of_a_unit = ["unit", "forkserver", "worker-0", "worker-1"]
    assert [(process.unit, process.name) for process in shown.processes] == [
        ("", "supervisor"),
        *(("0", name) for name in of_a_unit),
        *(("1", name) for name in of_a_unit),
    ]
    rates = [process.worker.calls_per_second for process in shown.processes if process.worker is not None]
    assert rates == [2.0, 0.0, 4.0, 0.0]
    for width in (40, 80, 120):
        lines = drawn(shown, width, None)
        assert [line.split()[:2] for line in lines if line.startswith("worker-1")] == [
            ["worker-1", "0"],
            ["worker-1", "1"],
        ]
        assert any(line.split()[:2] == ["process", "unit"] for line in lines)
    assert not any("unit" in line.split() for line in drawn(one_mesh(), 120, None))


def test_unit_that_was_silent_has_no_rate_from_0() -> None:
    """A unit that does not answer is named. Its counters are not new when it is there again, as if all were of now."""
    whole = units(10, unit(10, good=10, bad=0, calls=5), unit(10, good=9000, bad=0, calls=4000))
    half = units(12, unit(12, good=30, bad=0, calls=9), None)
    again = units(14, unit(14, good=50, bad=0, calls=13), unit(14, good=9990, bad=0, calls=4995))
    shown = figures([seen("u:1", whole, half)], 12.0)
    assert shown.calls.calls_per_second == 10.0
    assert "unit 1 of u:1 does not answer" in drawn(shown, 80, 24)[1]
    shown = figures([seen("u:1", half, again)], 14.0)
    assert shown.calls.calls_per_second == 10.0
    assert shown.processes[-2].worker is not None
    assert shown.processes[-2].worker.calls_per_second == 0.0
    assert "does not answer" not in "\n".join(drawn(shown, 80, 24))


def test_counters_that_begin_anew_give_no_negative_rate() -> None:
    """After a restart the new count is the gain. A series that was missing before began at 0."""
    assert increase(100.0, 3.0) == 3.0
    assert increase(None, 3.0) == 3.0
    assert increase(1.0, 3.0) == 2.0
    again = figures([seen("g:1", gateway(10, good=1000, bad=50), gateway(12, good=4, bad=0))], 12.0)
    assert again.calls.calls_per_second == 2.0
    assert again.calls.errors_per_second == {}
    first = figures([Seen(address="g:1", now=gateway(12, good=4, bad=0))], 12.0)
    assert first.calls.calls_per_second is None


def test_several_replicas_are_told_apart() -> None:
    """With several replicas a process carries its replica's address, and calls are counted once, at the gateway."""
    doors = seen("g:1", gateway(10, good=0, bad=0), gateway(12, good=20, bad=0))
    replicas = [seen(name, dispatcher(name, 10, calls=0), dispatcher(name, 12, calls=10)) for name in ("a:1", "b:1")]
    shown = figures([doors, *replicas], 12.0)
    assert [(process.replica, process.name) for process in shown.processes if process.name == "worker-0"] == [
        ("a:1", "worker-0"),
        ("b:1", "worker-0"),
    ]
    assert shown.queue_depth == 6.0
    for width in (40, 80, 120):
        text = "\n".join(drawn(shown, width, None))
        assert all(f"{name[-3:]} worker-1" in text for name in ("a:1", "b:1")), text
    assert shown.calls.calls_per_second == 10.0
    assert figures(replicas, 12.0).calls.calls_per_second == 10.0


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_quantiles_lie_in_the_right_bucket(share: float) -> None:
    """Of a thousand latencies the estimate lies between the bounds that contain the true quantile."""
    values = np.random.default_rng(3).lognormal(-4, 1, 1000)
    bounds = [*LATENCY_BUCKETS, math.inf]
    counts = np.bincount([bisect_left(bounds, value) for value in values], minlength=len(bounds))
    estimate = quantile(share, dict(zip(bounds, map(float, accumulate(counts)), strict=True)))
    assert estimate is not None
    at = bisect_left(bounds, float(np.quantile(values, share)))
    assert bounds[at - 1] <= estimate <= bounds[at]


def test_quantiles_of_little() -> None:
    """An empty histogram has no quantile. Beyond the last finite bound, that bound is the estimate."""
    assert quantile(0.5, {}) is None
    assert quantile(0.5, {1.0: 0.0, math.inf: 0.0}) is None
    assert quantile(0.5, {1.0: 0.0, math.inf: 5.0}) == 1.0
    assert quantile(0.5, {2.0: 4.0, math.inf: 4.0}) == 1.0


def drawn(shown: Figures, width: int, height: int | None, signs: Signs = UNICODE) -> list[str]:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=False, color_system=None)
    console.print(screen(shown, width, height, signs))
    return file.getvalue().splitlines()


@pytest.mark.parametrize("width", [20, 40, 59, 60, 79, 80, 100, 120, 250])
@pytest.mark.parametrize("height", [5, 12, 24, None])
def test_every_size_holds_the_picture(width: int, height: int | None) -> None:
    """No line is wider than the terminal, and the picture is not higher. From 40 columns on all names can be read."""
    lines = drawn(one_mesh(), width, height)
    assert max(map(cell_len, lines)) <= width
    if height is None and width >= 40:
        text = "\n".join(lines)
        assert all(
            name in text for name in ("gateway", "dispatcher", "worker-0", "worker-1", "50%", "burns 1.5 s", "idle")
        )
    if height is not None and height >= 12 and width >= 40:
        assert len(lines) <= height


@pytest.mark.parametrize("width", [40, 80, 160])
def test_names_are_shown_and_never_obeyed(width: int) -> None:
    """Markup is printed as it is written, control characters are replaced, long and wide names are cut."""
    lines = drawn(one_mesh(kernel=HOSTILE), width, 24)
    text = "\n".join(lines)
    assert max(map(cell_len, lines)) <= width
    assert not set(text) & {"\x1b", "\u202e"}
    assert "[bold red]x" in text


def test_more_workers_than_lines() -> None:
    """Workers that have no room are counted."""
    lines = drawn(one_mesh(workers=64), 80, 24)
    assert len(lines) <= 24
    assert "more processes" in "\n".join(lines)


def test_an_outage_is_told() -> None:
    """An outage is shown with its time and reason, and everything else is still drawn."""
    gone = Seen(address="f:1", since=0.0, why="Connection refused")
    text = "\n".join(drawn(figures([seen("g:1", None, gateway(1, good=1, bad=0)), gone], 1.0), 100, 24))
    assert "f:1 unreachable since " in text
    assert "Connection refused" in text
    assert "gateway" in text


def test_plain_characters_where_there_are_no_others() -> None:
    """A terminal that shows ASCII only gets a picture in ASCII."""
    text = "\n".join(drawn(one_mesh(), 120, 24, ASCII))
    assert text.isascii()
    assert "##########" in text


def test_bars_and_sparklines() -> None:
    """A bar is full at one core.

    A sparkline has a cell for each part of the last minute, blank where there was nothing.
    """
    assert bar(0.5, 10).plain == "█████░░░░░"
    assert bar(3.2, 10).plain == "█" * 10
    assert bar(0.0, 10).plain == "░" * 10
    assert sparkline([(119.0, 1.0), (61.0, 0.0), (10.0, 1.0)], 119.5, 6).plain == "▁    █"
    assert sparkline([(119.0, 2.0), (118.0, 0.0)], 119.5, 6).plain == "     █"
    assert [duration(s) for s in (None, 0.0002, 0.0123, 2.0, 125.0)] == [
        "-",
        "200 µs",
        "12.3 ms",
        "2.0 s",
        "2 min 05 s",
    ]


def test_an_async_worker_shows_its_calls_and_what_blocks_its_loop() -> None:
    """The row of an async worker has the number of its calls, and names a kernel that blocks its event loop."""

    def reading(at: float, blocked: float) -> Reading:
        found = dispatcher("d", at, calls=1.0)
        of_worker = {
            "unlatch_worker_calls_in_flight": {labels(worker="1"): 312.0},
            "unlatch_worker_loop_blocked_total": {labels(worker="1", kernel="parses"): blocked},
        }
        return Reading(at, {**found.series, **of_worker})

    def row(before: float, now: float) -> str:
        seen = Seen(address="d", before=reading(1.0, before), now=reading(2.0, now))
        found = figures([seen], 2.0)
        console = Console(width=120, file=io.StringIO(), record=True)
        console.print(screen(found, 120, None))
        return next(line for line in console.export_text().splitlines() if "worker-1" in line)

    assert "312 calls wait" in row(1.0, 1.0)
    assert "blocked by parses" in row(1.0, 2.0)
