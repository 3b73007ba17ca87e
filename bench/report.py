"""Results: ratios with their floors and aims, tables for the reader, and one JSON file with stable names."""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import gil
from bench.bounds import Bound, judged
from bench.fleet import measure as fleet
from bench.gil import Idle, Row
from bench.pool import measure as pool
from bench.pool import scan
from bench.processes import OUT, ROOT, cores, load_core
from bench.starved import measure as starved
from bench.throughput import Cell
from bench.waiting import measure as waiting


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A ratio of two cells' rates in one run, and its required value."""

    name: str
    over: tuple[str, str]
    under: tuple[str, str]
    floor: float | None = None
    aim: float | None = None


def _unlatch(name: str, case: str, against: str, floor: float | None = None, aim: float | None = None) -> Wanted:
    return Wanted(name=name, over=(case, "unlatch"), under=(case, against), floor=floor, aim=aim)


def _map(name: str, against: tuple[str, str], floor: float | None = None, aim: float | None = None) -> Wanted:
    return Wanted(name=name, over=("client_1k_c64", "map"), under=against, floor=floor, aim=aim)


def _units(name: str, case: str, floor: float | None = None, aim: float | None = None) -> Wanted:
    return Wanted(name=name, over=(case, "two units"), under=(case, "one unit"), floor=floor, aim=aim)


WANTED = (
    _unlatch("identity_1k_c32_vs_recipe", "identity_1k_c32", "recipe", 1.25, 1.6),
    _unlatch("identity_1k_c32_vs_echo", "identity_1k_c32", "echo", 0.45, 0.6),
    _unlatch("identity_1m_c32_vs_recipe", "identity_1m_c32", "recipe", 2.4, 3.0),
    _unlatch("cpu10_c32_vs_bare", "spin10_c32", "bare", 0.93, 0.96),
    _unlatch("elementwise_c32_vs_bare", "elementwise_c32", "bare", 1.8, 2.5),
    _map("map_1k_vs_call", ("client_1k_c1", "call"), 3.0, 4.0),
    _map("map_1k_vs_gathered", ("client_1k_c32", "gathered")),
    _map("map_1k_vs_unary", ("client_1k_c32", "unary")),
    Wanted(
        name="gather_16k_vs_map",
        over=("client_1k_c16000", "gathered_16k"),
        under=("client_1k_c64", "map"),
        floor=0.8,
        aim=0.9,
    ),
    _unlatch("identity_1k_c1_vs_recipe", "identity_1k_c1", "recipe", 0.9, 1.1),
    _unlatch("unit_1k_c1_vs_apart", "identity_1k_c1", "apart"),
    _unlatch("unit_1k_c32_vs_apart", "identity_1k_c32", "apart"),
    _unlatch("unit_1m_c32_vs_apart", "identity_1m_c32", "apart"),
    _unlatch("unit_cpu10_c32_vs_apart", "spin10_c32", "apart"),
    _units("units_2_vs_1_1k_c32", "identity_1k_c32", 1.2, 1.5),
    _units("units_2_vs_1_1m_c32", "identity_1m_c32"),
    _units("units_2_vs_1_cpu10", "spin10_c32", 0.98, 1.0),
    _unlatch("identity_1k_c1_vs_echo", "identity_1k_c1", "echo"),
    _unlatch("identity_1m_c1_vs_recipe", "identity_1m_c1", "recipe"),
    _unlatch("identity_1m_c1_vs_echo", "identity_1m_c1", "echo"),
    _unlatch("identity_1m_c32_vs_echo", "identity_1m_c32", "echo"),
    _unlatch("cpu10_c1_vs_recipe", "spin10_c1", "recipe"),
    _unlatch("cpu10_c32_vs_recipe", "spin10_c32", "recipe"),
    _unlatch("elementwise_c32_vs_recipe", "elementwise_c32", "recipe"),
    Wanted(name="tls_1k_c32_vs_plaintext", over=("identity_1k_c32", "tls"), under=("identity_1k_c32", "plaintext")),
    Wanted(name="tls_1m_c32_vs_plaintext", over=("identity_1m_c32", "tls"), under=("identity_1m_c32", "plaintext")),
)
# Maximum milliseconds.
BOUNDS_MS = {
    "health_p99_ms": 20.0,
    "serverlive_p99_ms": 20.0,
    "unit_loop_lag_p99_ms": 10.0,
    "gateway_loop_lag_p99_ms": 10.0,
    "dispatcher_loop_lag_p99_ms": 10.0,
    "small_beside_64mib_delay_ms": 20.0,
}
PACKAGES = ("unlatch", "grpcio", "protobuf", "uvloop", "numpy")


