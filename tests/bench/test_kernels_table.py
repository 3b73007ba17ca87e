"""The kernels' table contains every kernel, with measured figures."""

import re

from bench.kernels.__main__ import BEGIN, DOCS, END, measure, row
from bench.kernels.cases import Case, cases
from unlatch.compute.worker.catalogue import load


def test_every_kernel_is_measured_and_gives_what_its_reference_takes() -> None:
    """Every kernel has one first case, and each kernel and its reference runs."""
    measured = cases()
    assert sorted(case.kernel for case in measured if not case.variant) == sorted(load(()).specs)
    for case in measured:
        assert case.ours() is not None
        assert (case.theirs is None) == (case.reference == "")


def test_a_row_has_the_ratio_of_what_was_measured() -> None:
    """A reference that does the same work takes about as long on any machine.

    A kernel without a reference has dashes.
    """
    spec = load(()).specs["histogram"]
    case = Case("histogram", "3", lambda: sum(range(20_000)), "itself", lambda: sum(range(20_000)))
    mine, other, ratio = measure(case)
    assert other is not None
    assert ratio is not None
    assert min(mine, other, ratio) > 0
    written = row(case, spec, (mine, other, ratio))
    assert written.startswith("| `histogram(x, *, bins, low, high)` | Count the values of an array in each of `bins`")
    assert written.endswith(f"| itself | {other:.3g} | {ratio:.2f} |")
    assert row(case._replace(variant="float32"), spec, (0.001, None, None)).startswith(
        "| … float32 |  | 3 | 0.0010 | —"
    )


def test_the_docs_hold_the_table_between_its_marks() -> None:
    """The table is between its marks, so that the next run can replace it."""
    assert re.search(rf"{BEGIN}\n\| kernel .*\n{END}\n", DOCS.read_text(), re.DOTALL)
