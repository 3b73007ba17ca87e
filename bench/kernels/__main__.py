"""`python -m bench.kernels`: compare each built-in kernel with another library's, and write docs/kernels.md.

Both run alternately on one thread, with memory kept as in a worker, so that noise in a round affects both. Figures are
medians over rounds, and the ratio is the median of each round's ratio. `--only NAME` prints one kernel's rows and
writes nothing.
"""

import argparse
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from threadpoolctl import threadpool_limits

from bench.kernels.cases import Case, cases
from unlatch.common.kernel.spec import KernelSpec
from unlatch.common.machine.memory import keep_freed
from unlatch.compute.worker.catalogue import load

DOCS = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
BEGIN, END = "<!-- python -m bench.kernels -->", "<!-- end of the table -->"
HEAD = (
    "| kernel | what it does | measured on | ms | reference | its ms | ratio |",
    "|---|---|---|---|---|---|---|",
)

_ROUNDS = 15
_ROUND_SECONDS = 0.02
_MIB = 2**20


def measure(case: Case) -> tuple[float, float | None, float | None]:
    """Measure our milliseconds, the reference's, and the ratio of ours to theirs."""
    if case.theirs is None:
        repeats = _repeats(case.ours)
        return statistics.median(_milliseconds(case.ours, repeats) for _ in range(_ROUNDS)), None, None
    ours, theirs = _repeats(case.ours), _repeats(case.theirs)
    rounds = [(_milliseconds(case.ours, ours), _milliseconds(case.theirs, theirs)) for _ in range(_ROUNDS)]
    return (
        statistics.median(mine for mine, _ in rounds),
        statistics.median(other for _, other in rounds),
        statistics.median(mine / other for mine, other in rounds),
    )


def row(case: Case, spec: KernelSpec, figures: tuple[float, float | None, float | None]) -> str:
    """A row of the table. A variant's first cells have only what differs."""
    mine, other, ratio = figures
    name, does = (f"… {case.variant}", "") if case.variant else (f"`{_signature(spec)}`", _sentence(spec.doc))
    beside = (case.reference, _shown(other), f"{ratio:.2f}") if other is not None and ratio else ("—", "—", "—")
    return "| " + " | ".join((name, does, case.size, _shown(mine), *beside)) + " |"


def _repeats(call: Callable[[], object]) -> int:
    call()
    return max(1, int(_ROUND_SECONDS * 1000 / _milliseconds(call, 1)))


def _milliseconds(call: Callable[[], object], repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) * 1000 / repeats


def _signature(spec: KernelSpec) -> str:
    scalars = ["*", *(scalar.name for scalar in spec.scalars)] if spec.scalars else []
    return f"{spec.name}({', '.join([*(array.name for array in spec.inputs), *scalars])})"


def _sentence(doc: str) -> str:
    return doc.split("\n\n", maxsplit=1)[0].replace("\n", " ").rstrip(".").replace("|", r"\|")


def _shown(milliseconds: float) -> str:
    return f"{milliseconds:.4f}" if milliseconds < 0.01 else f"{milliseconds:.3g}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.kernels", description=__doc__)
    parser.add_argument("--only", metavar="NAME", help="print this kernel's rows, and write nothing")
    only = parser.parse_args().only
    keep_freed(largest_bytes=512 * _MIB, most_bytes=512 * _MIB, step_bytes=64 * _MIB)
    warnings.simplefilter("ignore")  # a reference may warn about things that do not affect its time
    specs = load(()).specs
    rows = []
    with threadpool_limits(1):
        for case in cases():
            if only in (None, case.kernel):
                rows.append(row(case, specs[case.kernel], measure(case)))
                print(rows[-1], flush=True)
    if only is None:
        table = "\n".join((BEGIN, *HEAD, *rows, END))
        DOCS.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: table, DOCS.read_text(), flags=re.DOTALL))
    return 0


if __name__ == "__main__":
    sys.exit(main())