@dataclass(slots=True, kw_only=True)
class Findings:
    """All results of one run. Parts that were not selected stay empty."""

    settings: dict[str, Any]
    cells: list[Cell] = field(default_factory=list)
    gil: list[Row] = field(default_factory=list)
    gil_idle: list[Idle] = field(default_factory=list)
    responsive: dict[str, float | None] = field(default_factory=dict)
    beside: list[dict[str, Any]] = field(default_factory=list)
    pool: dict[str, float] = field(default_factory=dict)
    scan: dict[str, float] = field(default_factory=dict)
    waiting: dict[str, float] = field(default_factory=dict)
    starved: dict[str, float] = field(default_factory=dict)
    fleet: dict[str, float] = field(default_factory=dict)


def ratios(cells: Iterable[Cell]) -> dict[str, dict[str, Any]]:
    """Take each ratio within a round, when the machine was equal for both sides; return the median of rounds."""
    by_key = {(cell.case, cell.subject): cell for cell in cells}
    found: dict[str, dict[str, Any]] = {}
    for wanted in WANTED:
        over, under = by_key.get(wanted.over), by_key.get(wanted.under)
        asked: dict[str, Any] = {"floor": wanted.floor, "aim": wanted.aim}
        if over is None or under is None:
            found[wanted.name] = {"value": None, **asked, "floor_met": None, "aim_met": None, "spread": None}
            continue
        each = [a / b for a, b in zip(over.rates, under.rates, strict=True)]
        value, whole = median(each), not sum(over.failed_calls) + sum(under.failed_calls)
        found[wanted.name] = {
            "value": value,
            **asked,
            "floor_met": None if wanted.floor is None else whole and value >= wanted.floor,
            "aim_met": None if wanted.aim is None else whole and value >= wanted.aim,
            "spread": [min(each), max(each)],
        }
    return found


def bounds(findings: Findings) -> dict[str, dict[str, Any]]:
    """Figures that have an upper bound."""
    values: dict[str, float | None] = {name: findings.responsive.get(name) for name in BOUNDS_MS}
    if findings.beside:
        values["small_beside_64mib_delay_ms"] = max(passed["delay_ms"] for passed in findings.beside)
    return {
        name: {
            "value": values[name],
            "at_most": most,
            "met": None if values[name] is None else _at_most(values[name], most),
        }
        for name, most in BOUNDS_MS.items()
    }


def document(findings: Findings) -> dict[str, Any]:
    """All results, under stable names."""
    limits = bounds(findings)
    return {
        "schema": 1,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": findings.settings,
        "machine": machine(),
        "ratios": ratios(findings.cells),
        "bounds": limits,
        "figures": {**_figures(findings), **{name: limit["value"] for name, limit in limits.items()}},
        "failed_calls": failed_calls(findings),
        "throughput": [
            {
                "case": cell.case,
                "subject": cell.subject,
                "calls_per_second": cell.rate,
                "rounds": cell.rates,
                "mean_ms": median(cell.mean_ms) if cell.mean_ms else None,
                "cpu_us_per_call": cell.cpu(),
                "failed_calls": sum(cell.failed_calls),
            }
            for cell in findings.cells
        ],
        "gil": [
            {
                "way": row.way.name,
                "says": row.way.says,
                "cores": row.cores,
                "in_flight": row.way.in_flight,
                "calls_per_second": row.rate,
                "rounds": row.rates,
                "health_p99_ms": row.p99_ms,
                "health_p99_ms_rounds": row.health_p99_ms,
                "failed_checks": sum(row.failed_checks),
                "failed_calls": sum(row.failed_calls),
                "cpu_us_per_call": row.cpu_us[-1],
            }
            for row in findings.gil
        ],
        "gil_idle_health_p99_ms": {
            f"{idle.subject}_{idle.cores}cores": idle.health_p99_ms for idle in findings.gil_idle
        },
        "gil_bounds": judged(gil.figures(findings.gil), gil.BOUNDS),
        "beside_64mib": findings.beside,
        "pool": judged(findings.pool, pool.BOUNDS),
        "scan": judged(findings.scan, scan.BOUNDS),
        "fleet": judged(findings.fleet, fleet.BOUNDS),
        "waiting": judged(findings.waiting, waiting.BOUNDS),
        "starved": judged(findings.starved, starved.BOUNDS),
    }


