"""The report of a check, for people and for programs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from unlatch.check.findings import Finding
from unlatch.check.growth import Growth, Row


def for_people(findings: Sequence[Finding], growths: Mapping[str, Growth], checked: int) -> None:
    """Print a table of times and memory, then a line for each finding. Faults come last, to stay on the screen."""
    # Without markup: `:100:` is a line number and not an emoji, and `[3, 4]` is a shape and not a style.
    console = Console(highlight=False, emoji=False, markup=False)
    if any(growth.rows for growth in growths.values()):
        console.print(_table(growths))
    for name, growth in growths.items():
        if growth.ended_by:
            console.print(f"{name}: no larger sizes: {growth.ended_by}", style="dim", soft_wrap=True)
    for finding in sorted(findings, key=lambda finding: finding.is_fault):
        style = "bold red" if finding.is_fault else "yellow"
        console.print("fault" if finding.is_fault else "note ", style=style, end=" ")
        console.print(str(finding), soft_wrap=True)
        for line in finding.detail.splitlines():
            console.print(f"        {line.strip()}", style="dim", soft_wrap=True)
    faults = sum(finding.is_fault for finding in findings)
    console.print(
        f"{_number(checked, 'kernel')}, {_number(faults, 'fault')}, {_number(len(findings) - faults, 'note')}"
    )


def for_programs(findings: Sequence[Finding], growths: Mapping[str, Growth], kernels: Sequence[str], seed: int) -> None:
    """Print one JSON object."""
    print(
        json.dumps(
            {
                "kernels": list(kernels),
                "seed": seed,
                "findings": [_finding(finding) for finding in findings],
                "growth": {name: _growth(growth) for name, growth in growths.items()},
            },
            indent=2,
        )
    )


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        **asdict(finding),
        "is_fault": finding.is_fault,
        "why": finding.why,
        "what_to_do": finding.what_to_do,
    }


def _growth(growth: Growth) -> dict[str, Any]:
    return {
        "rows": [asdict(row) for row in growth.rows],
        "time_exponent": growth.time_exponent,
        "memory_exponent": growth.memory_exponent,
        "ended_by": growth.ended_by,
    }


def _table(growths: Mapping[str, Growth]) -> Table:
    table = Table("kernel", box=None, header_style="bold", pad_edge=False)
    for heading in ("n", "inputs", "time", "memory", "time ~", "memory ~"):
        table.add_column(heading, justify="right")
    for name, growth in growths.items():
        for row in growth.rows:
            is_first, is_last = row is growth.rows[0], row is growth.rows[-1]
            powers = (_power(growth.time_exponent), _power(growth.memory_exponent)) if is_last else ()
            table.add_row(name if is_first else "", *_cells(row), *powers)
    return table


def _cells(row: Row) -> tuple[str, str, str, str]:
    return str(row.length), _bytes(row.input_bytes), _seconds(row.seconds), _bytes(row.memory_bytes)


def _power(exponent: float | None) -> str:
    return "" if exponent is None else f"n^{exponent:.1f}"


def _seconds(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.0f} µs"


def _bytes(size: int) -> str:
    for unit, bytes_ in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= bytes_:
            return f"{size / bytes_:.3g} {unit}"
    return f"{size} B"


def _number(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")
