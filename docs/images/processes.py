"""Draws processes.png, what Grafana's board of processes shows of a mesh at work: `python -m docs.images.processes`.

The queries are the board's own, asked of a real Prometheus that watches a gateway and a replica of four workers: one
busy, one half busy, two idle; then many small calls; then more work than cores; then a worker that is killed again and
again; then kernels that sleep.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

from tests.deploy.monitoring.boards import boards, fill
from tests.deploy.monitoring.load import KERNELS
from tests.deploy.monitoring.prometheus import (
    INTERVAL_SECONDS,
    Prometheus,
    Series,
    Target,
    running_prometheus,
    scraping,
)
from tests.support.mesh import KERNELS as MORE_KERNELS
from tests.support.mesh import Mesh, running_mesh
from unlatch import BlockingClient, UnlatchError

BOARD = next(board for board in boards() if board.uid == "unlatch-processes")
HEAT, TIME, CORE_WAIT, RESTARTS, LAG = 11, 21, 22, 41, 61
# Each part of the load, and how long it goes on.
PART_SECONDS = 17.0
WINDOW_SECONDS = 4 * INTERVAL_SECONDS
# What is counted over a window is asked for once a window.
STEP_SECONDS = {RESTARTS: WINDOW_SECONDS}
PERCENT = "{x:.0%}"
INK, GRID = "#22303a", "#e6ebee"
COLOURS = {
    "on a core": "#56a64b",
    "waits for a core": "#e02f44",
    "waits for something else": "#ff9830",
    "idle": "#d5d9dd",
    "gateway": "#3274d9",
    "dispatcher": "#8f3bb8",
    "forkserver": "#808080",
    **dict(zip((f"worker-{slot}" for slot in range(4)), ("#7f2704", "#d94801", "#fd8d3c", "#fdbe85"), strict=True)),
}
Values = np.ndarray[Any, np.dtype[np.float64]]
STYLE: Any = {
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 9,
    "axes.titlesize": 10,
}


@contextmanager
def callers(mesh: Mesh, count: int, call: Callable[[BlockingClient], object], rest: float = 0.0) -> Iterator[None]:
    """Run `count` threads that call the mesh, rest for `rest` seconds, and call again."""
    ends = threading.Event()

    def go() -> None:
        with BlockingClient(mesh.gateway, timeout=30) as client:
            while not ends.wait(rest):
                call(client)

    threads = [threading.Thread(target=go) for _ in range(count)]
    for thread in threads:
        thread.start()
    yield
    ends.set()
    for thread in threads:
        thread.join()


def computes(client: BlockingClient) -> None:
    """Compute for 40 ms, which is too short to count as a long call."""
    client.simulate(np.random.default_rng().random(8), seconds=0.04)


def asks_for_little(client: BlockingClient) -> None:
    """Make 200 calls that do hardly any work."""
    list(client.map("identity", (np.zeros(64) for _ in range(200))))


def leaves(client: BlockingClient) -> None:
    """Leave a call before its kernel has ended, so that its worker is killed."""
    with suppress(UnlatchError):
        client.record(np.ones(8), seconds=3.0, timeout=0.5)


def sleeps(client: BlockingClient) -> None:
    """Occupy a worker without using a core."""
    client.sleeps(seconds=0.3)


def work(mesh: Mesh) -> None:
    """Make the load, part by part."""
    with callers(mesh, 1, computes), callers(mesh, 1, computes, rest=0.04):
        time.sleep(PART_SECONDS)
        with callers(mesh, 1, asks_for_little):
            time.sleep(PART_SECONDS)
        with callers(mesh, 4, computes):
            time.sleep(PART_SECONDS)
        with callers(mesh, 1, leaves, rest=3.0):
            for _ in range(4):
                # The youngest worker, which has replaced the one that was killed before.
                os.kill(mesh.workers[-1], signal.SIGKILL)
                time.sleep(PART_SECONDS / 4)
    with callers(mesh, 2, sleeps):
        time.sleep(PART_SECONDS)


def shown(prometheus: Prometheus, number: int, began: float, ended: float) -> list[Series]:
    """Ask Prometheus for the series that a panel of the board shows."""
    values = {**BOARD.everything(), "__rate_interval": f"{WINDOW_SECONDS:g}s"}
    queries = [fill(asked.expr, values) for asked in BOARD.asks() if asked.number == number]
    step = STEP_SECONDS.get(number, INTERVAL_SECONDS)
    given = (prometheus.query_range(query, start=began, end=ended, step_seconds=step) for query in queries)
    return [one for series in given for one in series]


def panel(number: int) -> Mapping[str, Any]:
    """Return a panel of the board by its number."""
    return next(one for one in BOARD.panels if one["id"] == number)


class Picture:
    """A picture of five panels: the heat map above, and four others below."""

    def __init__(self, series: Mapping[int, Sequence[Series]], began: float, ended: float) -> None:
        self._series = series
        self._began = began
        self._figure, self._axes = plt.subplot_mosaic(
            [[HEAT, HEAT], [TIME, CORE_WAIT], [RESTARTS, LAG]],
            figsize=(12, 8.5),
            layout="constrained",
            height_ratios=[1.3, 1, 1],
        )
        self._steps = round((ended - began) / INTERVAL_SECONDS) + 1
        self._seconds = np.arange(self._steps) * INTERVAL_SECONDS

    def draw(self, target: Path) -> None:
        """Draw all panels, and save the picture."""
        self._heat()
        self._time()
        self._lines(CORE_WAIT)
        self._lines(LAG)
        self._restarts()
        for number, axis in self._axes.items():
            axis.set_title(panel(number)["title"], loc="left", weight="bold", pad=6 if number == HEAT else 18)
            axis.set_xlim(0, self._seconds[-1])
            if number != HEAT:
                axis.legend(frameon=False, fontsize=7.5, ncols=7, loc="lower left", bbox_to_anchor=(-0.01, 0.98),
                            handlelength=1, columnspacing=1, handletextpad=0.4, borderpad=0)  # fmt: skip
                axis.grid(axis="y", color=GRID)
                axis.set_axisbelow(True)
        self._figure.supxlabel("seconds", fontsize=9)
        self._figure.savefig(target, dpi=110)

    def _values(self, one: Series) -> Values:
        """Return a series at the picture's steps; NaN at steps without a value."""
        values = np.full(self._steps, np.nan)
        for moment, value in one.points:
            values[round((moment - self._began) / INTERVAL_SECONDS)] = value
        return values

    def _heat(self) -> None:
        axis, rows = self._axes[HEAT], self._series[HEAT]
        shades = axis.pcolormesh(
            self._seconds, range(len(rows)), [self._values(one) for one in rows], cmap="Oranges", vmin=0, vmax=1
        )
        axis.set_yticks(range(len(rows)), [one.labels["process"] for one in rows])
        axis.invert_yaxis()
        self._figure.colorbar(shades, ax=axis, pad=0.01, format=PERCENT)

    def _time(self) -> None:
        names = [target["legendFormat"] for target in panel(TIME)["targets"]]
        values = [np.nan_to_num(self._values(one)) for one in self._series[TIME]]
        self._axes[TIME].stackplot(self._seconds, values, labels=names, colors=[COLOURS[name] for name in names])
        self._axes[TIME].set_ylim(0, 1)
        self._axes[TIME].yaxis.set_major_formatter(PERCENT)

    def _lines(self, number: int) -> None:
        axis = self._axes[number]
        for one in self._series[number]:
            name = one.labels["process"]
            axis.plot(self._seconds, self._values(one), label=name, color=COLOURS[name], linewidth=1.2)
        is_ratio = panel(number)["fieldConfig"]["defaults"]["unit"] == "percentunit"
        axis.yaxis.set_major_formatter(PERCENT if is_ratio else lambda value, _: f"{value * 1e3:g} ms")
        axis.set_ylim(bottom=0)

    def _restarts(self) -> None:
        axis, below = self._axes[RESTARTS], np.zeros(self._steps)
        for one in self._series[RESTARTS]:
            values = np.nan_to_num(self._values(one))
            axis.bar(
                self._seconds, values, width=-WINDOW_SECONDS, align="edge", bottom=below, label=one.labels["reason"]
            )
            below += values
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))


def main(target: Path) -> None:
    """Run a mesh and a Prometheus, make the load, and draw what Prometheus has recorded."""
    flags = ["--workers", "4", "--kernels", f"{KERNELS},{MORE_KERNELS}"]
    with ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory()))
        mesh = stack.enter_context(running_mesh(directory, dispatcher=flags))
        targets = [
            Target(job="unlatch-gateway", pod="unlatch-gateway-0", address=mesh.gateway_metrics),
            Target(job="unlatch-compute", pod="unlatch-compute-0", address=mesh.dispatcher_metrics),
        ]
        prometheus = stack.enter_context(running_prometheus(directory, scraping(targets)))
        time.sleep(2 * WINDOW_SECONDS)
        began = time.time()
        work(mesh)
        time.sleep(2 * WINDOW_SECONDS)
        ended = time.time()
        series = {number: shown(prometheus, number, began, ended) for number in (HEAT, TIME, CORE_WAIT, RESTARTS, LAG)}
    with plt.rc_context(STYLE):
        Picture(series, began, ended).draw(target)


main(Path(__file__).with_suffix(".png"))