def failed_calls(findings: Findings) -> int:
    rows = sum(sum(row.failed_calls) for row in findings.gil)
    return (
        rows
        + sum(sum(cell.failed_calls) for cell in findings.cells)
        + int(findings.responsive.get("responsive_failed_calls") or 0)
        + int(sum(findings.waiting.get(f"{case}_failed", 0.0) for case in waiting.CASES))
        + int(sum(findings.starved.get(bound.name, 0.0) for bound in starved.BOUNDS))
    )


def write(findings: Findings) -> Path:
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / "bench.json"
    path.write_text(json.dumps(document(findings), indent=2) + "\n")
    return path


def show(findings: Findings, console: Console) -> None:
    if findings.cells:
        console.print(_throughput_table(findings.cells))
        if (table := _ratio_table(ratios(findings.cells))).row_count:
            console.print(table)
    if findings.gil:
        console.print(_gil_table(findings.gil, findings.gil_idle))
        console.print(_judged_table("`async def` against an async handler", gil.figures(findings.gil), gil.BOUNDS))
    if findings.responsive or findings.beside:
        console.print(_bound_table(bounds(findings), findings))
    for title, found, limits in (
        ("The pool: hurt, crowded, and asked for many small things", findings.pool, pool.BOUNDS),
        (f"CPU of the dispatcher a call, {scan.MANY} stub workers against {scan.FEW}", findings.scan, scan.BOUNDS),
        ("Three replicas, one of them four times slower", findings.fleet, fleet.BOUNDS),
        ("Ten thousand calls in flight, behind busy workers", findings.waiting, waiting.BOUNDS),
        ("Beside busy processes of another session, and while replicas are killed", findings.starved, starved.BOUNDS),
    ):
        if found:
            console.print(_judged_table(title, found, limits))
    if failed := failed_calls(findings):
        console.print(f"[bold red]{failed} calls failed; the ratios they touch count as not met[/]")


def machine() -> dict[str, Any]:
    """The machine on which the figures were measured."""
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), ""
    )
    memory = next((int(line.split()[1]) << 10 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), None)
    return {
        "cpu": model,
        "cores": len(cores()),
        "load_core": load_core(),
        "memory_bytes": memory,
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "h2load": _said_by("h2load", "--version"),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _said_by("git", "rev-parse", "HEAD"),
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if "BLAS" in name or name.startswith("OMP_")
        },
        "load_average_at_end": os.getloadavg(),
    }


def _figures(findings: Findings) -> dict[str, float | None]:
    figures: dict[str, float | None] = {}
    for cell in findings.cells:
        name = f"{cell.case}_{cell.subject}"
        figures[f"{name}_calls_per_second"] = cell.rate
        for process, cpu in cell.cpu().items():
            figures[f"{name}_cpu_us_{process.replace(' ', '_')}"] = cpu
    for row in findings.gil:
        name = f"gil_{row.way.name}_{row.cores}cores"
        figures[f"{name}_calls_per_second"], figures[f"{name}_health_p99_ms"] = row.rate, row.p99_ms
    figures.update(findings.responsive)
    parts = gil, pool, scan, fleet, waiting, starved
    figures.update(dict.fromkeys(bound.name for part in parts for bound in part.BOUNDS))
    figures.update(gil.figures(findings.gil))
    figures.update(findings.pool)
    figures.update(findings.scan)
    figures.update(findings.fleet)
    figures.update(findings.waiting)
    figures.update(findings.starved)
    if findings.beside:
        figures["small_beside_64mib_delay_median_ms"] = median(passed["delay_ms"] for passed in findings.beside)
        figures["small_beside_64mib_late_ms"] = max(passed["late_max_ms"] for passed in findings.beside)
        figures["large_64mib_seconds"] = median(passed["large_seconds"] for passed in findings.beside)
    return figures


def _throughput_table(cells: Sequence[Cell]) -> Table:
    table = Table(title="Throughput, and CPU µs a call by process (medians of rounds)", title_justify="left")
    for name, justify in (
        ("work", "left"),
        ("subject", "left"),
        ("calls/s", "right"),
        ("spread", "right"),
        ("mean ms", "right"),
    ):
        table.add_column(name, justify="right" if justify == "right" else "left")
    table.add_column("CPU µs a call")
    for at, cell in enumerate(cells):
        failed = sum(cell.failed_calls)
        cpu = " · ".join(f"{name} {us:,.0f}" for name, us in cell.cpu().items() if us >= 0.5)
        table.add_row(
            cell.case,
            cell.subject,
            f"{cell.rate:,.0f}" if cell.rate >= 1000 else f"{cell.rate:,.1f}",
            f"{min(cell.rates):,.0f}-{max(cell.rates):,.0f}",
            f"{median(cell.mean_ms):,.2f}" if any(cell.mean_ms) else "",
            cpu + (f" [bold red]{failed} failed[/]" if failed else ""),
            end_section=at + 1 < len(cells) and cells[at + 1].case != cell.case,
        )
    return table


