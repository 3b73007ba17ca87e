"""Bounds on the product's shape. `pytest -s`, or `python -m tests.structure.shape`, prints all figures."""

from tests.structure import shape


def test_no_modules_import_one_another_in_a_circle() -> None:
    """A circle of imports at run time would make the order of imports matter."""
    assert shape.import_circle() == []


def test_no_function_is_complex() -> None:
    """A function with more than 12 ways through it needs as many tests, and is split instead."""
    assert [str(site) for site in shape.complex_functions() if site.figure > shape.MAX_COMPLEXITY] == []


def test_few_protocols_have_one_implementation() -> None:
    """A Protocol that one class implements is a seam that nothing uses: at most nine are worth their lines."""
    thin = shape.thin_protocols()
    assert len(thin) <= 9, "\n".join(f"{site} <- {found}" for site, found in thin.items())


def test_no_class_name_is_used_twice() -> None:
    """A class is found by its name: a search for it leads to one place."""
    assert shape.repeated_class_names() == {}


def test_calls_are_released_in_one_place() -> None:
    """A call's memory is given back by what settles the call, and by nothing beside it."""
    assert len(shape.releases()) <= 1, shape.releases()


def test_a_cancel_crosses_two_files() -> None:
    """`Call.abandon` asks what holds the call, and that carries the cancel out."""
    assert len(shape.cancel_way()) <= 2, shape.cancel_way()


def test_figures_are_printed() -> None:
    """All figures, and the places that they count, for a reader of `pytest -s`."""
    shape.main()
