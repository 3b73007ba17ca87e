"""The screen of `top`: the present figures, as wide and high as the terminal.

Colour only repeats what characters show. Names come from users, so all are `Text`, never markup.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from unlatch.cli import plain
from unlatch.cli.top.figures import Figures, ProcessFigures, SlotFigures, Traffic
from unlatch.cli.top.sources import HISTORY_SECONDS, Point, Seen

_MAX_KERNELS = 10
_MAX_LABEL_CELLS = 24
# The minimum columns of a terminal, then the cells of a bar and of a sparkline on it.
_CELLS = ((120, 20, 30), (100, 12, 20), (70, 10, 12), (0, 6, 0))


@dataclass(frozen=True, slots=True)
class Signs:
    """Characters of bars and sparklines."""

    full: str
    empty: str
    levels: str
    micro: str


UNICODE = Signs("█", "░", "▁▂▃▄▅▆▇█", "µs")
ASCII = Signs("#", ".", "_.-=+*%#", "us")


def screen(figures: Figures, width: int, height: int | None, signs: Signs = UNICODE) -> RenderableType:
    """Draw the figures. `height` bounds the lines; None is as many as needed."""
    head = [_headline(figures, signs), *map(_outage, _missing(figures)), *_silent_units(figures)]
    room = None if height is None else max(2, height - len(head) * (2 if width < 80 else 1) - 2)
    shown, hidden = _fitting(figures.processes, room)
    parts: list[RenderableType] = [*head, _processes(shown, figures.at, width, signs)]
    if hidden:
        parts.append(Text(f"and {hidden} more processes, for which this terminal is too small", style="dim"))
    left = _MAX_KERNELS if room is None else min(_MAX_KERNELS, room - len(shown) - 2)
    if figures.kernels and left > 0:
        parts += [Text(), _kernels(figures, left, signs)]
    return Group(*parts)


def bar(ratio: float, cells: int, signs: Signs = UNICODE) -> Text:
    """A bar of a process's utilisation, full at one core."""
    # A source may report anything, even infinity or NaN.
    full = round(min(1.0, max(0.0, ratio)) * cells) if ratio == ratio else 0  # noqa: PLR0124
    style = "red" if ratio > 0.9 else "yellow" if ratio > 0.6 else "green"
    return Text.assemble((signs.full * full, style), (signs.empty * (cells - full), "dim"))


def sparkline(points: Iterable[Point], now: float, cells: int, signs: Signs = UNICODE) -> Text:
    """Utilisation of the last minute, with the present at the right and blanks for missing readings."""
    seconds = HISTORY_SECONDS / cells
    # Points are grouped by fixed spans of the clock, so that the line moves without changing its shape.
    last = int(now / seconds)
    spans: list[list[float]] = [[] for _ in range(cells)]
    for at, value in points:
        back = last - int(at / seconds)
        if 0 <= back < cells:
            spans[cells - 1 - back].append(value)
    top = len(signs.levels) - 1
    levels = (min(top, round(max(0.0, sum(span) / len(span)) * top)) if span else -1 for span in spans)
    return Text("".join(signs.levels[level] if level >= 0 else " " for level in levels), style="cyan")


def duration(seconds: float | None, signs: Signs = UNICODE) -> str:
    """Seconds, written in a suitable unit."""
    if seconds is None:
        return "-"
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} {signs.micro}"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"


def _headline(figures: Figures, signs: Signs) -> Text:
    calls = figures.calls
    parts = [f"{_number(calls.calls_per_second)} calls/s"]
    parts += [f"p50 {duration(calls.p50_seconds, signs)}", f"p99 {duration(calls.p99_seconds, signs)}"]
    parts += [f"queue {_number(figures.queue_depth)}"]
    parts += [f"at the gateway {figures.gateway_queue_depth:.0f}"] if figures.gateway_queue_depth else []
    parts += [f"in flight {_number(figures.in_flight)}"]
    line = Text("  ".join(parts), style="bold")
    errors = ", ".join(f"{plain(code)} {rate:.3g}/s" for code, rate in calls.errors_per_second.items())
    return line.append("  no errors" if not errors else f"  errors: {errors}", style="red" if errors else "dim")


def _missing(figures: Figures) -> list[Seen]:
    return [seen for seen in figures.sources if seen.now is None and seen.since is not None]


