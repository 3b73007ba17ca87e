"""Two plots: the effect of the GIL on a server, and Unlatch's throughput compared with what it replaces."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from bench.gil import Row
from bench.processes import OUT

UNLATCH, OTHER, LIGHT, INK, GRID = "#1f6f8b", "#b9c4cc", "#7fb3c8", "#22303a", "#e6ebee"


def plot_gil(rows: Sequence[Row]) -> Path:
    """Plot throughput (left) and the health check's p99 (right, log scale), with bars for 1 and 2 cores."""
    names = list(dict.fromkeys(row.way.name for row in rows))
    says = {row.way.name: row.way.says for row in rows}
    counts = sorted({row.cores for row in rows})
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(13, 0.75 * len(names) + 1.9), sharey=True, layout="constrained")
        for axis, title, attribute in (
            (axes[0], "Throughput, calls a second", "rate"),
            (axes[1], "Health check beside it, p99 in ms", "p99_ms"),
        ):
            for at, count in enumerate(counts):
                for row in (row for row in rows if row.cores == count):
                    place = names.index(row.way.name) + (at - (len(counts) - 1) / 2) * 0.38
                    value = float(getattr(row, attribute))
                    axis.barh(
                        place, value, height=0.34, color=_shade(row.way.subject == "unlatch", count == counts[-1])
                    )
                    axis.annotate(
                        f"{value:,.0f}" if value >= 10 else f"{value:.1f}", (value, place), xytext=(4, 0),
                        textcoords="offset points", va="center", fontsize=8.5,
                    )  # fmt: skip
            axis.set_xscale("log")
            axis.set_xlim(left=1, right=axis.get_xlim()[1] * 1.8)
            axis.set_title(title, loc="left")
            axis.grid(axis="x", color=GRID)
            axis.set_axisbelow(True)
        axes[1].axvline(20, color="#c0563b", linewidth=1, linestyle="--")
        axes[0].set_yticks(range(len(names)), [says[name] for name in names])
        axes[0].invert_yaxis()
        figure.suptitle(
            "10 ms of work: what it does to the server that runs it", x=0.01, ha="left", fontsize=14, weight="bold"
        )
        figure.supxlabel(
            f"pale: 1 core, full: {counts[-1]} cores · log scales · dashed: 20 ms · blue: Unlatch · "
            "a plain kernel that waits occupies a worker",
            fontsize=9,
        )
        return _save(figure, "gil.png")


def plot_ratios(ratios: dict[str, dict[str, Any]]) -> Path:
    """Plot every ratio that has a floor as a bar from the line of 1, with its spread, floor and aim."""
    shown = {name: ratio for name, ratio in ratios.items() if ratio["value"] is not None and ratio["floor"] is not None}
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(11, 0.62 * len(shown) + 1.9), layout="constrained")
        for place, ratio in enumerate(shown.values()):
            low, high = ratio["spread"]
            value = ratio["value"]
            axis.barh(place, value, height=0.5, color=UNLATCH if ratio["floor_met"] else "#c0563b")
            axis.plot([low, high], [place, place], color=INK, linewidth=1.4)
            axis.plot([ratio["floor"]] * 2, [place - 0.36, place + 0.36], color=INK, linewidth=1.6)
            axis.plot([ratio["aim"]] * 2, [place - 0.36, place + 0.36], color=INK, linewidth=1.6, linestyle=":")
            axis.annotate(
                f"{value:.2f}",
                (max(value, high, ratio["aim"]), place),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
            )
        axis.axvline(1.0, color=OTHER, linewidth=1, zorder=0)
        axis.set_yticks(range(len(shown)), list(shown))
        axis.invert_yaxis()
        axis.margins(x=0.1)
        axis.set_xlim(left=0)
        axis.grid(axis="x", color=GRID)
        axis.set_axisbelow(True)
        axis.set_title(
            "Unlatch's throughput as a multiple of each alternative's", loc="left", fontsize=14, weight="bold"
        )
        axis.set_xlabel("solid mark: floor · dotted mark: aim · line: spread over rounds", fontsize=9)
        return _save(figure, "ratios.png")


STYLE: Any = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "ytick.left": False,
    "font.size": 10,
}


def _shade(unlatch: bool, full: bool) -> str:
    if unlatch:
        return UNLATCH if full else LIGHT
    return "#7d8b95" if full else OTHER


def _save(figure: Any, name: str) -> Path:
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / name
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
