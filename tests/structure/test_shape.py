"""Bounds on the product's shape. `pytest -s`, or `python -m tests.structure.shape`, prints all figures."""

from tests.structure import shape


def test_no_modules_import_one_another_in_a_circle() -> None:
    """A circle of imports at run time would make the order of imports matter."""
    assert shape.import_circle() == []


def test_figures_are_printed() -> None:
    """All figures, and the places that they count, for a reader of `pytest -s`."""
    shape.main()