def _ratio_table(found: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="Ratios (within a round; median)", title_justify="left")
    table.add_column("ratio")
    for name in ("value", "spread", "floor", "aim"):
        table.add_column(name, justify="right")
    table.add_column("")
    for name, ratio in found.items():
        if ratio["value"] is None:
            continue
        low, high = ratio["spread"]
        table.add_row(
            name,
            f"{ratio['value']:.2f}",
            f"{low:.2f}-{high:.2f}",
            _number(ratio["floor"]),
            _number(ratio["aim"]),
            _verdict(ratio),
        )
    return table


def _gil_table(rows: Sequence[Row], idle: Sequence[Idle]) -> Table:
    table = Table(title="10 ms of work, three ways; a health check every 20 ms beside it", title_justify="left")
    table.add_column("way")
    counts = sorted({row.cores for row in rows})
    for count in counts:
        table.add_column(f"calls/s, {count} core(s)", justify="right")
        table.add_column(f"health p99 ms, {count} core(s)", justify="right")
    for name in dict.fromkeys(row.way.name for row in rows):
        table.add_row(*_gil_cells({row.cores: row for row in rows if row.way.name == name}, counts))
    quiet = [f"{max(i.health_p99_ms for i in idle if i.cores == count):,.1f}" for count in counts]
    table.add_row(
        "(no load; the worst of the servers)", *(cell for figure in quiet for cell in ("", figure)), style="dim"
    )
    table.caption = "A plain kernel that waits occupies a worker."
    return table


def _gil_cells(each: Mapping[int, Row], counts: Sequence[int]) -> list[str]:
    figures = [figure for count in counts for figure in (f"{each[count].rate:,.0f}", f"{each[count].p99_ms:,.1f}")]
    return [next(iter(each.values())).way.says, *figures]


def _bound_table(limits: dict[str, dict[str, Any]], findings: Findings) -> Table:
    table = Table(title="Beside 64 calls of spin10 in flight; 1 KiB calls beside a 64 MiB call", title_justify="left")
    table.add_column("figure")
    table.add_column("ms", justify="right")
    table.add_column("at most", justify="right")
    table.add_column("")
    for name, limit in limits.items():
        if limit["value"] is not None:
            verdict = "[green]met[/]" if limit["met"] else "[bold red]not met[/]"
            table.add_row(name, f"{limit['value']:.2f}", f"{limit['at_most']:.0f}", verdict)
    for name in ("health_idle_p99_ms", "serverlive_idle_p99_ms", "probe_late_p99_ms"):
        if (value := findings.responsive.get(name)) is not None:
            table.add_row(name, f"{value:.2f}", "", "", style="dim")
    return table


def _judged_table(title: str, found: dict[str, float], bounds: Sequence[Bound]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("figure")
    for name in ("value", "bound"):
        table.add_column(name, justify="right")
    table.add_column("")
    limits = judged(found, bounds)
    for name, limit in limits.items():
        if limit["value"] is not None:
            bound = f"≤ {limit['at_most']:g}" if limit["at_most"] is not None else f"≥ {limit['at_least']:g}"
            verdict = "[green]met[/]" if limit["met"] else "[bold red]not met[/]"
            table.add_row(name, f"{limit['value']:.2f}", bound, verdict)
    for name, value in found.items():
        if name not in limits:
            table.add_row(name, f"{value:.2f}", "", "", style="dim")
    return table


def _verdict(ratio: dict[str, Any]) -> str:
    if ratio["floor"] is None:
        return ""
    if ratio["aim_met"]:
        return "[bold green]aim met[/]"
    return "[green]floor met[/]" if ratio["floor_met"] else "[bold red]below the floor[/]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _at_most(value: float | None, most: float) -> bool:
    return value is not None and value <= most


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _said_by(*command: str) -> str | None:
    """The output of a command; None if it is not installed or prints nothing."""
    try:
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return ran.stdout.strip() or None
