"""The ways to call from Python, measured alternately; and 1 KiB calls beside a 64 MiB one."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from bench.processes import Child, load_core
from bench.subjects.subjects import Subject
from bench.throughput import Cell

KINDS = ("map", "call", "gathered", "gathered_16k", "unary")
IN_FLIGHT = {"map": 64, "call": 1, "gathered": 32, "gathered_16k": 16_000, "unary": 32}


def measure(subject: Subject, *, rounds: int, seconds: float, on_step: Callable[[str], None]) -> list[Cell]:
    """Measure one cell for each kind. Each kind has a process of its own, on the load generator's core."""
    cells = {kind: Cell(work="client_1k", in_flight=IN_FLIGHT[kind], subject=kind) for kind in KINDS}
    with ExitStack() as stack:
        children = {kind: stack.enter_context(_child(kind, subject)) for kind in KINDS}
        for child in children.values():
            child.answer()  # warm
        for number in range(1, rounds + 1):
            for kind, child in children.items():
                on_step(f"round {number}/{rounds} · Python client · {kind}")
                before = subject.cpu()
                answer = child.ask(seconds=seconds)
                after = subject.cpu()
                spent = {name: (after[name] - before.get(name, 0.0)) / answer["calls"] * 1e6 for name in after}
                cells[kind].rates.append(answer["calls_per_second"])
                cells[kind].cpu_us.append({**spent, "client": answer["client_cpu_us"]})
    return list(cells.values())


def beside_64mib(
    subject: Subject, *, passes: int, seconds: float, on_step: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Measure 1 KiB calls alone for `seconds`, then beside one 64 MiB call on the same lane; repeated in each pass."""
    with _child("beside", subject) as child:
        child.answer()
        passed = []
        for number in range(1, passes + 1):
            on_step(f"pass {number}/{passes} · 1 KiB calls beside a 64 MiB call")
            passed.append(child.ask(seconds=seconds))
        return passed


def _child(kind: str, subject: Subject) -> Child:
    return Child(
        f"client-{kind}", "bench.load.client", kind, "--gateway", f"127.0.0.1:{subject.port}", cpus=[load_core()]
    )