def _outage(seen: Seen) -> Text:
    since = time.strftime("%H:%M:%S", time.localtime(seen.since))
    return Text(plain(f"{seen.address} unreachable since {since}: {seen.why}"), style="bold red", overflow="ellipsis")


def _silent_units(figures: Figures) -> list[Text]:
    return [
        Text(plain(f"unit {unit} of {seen.address} does not answer"), style="bold red", overflow="ellipsis")
        for seen in figures.sources
        for unit in (seen.now.silent_units if seen.now else ())
    ]


def _fitting(processes: Sequence[ProcessFigures], room: int | None) -> tuple[Sequence[ProcessFigures], int]:
    if room is None or len(processes) <= room:
        return processes, 0
    return processes[: room - 1], len(processes) - room + 1


def _processes(processes: Sequence[ProcessFigures], now: float, width: int, signs: Signs) -> Table:
    """A table with fewer columns on a narrow terminal: first the sparkline goes, then memory and restarts."""
    label_cells = max(10, min(_MAX_LABEL_CELLS, width // 3))
    bar_cells, spark_cells = next(cells for least, *cells in _CELLS if width >= least)
    columns = [
        Column("process", no_wrap=True, max_width=label_cells),
        Column("unit", justify="right", no_wrap=True),
        Column("use", width=bar_cells),
        Column("", justify="right"),
        Column("last minute", width=spark_cells, no_wrap=True),
        Column("memory", justify="right", no_wrap=True),
        Column("runs", ratio=1, no_wrap=True),
        Column("calls/s", justify="right", no_wrap=True),
        Column("restarts", justify="right", no_wrap=True),
    ]
    is_wide, is_narrow = width >= 100, width < 60
    has_units = any(process.unit for process in processes)
    shown = (True, has_units, True, True, bool(spark_cells), not is_narrow, True, is_wide, not is_narrow)
    table = Table(*compress(columns, shown), box=None, pad_edge=False, expand=True, header_style="bold")
    for process in processes:
        worker = process.worker
        cells = [
            Text(_label(process, label_cells)),
            Text(plain(process.unit)),
            bar(process.utilization_ratio, bar_cells, signs),
            Text(f"{process.utilization_ratio:.0%}"),
            sparkline(process.history, now, spark_cells, signs) if spark_cells else Text(),
            Text(_bytes(process.resident_bytes)),
            _runs(worker, signs),
            Text(_number(worker.calls_per_second) if worker else ""),
            Text(str(worker.restarts) if worker else ""),
        ]
        table.add_row(*compress(cells, shown))
    return table


def _label(process: ProcessFigures, cells: int) -> str:
    # Replicas differ in the end of a long address, so that end is kept; the process's own name is never cut.
    room = cells - len(process.name) - 1
    return plain(f"{process.replica[-room:] if room > 0 else ''} {process.name}".strip())


def _runs(worker: SlotFigures | None, signs: Signs) -> Text:
    if worker is None:
        return Text()
    if not worker.up:
        return Text("down", style="bold red")
    if worker.blocks:
        return Text(f"blocked by {plain(worker.blocks[0])}", style="bold red")
    if worker.calls:
        return Text(f"{worker.calls} calls wait")
    if not worker.kernel:
        return Text("idle", style="dim")
    return Text(f"{plain(worker.kernel)} {duration(worker.running_seconds, signs)}")


def _kernels(figures: Figures, most: int, signs: Signs) -> Table:
    """A table of the busiest kernels."""
    columns = [Column("kernel", ratio=1, no_wrap=True)]
    columns += [Column(title, justify="right", no_wrap=True) for title in ("calls/s", "errors/s", "p50", "p99")]
    table = Table(*columns, box=None, pad_edge=False, expand=True, header_style="bold")
    busiest = sorted(figures.kernels.items(), key=lambda item: (-(item[1].calls_per_second or 0.0), item[0]))
    for name, calls in busiest[:most]:
        table.add_row(Text(plain(name)), *map(Text, _traffic(calls, signs)))
    return table


def _traffic(calls: Traffic, signs: Signs) -> list[str]:
    latencies = [duration(calls.p50_seconds, signs), duration(calls.p99_seconds, signs)]
    return [_number(calls.calls_per_second), _number(sum(calls.errors_per_second.values())), *latencies]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 10 or value == round(value) else f"{value:.1f}"


def _bytes(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
